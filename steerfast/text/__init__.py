"""Prompts and how a model reads them."""
