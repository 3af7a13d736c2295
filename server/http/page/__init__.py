"""The chat page, which a browser opens at /. The folder `static` has its HTML, its styles and its scripts.

The page is a client of the HTTP API like every other: it holds no data, and its requests carry the API key that its
user enters.
"""
