"""Measure a real early-exit model: time, memory, energy, and what every exit would have said."""
