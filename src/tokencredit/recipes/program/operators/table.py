"""The closed table of everything that a recipe may say."""

from tokencredit.recipes.program.operators import dedup, diversity, filters, sampling
from tokencredit.recipes.program.operators.spec import OperatorSpec

OPERATORS: dict[str, OperatorSpec] = filters.ROWS | dedup.ROWS | sampling.ROWS | diversity.ROWS
