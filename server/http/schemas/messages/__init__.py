"""The pydantic classes for the requests and replies of /v1/messages, which is Anthropic's API for chats.

The module content.py has the messages of a request, tools.py its tools and options, request.py the request itself,
reply.py the replies and the events of streams. The module translate.py turns a request's conversation into the
messages that chat templates read.
"""
