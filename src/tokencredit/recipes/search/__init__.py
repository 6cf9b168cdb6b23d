"""The search for a recipe: configuration, history, policies, surrogate, and the loop that resumes."""

from tokencredit.lazy import attributes_of

__getattr__ = attributes_of("tokencredit.recipes.search.loop")
