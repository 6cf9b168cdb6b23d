"""Pipelines: steps and their hyperparameters, the text and YAML forms of a pipeline, and `assign_credit`."""
