"""Policies: arithmetic on telemetry. They know neither SimPy nor torch nor Hydra."""
