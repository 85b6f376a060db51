"""Measurements of a model on a device, and the profile that they make."""
