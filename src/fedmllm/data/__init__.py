"""Data sets: what a row is, how it is read and how it becomes a prompt."""
