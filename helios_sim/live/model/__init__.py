"""The decoder-only model: its shape, its weights, its layers and the heads at its early exits."""
