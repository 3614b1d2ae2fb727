"""Flower: simulation on a cluster, and deployment across real sites."""
