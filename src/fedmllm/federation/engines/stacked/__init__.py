"""Many clients in one pass over the frozen base."""
