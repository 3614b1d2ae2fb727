"""Engines: how the clients of one round are trained."""
