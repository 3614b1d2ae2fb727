"""The federated loop: rounds, client training, evaluation and engines."""
