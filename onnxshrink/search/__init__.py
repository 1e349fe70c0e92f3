"""Search: how a pass gives way, and which places hurt."""
