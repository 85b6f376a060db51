"""Profiles from tables that others measured, with a module for each format. Their provenance class is `derived`."""
