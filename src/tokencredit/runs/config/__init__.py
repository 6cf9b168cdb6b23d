"""The config of a run: `load` reads a file into a `RunConfig`, `arguments` makes TRL's and peft's configs of it."""

from tokencredit.lazy import attributes_of

__getattr__ = attributes_of("tokencredit.runs.config.load")
