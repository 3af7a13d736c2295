"""Builds one grammar, in llguidance's form of Lark, for a whole reply: thoughts, tool calls and content."""

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
    """How a model writes calls: the tags around a block, the text after the opening tag, between two calls of a block,
    and before the closing tag. If `array` is false, a block has one call, and `between` stands between two blocks."""

    start: str
    end: str
    opening: str
    between: str
    closing: str
    array: bool


# The white space is that of the models' chat templates, in which the models have seen past calls.
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
) -> str:
    """Returns a grammar for a whole reply, from its first generated token on, or "" if every reply is allowed.

    The mapping `token_ids` has the token ids of tags that are single tokens of the model's vocabulary, such as
    "<tool_call>". A tag that is not in it is generated as ordinary text. If `leading_space` is true, the content begins
    with one space, which the server removes from the text: the chat template of Jamba 1.5 to 1.7 puts a space before
    each reply in the history. The functions named in `unchecked` take any JSON object as arguments.

    With tools in the mode "auto" and a format, the reply is either a block of calls or content in this format. With
    tools in the mode "required", the format has no effect, because the reply has no content.

    Raises RequestRejected, which names the keyword and its path, for a schema that cannot be enforced exactly.
    """
    tools = tools if tools is not None and tools.functions else None
    if format is None and tools is None:
        return ""
    if tools is None and reasoning is None and not leading_space and format is not None and format.kind == "lark":
        return format.value
    return _Grammar(token_ids, unchecked).build(format, tools, reasoning, leading_space=leading_space)


@dataclass(slots=True)
class _Grammar:
    """The rules of one grammar, in the order in which they are written."""

    token_ids: Mapping[str, int]
    unchecked: frozenset[str]
    rules: list[str] = field(default_factory=list[str])
    nested: list[dict[str, str]] = field(default_factory=list[dict[str, str]])  # further grammars, by their names

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
        """Adds the rules of a reply without free text, and returns the symbol for it."""
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
        """Adds the rules of the thoughts before the body, and returns the rule of the whole reply.

        If `separated` is true, the body follows the reasoning's separator. If it is false, the body is free text, which
        has the separator itself.
        """
        start, end = (Tag.of(text, self.token_ids) for text in (reasoning.start, reasoning.end))
        if not separated and not reasoning.opened and start.token_id is None:
            return body  # the thoughts are a part of the free text
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
            return f"thoughts | {closed} {body}"  # a reply that needs no content may end within the thoughts
        return f"{closed} {after}{body}"

    def _blocks(self, tools: ToolGrammar) -> str:
        """Adds the rules of all blocks of calls of a reply, without text between them, and returns the symbol."""
        style = _STYLES[tools.style]
        block = self._block(tools)
        if style.array or not tools.parallel:
            return block
        self.rules.append(f"blocks: {block} ({literal(style.between)} {block})*")
        return "blocks"

    def _text_and_calls(self, tools: ToolGrammar, reasoning: ReasoningGrammar | None) -> str:
        """Adds the rules of free text with calls in it, and returns the symbol."""
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
        """Returns the right side of a rule for text that may have tags of the vocabulary in it, such as <citations>."""
        others = sorted(token_id for text, token_id in self.token_ids.items() if text not in without)
        return f"{terminal} (<[{','.join(map(str, others))}]> {terminal})*" if others else terminal

    def _block(self, tools: ToolGrammar, *, opened: bool = False) -> str:
        """Adds the rules of one block of calls, and returns the symbol. If `opened` is true, the block's opening tag
        is a part of what stands before it."""
        style = _STYLES[tools.style]
        names = [self._call(number, function) for number, function in enumerate(tools.functions)]
        self.rules.append(f"call: {' | '.join(names)}")
        more = f" ({literal(style.between)} call)*" if style.array and tools.parallel else ""
        start = "" if opened else Tag.of(style.start, self.token_ids).symbol + " "
        end = Tag.of(style.end, self.token_ids).symbol
        self.rules.append(f"block: {start}{literal(style.opening)} call{more} {literal(style.closing)} {end}")
        return "block"

    def _call(self, number: int, function: Function) -> str:
        """Adds the rules of a call of one function, and returns the symbol."""
        if function.name in self.unchecked:
            schema = any_arguments()
        else:
            schema = prepare_arguments(function.parameters, strict=function.strict, param=function.param)
        before = f'{{"name": {json.dumps(function.name, ensure_ascii=False)}, "arguments": '
        self.rules.append(f"call{number}: {literal(before)} arguments{number} {literal('}')}")
        self.rules.append(f"arguments{number}: {inline(schema, spaced=True)}")
        return f"call{number}"
