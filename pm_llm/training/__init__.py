"""The Trainers, their arguments, one task, checkpoints and stopping."""
