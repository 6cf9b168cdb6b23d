"""Signals of samples: from texts, from one pass of a model, and near-duplicates."""

from tokencredit.lazy import attributes_of

__getattr__ = attributes_of("tokencredit.recipes.signals.compute")
