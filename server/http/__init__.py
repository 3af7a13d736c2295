"""The HTTP side: routes, their wire types, and a request's way to the engine and back."""
