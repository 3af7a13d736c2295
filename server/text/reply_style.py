"""Finds out how a model writes tool calls and whether it writes reasoning."""

from __future__ import annotations

from dataclasses import dataclass

from jamba_server.server.option_values import ReasoningParser, ToolCallParser
from jamba_server.server.text.chat_template import ChatTemplate
from jamba_server.server.text.reasoning import THINK_TAGS
from jamba_server.server.text.tokenizer import Tokenizer
from jamba_server.server.text.tool_calls import TOOL_TAGS, ToolStyle


@dataclass(frozen=True, slots=True)
class ReplyStyle:
    """Says how the server reads a model's replies: `tool_calls` is the style of its tool calls, or None if they are
    treated as text. `reasoning` says whether its reasoning is separated from the content."""

    tool_calls: ToolStyle | None = None
    reasoning: bool = False

    def describe(self) -> str:
        """Returns a description of the style for the log."""
        calls = f"tool calls between {' and '.join(TOOL_TAGS[self.tool_calls])}" if self.tool_calls else "no tool calls"
        thoughts = f"thoughts between {' and '.join(THINK_TAGS)}" if self.reasoning else "no thoughts"
        return f"reads {calls}, and {thoughts}"


def find_reply_style(
    template: ChatTemplate | None,
    tokenizer: Tokenizer,
    *,
    tool_calls: ToolCallParser = "auto",
    reasoning: ReasoningParser = "auto",
) -> ReplyStyle:
    """Returns the style of a model's replies. If an option is "auto", its value is derived from the model's chat
    template and vocabulary.

    A template that supports tools contains the tags of tool calls, because it tells the model how to write calls or
    renders earlier calls. If the template has the tags of both styles, the style whose tags are single tokens of the
    vocabulary is chosen.
    """
    if template is None:
        return ReplyStyle()
    style = _find_tool_style(template, tokenizer) if tool_calls == "auto" else tool_calls
    has_thoughts = reasoning == "auto" and all(tag in template.source for tag in THINK_TAGS)
    return ReplyStyle(None if style == "none" else style, has_thoughts)


def _find_tool_style(template: ChatTemplate, tokenizer: Tokenizer) -> ToolStyle | None:
    if "tools" not in template.variables:
        return None
    written = [style for style, tags in TOOL_TAGS.items() if tags.start in template.source]
    in_vocabulary = [style for style in written if all(tag in tokenizer.tags for tag in TOOL_TAGS[style])]
    return next(iter(in_vocabulary or written), None)
