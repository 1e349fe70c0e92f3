"""Measuring: bytes, parameters, MACs, latency, memory, differences."""
