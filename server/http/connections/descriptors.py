"""Computes how many connections the process can have under its limit of open file descriptors."""

from __future__ import annotations

import os
import resource

# The soft limit of open files is not raised above this number, because some systems set no hard limit at all.
LARGEST_LIMIT = 2**20
# This number of descriptors is reserved for everything except connections: the sockets of the engine process and of the
# process that replaces it, files that are read again, and the log.
RESERVED = 64


def raise_soft_limit() -> int:
    """Raises this process's soft limit of open descriptors to the hard limit. Returns the limit that then holds."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = LARGEST_LIMIT if hard == resource.RLIM_INFINITY else min(hard, LARGEST_LIMIT)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        return wanted
    return LARGEST_LIMIT if soft == resource.RLIM_INFINITY else min(soft, LARGEST_LIMIT)


def open_descriptors() -> int:
    """Returns the number of descriptors that this process has open."""
    return len(os.listdir("/dev/fd"))


def connections_that_fit(limit: int, *, refusals: int) -> int:
    """Returns how many connections can be served at the same time under the limit of `limit` descriptors.

    The number is at least 1. `refusals` descriptors stay free for connections that only get an error reply.
    """
    return max(1, limit - open_descriptors() - RESERVED - refusals)
