"""Runs the command `jamba` for `python -m jamba_server`."""

from jamba_server.server.cli.application import run

run()
