"""Evaluators of a subset: a shell command, supervised fine-tuning, n-grams, and synthetic surfaces."""

from tokencredit.lazy import attributes_of

__getattr__ = attributes_of("tokencredit.recipes.evaluate.evaluators")
