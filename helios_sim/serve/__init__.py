"""An OpenAI-compatible server in front of the live engine, or the simulated one by the wall clock."""
