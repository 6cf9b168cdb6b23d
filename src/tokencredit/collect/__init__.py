"""Collectors fill the optional fields of a batch. Only this package may run a model."""
