"""`python -m jamba_server` is the command `jamba`."""

from jamba_server.server.cli.application import run

run()
