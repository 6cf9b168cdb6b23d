"""Tiny models and enumerable tasks, so that credit is measured in minutes on a laptop."""
