"""Formulas: numpy only (scipy inside the functions that fit); one formula, one function, one source."""
