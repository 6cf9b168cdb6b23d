"""The benchmark of credit: every method against the exact credit and the exact gradient."""
