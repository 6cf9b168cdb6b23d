"""The page of training runs: folders as data, results, curves, and responses as coloured tokens."""
