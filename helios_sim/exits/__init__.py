"""Where tokens may leave a model, what was recorded there, and what a rule makes of the record."""
