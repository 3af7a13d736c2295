"""The requests and replies of /v1/responses.

items.py has the items of a request's `input`, tools.py its tools, request.py the request and reply.py the response.
"""
