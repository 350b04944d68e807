"""Merges: how a trained task joins the running adapter, by exact low-rank algebra. Each rule is one file."""
