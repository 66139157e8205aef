"""Measures of the paper's figures and tables: one file per measure, functions of arrays."""
