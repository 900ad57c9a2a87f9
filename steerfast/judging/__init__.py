"""Is an answer a refusal, is it fluent, and how sure is a figure."""
