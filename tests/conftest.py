"""Settings for all tests."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

# The same examples on every machine and every day; no test depends on the clock.
# HYPOTHESIS_PROFILE=search looks for new ones.
settings.register_profile("same", deadline=None, derandomize=True, database=None)
settings.register_profile(
    "search",
    deadline=None,
    max_examples=5000,
    suppress_health_check=[HealthCheck.too_slow],
)
# A child process for each run is half a second that most tests do not need; what needs
# it asks for it, and tests/isolation tests it.
os.environ.setdefault("ONNXSHRINK_ISOLATE", "0")

settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))
