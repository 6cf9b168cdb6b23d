"""Names that verl's configs use for our trainers."""

MODES = ("sync", "colocate_async", "separate_async")  # verl's own trainers, each with one of ours
PREFIX = "tokencredit_"
