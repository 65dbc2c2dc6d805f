"""Formulas, numpy only: one formula, one function, one source."""
