"""The fixed pool of samples: raw records in, canonical samples with masks of their answers, logs of JSON lines."""

from tokencredit.lazy import attributes_of

__getattr__ = attributes_of("tokencredit.recipes.pool.samples")
