"""Quantization: how values become codes, and where in a graph they do."""
