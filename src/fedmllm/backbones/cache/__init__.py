"""Caches of encoded rows and image features."""
