"""Every data set, so that it can be picked by name."""

from fedmllm.data import crisismmd, drivelm, flashcards, hateful_memes, medical, slake, synthetic, table, vqa_rad

__all__ = [
    "crisismmd",
    "drivelm",
    "flashcards",
    "hateful_memes",
    "medical",
    "slake",
    "synthetic",
    "table",
    "vqa_rad",
]
