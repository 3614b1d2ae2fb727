"""Helpers of several tests; no module here holds a test."""
