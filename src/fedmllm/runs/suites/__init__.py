"""Many experiments: a matrix and its scheduler."""
