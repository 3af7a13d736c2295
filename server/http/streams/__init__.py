"""Keeps the events of streams for some time, so that a client whose connection broke can read the rest of its reply."""
