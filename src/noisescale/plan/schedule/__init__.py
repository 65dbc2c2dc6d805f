"""Batch-size and learning-rate schedules: planned as records, pure, without torch."""
