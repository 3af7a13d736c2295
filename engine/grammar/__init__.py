"""Constrained decoding: replies that follow a grammar, and thoughts that end after a number of tokens. This package
does not import torch."""
