"""A run's folder, going on from it, and its record."""
