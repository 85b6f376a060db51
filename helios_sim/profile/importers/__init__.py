"""Profiles from tables that others measured, one module for each format. All of class `derived`."""
