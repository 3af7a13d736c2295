"""Tensor parallelism: several ranks, each a process with a part of every layer, run one model together."""
