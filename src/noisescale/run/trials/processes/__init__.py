"""Processes that train trials, in place of threads that hand Python's lock to and fro."""
