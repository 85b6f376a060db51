"""Measures early-exit models on real devices: times, memory, exits. Importing this package loads no torch."""
