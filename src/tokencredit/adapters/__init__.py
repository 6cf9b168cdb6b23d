"""Hosts: what TRL and verl need to train with a credit pipeline."""
