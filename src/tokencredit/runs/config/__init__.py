"""The config of a run: keys and types, defaults by kind of model, TRL's arguments, and the printed plan."""

from tokencredit.lazy import attributes_of

__getattr__ = attributes_of("tokencredit.runs.config.load")
