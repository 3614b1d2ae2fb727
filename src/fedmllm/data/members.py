"""Every data set, so that it can be picked by name."""

from fedmllm.data import synthetic

__all__ = ["synthetic"]
