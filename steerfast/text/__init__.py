"""Prompts, styles, and the token ids that a model reads."""
