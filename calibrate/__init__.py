"""Measures early-exit models on real devices: times, memory, exits. Importing this package loads no torch."""

import helios_sim  # noqa: F401 - Python's own modules before files of the current folder, from here on
