"""What the rest stands on: files, locks, processes, sharding, progress."""
