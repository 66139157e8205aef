"""The parts of scripts/reproduce_small.py: runs and policies, measures, results, statistics, claims, figure, page."""
