"""A campaign on one device: many models, traces, live runs and the headline comparison, in one command."""
