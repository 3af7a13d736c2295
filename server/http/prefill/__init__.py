"""Prompts that another server computes (`--role`): a prefill server computes a prompt, and a decode server takes the
segments of the prefix cache from it and goes on from them, with the same bits."""
