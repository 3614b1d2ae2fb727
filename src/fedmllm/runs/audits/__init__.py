"""Attacks on an experiment's own privacy: `fedmllm audit`."""
