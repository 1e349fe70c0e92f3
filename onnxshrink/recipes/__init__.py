"""Recipes that ship: pipelines as TOML files, found by name with ``--recipe NAME``."""
