"""Engines: a map over the clients of a round, nothing more."""
