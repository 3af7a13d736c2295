"""Renders chat templates in Jinja's sandbox. The server does this in child processes with limits on time and memory."""
