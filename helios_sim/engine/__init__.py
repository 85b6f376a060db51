"""The simulated engine: prices plans with a profile and reads exits from a trace."""
