"""Implements `jamba run-batch`, which runs the requests in a file and writes the replies into another file."""
