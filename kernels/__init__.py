"""The kernels: `ops` describes each op, `table` lists the implementations of each op and selects one for a device.

Kernels take and return tensors. They know nothing of requests, layers or files, and this package imports neither
`engine` nor `server`. `python -m jamba_server.kernels` prints the machine's hardware and the kernels that would run.
"""
