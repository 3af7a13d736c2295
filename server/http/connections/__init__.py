"""Accepts TCP connections, limits their number to what the limit of file descriptors allows, and sets deadlines for
what clients send."""
