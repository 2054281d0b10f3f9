"""Matrices: many recipes run one by one, and compared in one report."""
