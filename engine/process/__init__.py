"""Runs the engine in a process of its own: the supervisor in the HTTP process, the messages between the HTTP process
and the engine process, and the main loop of the engine process."""
