"""Types, settings, tensors, randomness and storage that every layer uses."""
