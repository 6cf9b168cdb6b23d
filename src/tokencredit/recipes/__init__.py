"""Data recipes for SFT: search over short programs of filters, dedups and sampling on one fixed pool.

Method: AutoSelection, "From Instance Selection to Fixed-Pool Data Recipe Search for Supervised Fine-Tuning"
(arXiv:2605.12944). See `docs/recipes.md`.
"""
