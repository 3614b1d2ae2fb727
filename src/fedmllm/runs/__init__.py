"""One experiment from settings to summary, with checkpoints and resume."""
