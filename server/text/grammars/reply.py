"""Builds one grammar, in llguidance's form of Lark, for a whole reply: thoughts, tool calls and content."""

from __future__ import annotations

from collections.abc import Mapping

from jamba_server.server.text.grammars.types import OutputFormat, ReasoningGrammar, ToolGrammar


def build_grammar(
    format: OutputFormat | None,
    tools: ToolGrammar | None,
    reasoning: ReasoningGrammar | None = None,
    *,
    token_ids: Mapping[str, int],
    leading_space: bool = False,
) -> str:
    """Returns a grammar for a whole reply, from its first generated token on, or "" if every reply is allowed.

    The mapping `token_ids` has the token ids of tags that are single tokens of the model's vocabulary, such as
    "<tool_call>". A tag that is not in it is generated as ordinary text. If `leading_space` is true, the content begins
    with one space.

    Raises RequestRejected, which names the keyword and its path, for a schema that cannot be enforced exactly.
    """
    raise NotImplementedError
