"""The commands of `pm-llm`, one a file."""
