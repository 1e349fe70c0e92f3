"""The built-in passes: one file, one pass, one class. ``README.md`` says how."""
