"""Signals of samples and their store: from texts, from one pass of a model, near-duplicates, relevance to queries."""

from tokencredit.lazy import attributes_of

__getattr__ = attributes_of("tokencredit.recipes.signals.computation")
