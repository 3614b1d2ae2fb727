"""A site of a real federation."""
