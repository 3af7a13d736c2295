"""This package contains the kernels. A kernel is an implementation of one of the model's ops, such as RMSNorm.

The module `ops` defines the arguments and the result of each op. The module `table` lists the implementations of each
op and selects one implementation for a device. Kernels take and return tensors. They know nothing of requests, layers
or files, and this package imports neither the package `engine` nor the package `server`. The command
`python -m jamba_server.kernels` prints the machine's hardware and the kernels that would run on the machine.
"""
