"""What a run trains on: model, data set, prompts as the model sees them, and rewards."""

from tokencredit.lazy import attributes_of

__getattr__ = attributes_of("tokencredit.runs.data.material")
