"""Run the command line: ``python -m onnxshrink``."""

from __future__ import annotations

from onnxshrink.cli import main

if __name__ == "__main__":
    main()
