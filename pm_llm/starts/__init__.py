"""Starts: how the next task's adapter begins. Each is one file."""
