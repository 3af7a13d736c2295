"""Limits on what clients may send: the keys and their rates, the tokens that may wait, and the memory for bodies."""
