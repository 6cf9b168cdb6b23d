"""Statistics of attention rows: entropies, how far heads look back, and what the answer attends to."""

from tokencredit.lazy import attributes_of

__getattr__ = attributes_of("tokencredit.collect.attention.entropies")
