"""Constraints: what training a task adds to the plain step. They compose; each is one file."""
