"""Evaluation: generation, scorers, the accuracy matrix and what is computed from it."""
