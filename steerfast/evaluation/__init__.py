"""Judges and figures for answers: did the model refuse, is the text still fluent."""
