"""Limits what clients may send: the API keys and their rates, the number of prompt tokens that may wait, and the memory
for request bodies."""
