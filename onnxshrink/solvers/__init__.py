"""Solvers: arrays in, arrays out; no model, no onnxruntime."""
