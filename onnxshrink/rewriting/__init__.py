"""Rewriting: rules and the driver that applies them; what fold is made of."""
