"""Accuracy of a policy on problems, and tables of several policies."""
