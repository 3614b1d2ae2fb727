"""Which client holds and sees which rows, and which clients respond."""
