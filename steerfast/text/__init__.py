"""Prompts, their labels and sources, and the token ids that a model reads."""
