"""Federated fine-tuning of multimodal LLMs when clients hold different modalities."""
