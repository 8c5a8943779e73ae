"""Losses of reinforcement learning from human feedback, on log-probabilities and masks, and their modules."""
