"""The types of requests and replies: OpenAI's fields and vLLM's extra ones.

Values are not converted: for example, a number that is sent as a string is refused. The module unknown.py decides which
unknown fields are refused.
"""
