"""TCP connections: how many are open, how long each may take, and what happens when file descriptors run short."""
