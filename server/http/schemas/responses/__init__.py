"""The pydantic classes for the requests and replies of /v1/responses.

The module items.py has the items of a request's `input`, tools.py the tools of a request, request.py the request
itself, and reply.py the response.
"""
