"""Policies: decisions by arithmetic on telemetry. This package knows neither SimPy nor torch nor Hydra."""
