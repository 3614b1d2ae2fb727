"""Partitions, modality scenarios, availability of clients."""
