"""Training runs from a config: one run, and runs side by side."""
