"""Frozen multimodal LLMs with LoRA."""
