"""Tensors in, tensors out: `ops` is the contract, `table` lists the implementations and selects among them.

Knows nothing of requests, layers or files, and imports neither engine nor server.
`python -m jamba_server.kernels` prints what this machine has and what would run on it.
"""
