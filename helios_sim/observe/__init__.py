"""Drives any OpenAI-compatible endpoint with a workload and writes a log: `python -m helios_sim.observe`."""
