"""The HTTP server: the routes, the types of their requests and replies, and the code that submits requests to the
engine and sends the results to clients."""
