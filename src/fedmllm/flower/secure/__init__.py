"""Secure aggregation: the server learns sums of updates only."""
