"""Costs of a model on a card: time, memory, load and power, each figure with its provenance."""
