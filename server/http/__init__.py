"""The HTTP server: the routes, the types of their requests and replies, and the path of a request to the engine."""
