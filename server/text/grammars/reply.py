"""Builds one grammar for a whole reply: reasoning, tool calls and content. The grammar has llguidance's variant of the
notation of Lark."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from jamba_server.server.text.grammars.content import content_rules
from jamba_server.server.text.grammars.json_schema import inline
from jamba_server.server.text.grammars.lark import Tag, literal, text_without
from jamba_server.server.text.grammars.tool_schemas import any_arguments, prepare_arguments
from jamba_server.server.text.grammars.types import Function, OutputFormat, ReasoningGrammar, ToolGrammar, ToolStyle


@dataclass(frozen=True, slots=True, kw_only=True)
class _Style:
    """Says how a model writes tool calls. `start` and `end` are the tags around a block of calls. `opening` is the text
    after the start tag, `between` the text between two calls, and `closing` the text before the end tag. If `array` is
    false, a block has only one call, and `between` is the text between two blocks."""

    start: str
    end: str
    opening: str
    between: str
    closing: str
    array: bool


# The white space is the same as in the models' chat templates, because the models were trained with calls in this form.
_STYLES: Mapping[ToolStyle, _Style] = {
    "jamba": _Style(
        start="<tool_calls>", end="</tool_calls>", opening="[\n    ", between=",\n    ", closing="\n]", array=True
    ),
    "hermes": _Style(start="<tool_call>", end="</tool_call>", opening="\n", between="\n", closing="\n", array=False),
}


def build_grammar(
    format: OutputFormat | None,
    tools: ToolGrammar | None,
    reasoning: ReasoningGrammar | None = None,
    *,
    token_ids: Mapping[str, int],
    leading_space: bool = False,
    unchecked: frozenset[str] = frozenset(),
    left_out: dict[str, list[str]] | None = None,
) -> str:
    """Returns a grammar for a whole reply, from its first generated token on, or "" if every reply is allowed.

    The mapping `token_ids` has the token ids of tags that are single tokens of the model's vocabulary, such as
    "<tool_call>". Tags that are not in this mapping are generated as ordinary text. If `leading_space` is true, the
    content begins with one space, which the server removes from the text: the chat template of Jamba 1.5 to 1.7 puts a
    space before each reply in the history. The functions named in `unchecked` take any JSON object as arguments. If
    `left_out` is given, it gets for the name of each function that is not strict the paths of those parts of its schema
    that the grammar does not enforce.

    If there are tools in the mode "auto" and also a format, the reply is either a block of tool calls or content in
    this format. With tools in the mode "required", the format has no effect, because the reply then has no content.

    Raises RequestRejected, which names the keyword and its path, for a schema that cannot be enforced exactly.
    """
    tools = tools if tools is not None and tools.functions else None
    if format is None and tools is None:
        return ""
    if tools is None and reasoning is None and not leading_space and format is not None and format.kind == "lark":
        return format.value
    return _Grammar(token_ids, unchecked, {} if left_out is None else left_out).build(
        format, tools, reasoning, leading_space=leading_space
    )


@dataclass(slots=True)
class _Grammar:
    """Collects the rules of one grammar, in the order in which they are written."""

    token_ids: Mapping[str, int]
    unchecked: frozenset[str]
    left_out: dict[str, list[str]]
    rules: list[str] = field(default_factory=list[str])
    # Further grammars, to which rules refer by name.
    nested: list[dict[str, str]] = field(default_factory=list[dict[str, str]])

    def build(
        self,
        format: OutputFormat | None,
        tools: ToolGrammar | None,
        reasoning: ReasoningGrammar | None,
        *,
        leading_space: bool,
    ) -> str:
        space = literal(" ") + " " if leading_space else ""
        if tools is not None and tools.mode == "auto" and format is None:
            body, separated = self._text_and_calls(tools, reasoning), False
        else:
            body, separated = space + self._body(format, tools), True
        start = self._thoughts(body, reasoning, separated=separated) if reasoning is not None else body
        text = "\n".join([f"start: {start}", *self.rules]) + "\n"
        if not self.nested:
            return text
        return json.dumps({"grammars": [{"lark_grammar": text}, *self.nested]})

    def _body(self, format: OutputFormat | None, tools: ToolGrammar | None) -> str:
        """Adds the rules for a reply that consists only of tool calls or of content in a required form. Returns the
        symbol of such a reply."""
        if tools is None or (tools.mode == "auto" and format is not None):
            assert format is not None
            rules, nested = content_rules(format)
            self.rules += rules
            self.nested += nested
            if tools is None:
                return "content"
        calls = self._blocks(tools)
        if tools.mode == "required":
            return calls
        self.rules.append(f"body: content | {calls}")
        return "body"

    def _thoughts(self, body: str, reasoning: ReasoningGrammar, *, separated: bool) -> str:
        """Adds the rules for the reasoning at the beginning of a reply, and returns the rule of the whole reply. `body`
        is the symbol for what follows the reasoning.

        If `separated` is true, the rule puts the separator, such as two line feeds, between the reasoning and the body.
        If it is false, the body is free text, which includes the separator.
        """
        start, end = (Tag.of(text, self.token_ids) for text in (reasoning.start, reasoning.end))
        if not separated and not reasoning.opened and start.token_id is None:
            return body  # the rule for free text also allows the reasoning
        if end.token_id is not None:
            self.rules.append(f"THOUGHTS: {text_without(end.text)}")
            self.rules.append(f"thoughts: {self._text_and_tags('THOUGHTS', without={start.text, end.text})}")
            closed = f"thoughts {end.symbol}"
        else:
            self.rules.append(f"THOUGHTS: /(?s:.*)/ {literal(end.text)}")
            self.rules.append("closed[lazy]: THOUGHTS")
            closed = "closed"
        after = f"{literal(reasoning.separator)} " if separated and reasoning.separator else ""
        if not reasoning.opened:
            return f"({start.symbol} {closed} {after})? {body}"
        if not separated and end.token_id is not None:
            # The reply may also end within the reasoning, because no content is required.
            return f"thoughts | {closed} {body}"
        return f"{closed} {after}{body}"

    def _blocks(self, tools: ToolGrammar) -> str:
        """Adds the rules for all blocks of tool calls of a reply that has no text between the blocks. Returns the
        symbol of these blocks."""
        style = _STYLES[tools.style]
        block = self._block(tools)
        if style.array or not tools.parallel:
            return block
        self.rules.append(f"blocks: {block} ({literal(style.between)} {block})*")
        return "blocks"

    def _text_and_calls(self, tools: ToolGrammar, reasoning: ReasoningGrammar | None) -> str:
        """Adds the rules for free text that may contain tool calls, and returns the symbol of such text."""
        style = _STYLES[tools.style]
        tag = Tag.of(style.start, self.token_ids)
        self.rules.append(f"TEXT: {text_without(style.start)}")
        used = {style.start, style.end} | ({reasoning.start, reasoning.end} if reasoning is not None else set())
        self.rules.append(f"text: {self._text_and_tags('TEXT', without=used)}")
        if tag.token_id is None:
            self.rules.append(f"HEAD: /(?s:.*)/ {literal(tag.text)}")
            self.rules.append("head[lazy]: HEAD")
            part = f"head {self._block(tools, opened=True)}"
        else:
            part = f"text {self._block(tools)}"
        self.rules.append(f"reply: ({part}){'*' if tools.parallel else '?'} text")
        return "reply"

    def _text_and_tags(self, terminal: str, *, without: set[str]) -> str:
        """Returns the right side of a rule for text that may contain tags which are single tokens, such as
        <citations>."""
        others = sorted(token_id for text, token_id in self.token_ids.items() if text not in without)
        return f"{terminal} (<[{','.join(map(str, others))}]> {terminal})*" if others else terminal

    def _block(self, tools: ToolGrammar, *, opened: bool = False) -> str:
        """Adds the rules for one block of tool calls, and returns the symbol of the block. If `opened` is true, the
        symbol does not include the block's start tag, because the rule for the preceding text includes the tag."""
        style = _STYLES[tools.style]
        names = [self._call(number, function) for number, function in enumerate(tools.functions)]
        self.rules.append(f"call: {' | '.join(names)}")
        more = f" ({literal(style.between)} call)*" if style.array and tools.parallel else ""
        start = "" if opened else Tag.of(style.start, self.token_ids).symbol + " "
        end = Tag.of(style.end, self.token_ids).symbol
        self.rules.append(f"block: {start}{literal(style.opening)} call{more} {literal(style.closing)} {end}")
        return "block"

    def _call(self, number: int, function: Function) -> str:
        """Adds the rules for a call of one function, and returns the symbol of the call."""
        if function.name in self.unchecked:
            schema = any_arguments()
            self.left_out[function.name] = ["#"]
        else:
            left_out = None if function.strict else list[str]()
            schema = prepare_arguments(function.parameters, param=function.param, left_out=left_out)
            if left_out:
                self.left_out[function.name] = left_out
        before = f'{{"name": {json.dumps(function.name, ensure_ascii=False)}, "arguments": '
        self.rules.append(f"call{number}: {literal(before)} arguments{number} {literal('}')}")
        self.rules.append(f"arguments{number}: {inline(schema, spaced=True)}")
        return f"call{number}"
