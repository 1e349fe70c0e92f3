"""Reporting: every form in which figures are shown."""
