"""OpenAI's wire types, with vLLM's extra fields. Requests are strict: unknown fields and loose types are refused."""
