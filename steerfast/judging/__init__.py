"""Refusal and fluency of answers, and confidence intervals."""
