"""Data sets, their readers, and prompts."""
