"""The requests and replies of the endpoints that answer with vectors instead of text."""
