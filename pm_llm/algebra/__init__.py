"""Exact algebra on W = B A, without ever forming W."""
