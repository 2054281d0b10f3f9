"""Settings of all tests."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

# How fast a machine is, and how busy, is nothing that a test may fail by.
settings.register_profile("underpaint", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("underpaint")
