"""How a model writes what is not ordinary text: its tool calls and its thoughts."""

from __future__ import annotations

from dataclasses import dataclass

from jamba_server.server.config import ReasoningParser, ToolCallParser
from jamba_server.server.text.chat_template import ChatTemplate
from jamba_server.server.text.reasoning import THINK_TAGS
from jamba_server.server.text.tokenizer import Tokenizer
from jamba_server.server.text.tool_calls import TOOL_TAGS, ToolStyle


@dataclass(frozen=True, slots=True)
class ReplyStyle:
    """The style of a model's tool calls, or None if they are not read, and whether its thoughts are separated from the
    content."""

    tool_calls: ToolStyle | None = None
    reasoning: bool = False

    def describe(self) -> str:
        """Returns a line for the log."""
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
    """Returns the style of a model. With "auto" it is found in the model's chat template and its vocabulary.

    A template that declares tools tells the model how to write calls, or writes the calls of a conversation. If it has
    the tags of both styles, the style whose tags are tokens of the vocabulary is taken.
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
