"""The engine as a process of its own: its supervisor, the messages between the two processes, and its main loop."""
