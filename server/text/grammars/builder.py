"""The class `GrammarBuilder` builds the grammar that a reply must follow, and checks that the engine can compile the
grammar."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, Protocol

from jamba_server.engine.errors import RequestRejected
from jamba_server.engine.validation import MAX_GRAMMAR_CHARS
from jamba_server.server.text.grammars.compile_check import Allowance, CompileCheck, Outcome
from jamba_server.server.text.grammars.explain import explain
from jamba_server.server.text.grammars.json_schema import inline, prepare
from jamba_server.server.text.grammars.reply import build_grammar
from jamba_server.server.text.grammars.tool_schemas import prepare_arguments
from jamba_server.server.text.grammars.types import OutputFormat, ReasoningGrammar, ToolGrammar
from jamba_server.server.text.tokenizer import Tokenizer

_SURROGATE: Final = re.compile("[\ud800-\udfff]")


class Check(Protocol):
    """The interface of an object that finds out whether llguidance, the library that follows grammars, can compile a
    grammar."""

    def outcome(self, grammar: str, allowance: Allowance | None = None) -> Outcome: ...
    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class GrammarBuilder:
    """Builds grammars for the replies of one model. `token_ids` maps those tags that are single tokens of its
    vocabulary, such as "<tool_call>", to their ids. `allowance` is the CPU time that the checks may take; if it is
    None, each check has an allowance of its own."""

    check: Check
    token_ids: Mapping[str, int]
    allowance: Allowance | None = None

    def within(self, allowance: Allowance) -> GrammarBuilder:
        """Returns a builder for one request, whose checks may take the CPU time `allowance` together. Its method
        `build` raises OverAllowance if that is not enough and the allowance is not final."""
        return replace(self, allowance=allowance)

    def build(
        self,
        format: OutputFormat | None = None,
        tools: ToolGrammar | None = None,
        reasoning: ReasoningGrammar | None = None,
        *,
        leading_space: bool = False,
        left_out: dict[str, list[str]] | None = None,
    ) -> str:
        """Returns the grammar of a reply in the form that the engine takes, or "" if every reply is allowed.

        If llguidance refuses the argument schema of a tool function that is not strict, the grammar allows any JSON
        object as the arguments of this function. If `left_out` is given, it gets, for the names of such functions, the
        paths of the parts of their schemas that the grammar does not enforce. The method blocks while another process
        compiles the grammar, for up to a second or two.

        Raises RequestRejected for a format or a strict function that cannot be enforced, and for a grammar whose
        compilation takes too long.
        """
        unchecked: frozenset[str] = frozenset()
        for _ in range(2):
            grammar = build_grammar(
                format,
                tools,
                reasoning,
                token_ids=self.token_ids,
                leading_space=leading_space,
                unchecked=unchecked,
                left_out=left_out,
            )
            if not grammar:
                return ""
            outcome = self._outcome(grammar, format)
            if not outcome.error:
                return grammar
            loose = self._refused_functions(tools) if tools is not None and not outcome.too_complex else frozenset()
            if not loose - unchecked:
                break
            unchecked = loose
        raise self._error(outcome, format, tools)

    def close(self) -> None:
        """Ends the process that compiles grammars."""
        self.check.close()

    def _outcome(self, grammar: str, format: OutputFormat | None) -> Outcome:
        param = "tools" if format is None else format.param
        if len(grammar) > MAX_GRAMMAR_CHARS:
            raise RequestRejected(
                f"The grammar of the reply has {len(grammar)} characters; the limit is {MAX_GRAMMAR_CHARS}.",
                param=param,
            )
        if _SURROGATE.search(grammar):
            raise RequestRejected("It holds half of a surrogate pair, which is not valid Unicode.", param=param)
        return self.check.outcome(grammar, self.allowance)

    def _refused_functions(self, tools: ToolGrammar) -> frozenset[str]:
        """Returns the names of the tool functions that are not strict and whose argument schemas llguidance refuses."""
        return frozenset(
            function.name
            for number, function in enumerate(tools.functions)
            if not function.strict and self._function_outcome(tools, number).error
        )

    def _function_outcome(self, tools: ToolGrammar, number: int) -> Outcome:
        """Checks a grammar that allows only calls of the tool function with the index `number`. Returns the result of
        the check."""
        alone = replace(tools, functions=(tools.functions[number],), mode="required", parallel=False)
        return self.check.outcome(build_grammar(None, alone, token_ids=self.token_ids), self.allowance)

    def _error(self, outcome: Outcome, format: OutputFormat | None, tools: ToolGrammar | None) -> RequestRejected:
        """Returns the error for a request whose grammar cannot be used. The error names the part of the request that is
        the reason."""
        if format is not None:
            alone = self.check.outcome(build_grammar(format, None, token_ids=self.token_ids), self.allowance)
            if alone.error:
                return self._format_error(alone, format)
        for number, function in enumerate(tools.functions if tools is not None else ()):
            assert tools is not None
            alone = self._function_outcome(tools, number)
            if alone.error:
                return self._schema_error(alone, dict(function.parameters), function.param, _arguments)
        return RequestRejected(
            f"The grammar of the whole reply is refused: {_first_line(outcome.error)}.",
            param="tools" if format is None else format.param,
        )

    def _format_error(self, outcome: Outcome, format: OutputFormat) -> RequestRejected:
        if format.kind == "json_schema":
            return self._schema_error(outcome, format.value, format.param, _content)
        names = {"regex": "regular expression", "choice": "list of choices", "lark": "grammar", "json_object": "format"}
        return RequestRejected(
            f"The {names[format.kind]} is refused: {_first_line(outcome.error)}.", param=format.param
        )

    def _schema_error(
        self, outcome: Outcome, schema: Any, param: str, prepared: Callable[[dict[str, Any]], dict[str, Any]]
    ) -> RequestRejected:
        if outcome.too_complex:
            return RequestRejected(f"The schema is too complex: {outcome.error}.", param=param)

        def fails(part: dict[str, Any]) -> bool:
            try:
                return bool(self.check.outcome(f"start: {inline(prepared(part))}\n", self.allowance).error)
            # This part of the schema cannot be checked alone, because it refers to other parts of the schema.
            except RequestRejected:
                return False

        return explain(outcome.error, schema, param=param, fails=fails)


def grammar_builder(tokenizer: Tokenizer) -> GrammarBuilder:
    """Returns a builder of grammars for the model that has this tokenizer."""
    return GrammarBuilder(CompileCheck(tokenizer.to_json, eos_token_id=tokenizer.eos_token_id or 0), tokenizer.tags)


def _content(part: dict[str, Any]) -> dict[str, Any]:
    return prepare(part, param="")


def _arguments(part: dict[str, Any]) -> dict[str, Any]:
    return prepare_arguments(part, param="")


def _first_line(error: str) -> str:
    return error.splitlines()[0][:300].rstrip(". ")
