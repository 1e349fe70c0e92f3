"""Activations: running a model to see the values inside it."""
