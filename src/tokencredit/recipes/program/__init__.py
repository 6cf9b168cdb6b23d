"""Recipes as programs: parsing, operators, selectors, execution, and the state of a subset."""

from tokencredit.lazy import attributes_of

__getattr__ = attributes_of("tokencredit.recipes.program.recipe")
