"""Tasks: rows of prompt and completion with splits and a scorer; benchmarks are ordered lists of them."""
