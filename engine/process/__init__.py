"""The engine as a process of its own: what supervises it, what they say to each other, and its main loop."""
