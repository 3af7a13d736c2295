"""The types of requests and replies: OpenAI's fields and vLLM's extra ones.

Values are not converted: a number sent as a string is refused. `unknown.py` says which unknown fields are refused.
"""
