"""Federated algorithms: what the server aggregates and what clients optimize."""
