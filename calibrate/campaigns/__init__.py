"""A whole campaign on one device: all models, traces, live runs and the headline, in one command and several calls."""
