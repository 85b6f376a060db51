"""Measures real early-exit models on real devices: times, memory, exits. Importing this package loads nothing."""
