"""The audit: where each of several methods would put the credit, on the same responses, without training.

Responses are sampled from a model on a task, read from the records of a run, or read from a file of another engine's.
"""
