"""Decisions: pure functions from records to records."""
