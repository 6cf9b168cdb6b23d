"""The search for a recipe: its configuration and loop, policies that choose, the surrogate, the language model."""

from tokencredit.lazy import attributes_of

__getattr__ = attributes_of("tokencredit.recipes.search.loop")
