"""Renders chat templates: Jinja's sandbox, and a process of its own that has limits of time and memory."""
