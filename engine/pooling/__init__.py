"""Replies that are vectors instead of tokens: hidden states, a classifier's scores, and log-probabilities of tokens.

Requests for vectors are prompts without a reply. They are scheduled, chunked, batched and cached as all other prompts.
"""
