"""Writes docs/structured-outputs.md: which schemas of the JSON-Schema-Test-Suite are accepted, and which keywords are
refused.

python -m tools.schema_suite                       writes the page
python -m tools.schema_suite --check               fails where the page and the server differ
python -m tools.schema_suite --functions FILE ...  prints the share of accepted functions in files of the Berkeley
                                                   Function-Calling Leaderboard
"""

from __future__ import annotations

import argparse
import json
import lzma
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, cast

import llguidance

from jamba_server.engine.errors import RequestRejected
from jamba_server.server.text.grammars.builder import GrammarBuilder
from jamba_server.server.text.grammars.checker import verdict
from jamba_server.server.text.grammars.compile_check import Allowance, Outcome
from jamba_server.server.text.grammars.string_formats import BUILT_IN, PATTERNS
from jamba_server.server.text.grammars.types import OutputFormat, ToolGrammar

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "structured-outputs.md"
SUITE = ROOT / "tests" / "data" / "json-schema" / "test-suite.jsonl.xz"
# The tags of tool calls and of reasoning that the class `ByteTokenizer` has as single tokens, with their token ids.
TAGS = {
    tag: 257 + number
    for number, tag in enumerate(
        ("<tool_call>", "</tool_call>", "<tool_calls>", "</tool_calls>", "<think>", "</think>", "<citations>")
    )
}
EOS = 256
INTRODUCTION = """# Structured outputs

<!-- `python -m tools.schema_suite` writes this page. -->

The fields below make the content of a reply follow a grammar. Before each token, the library llguidance computes which
tokens the grammar allows.

| form of the content | OpenAI's field | vLLM's field | vLLM's older field |
| --- | --- | --- | --- |
| any JSON object | `response_format` `{"type": "json_object"}` | `structured_outputs.json_object` | |
| JSON of a schema | `response_format` `{"type": "json_schema", ...}` | `structured_outputs.json` | `guided_json` |
| a regular expression | | `structured_outputs.regex` | `guided_regex` |
| one of several strings | | `structured_outputs.choice` | `guided_choice` |
| a grammar in Lark's form | | `structured_outputs.grammar` | `guided_grammar` |

The reasoning that some models write before the content is not restricted.

## How exactly a schema is followed

- A schema that the server accepts is enforced exactly, whether `strict` is true or not. A keyword that cannot be
  enforced is an error with status 400, which names the keyword and its path.
- JSON has no optional white space. Properties come in the order in which the schema defines them. Properties that
  the schema only requires, and then all others, follow.
- The keyword `format` is enforced for strings. Two kinds of valid strings are never generated: leap seconds at time
  offsets other than zero, and host names with Punycode labels.
- If an object in the schema has both named properties and others, no control characters are generated in strings.
- Numbers in a schema must be 0, or between 1e-6 and 2**53 in absolute value. References must point into the same
  schema.
- Each schema is checked in a separate process for at most one second of CPU time. A schema that takes longer is an
  error.

## Tools

- With `tool_choice` "required" or a function's name, the reply consists only of calls. With "auto", the reply may be
  text, but whenever it has the opening tag of a call, a valid call follows. If the request names a function, OpenAI's
  APIs give exactly one call. In Anthropic's API, `disable_parallel_tool_use` decides about that.
- Calls have the white space of the model's chat template, with a space after each comma and colon, because the models
  were trained with calls in this form.
- Type names such as `dict`, `float` or `tuple` are translated to those of JSON Schema. If an object lists properties,
  no other properties are allowed, unless the schema says otherwise.
- A function without a schema, or with an empty list of properties, has no arguments.
- The schema of a function with `strict` true is followed exactly or refused. For other functions, keywords that are
  malformed or cannot be enforced are left out, and `oneOf` allows what `anyOf` allows. If a schema cannot be enforced
  at all, any JSON object is allowed. The header `X-Warning` names the functions and the places in their schemas.
"""


class ByteTokenizer:
    """A tokenizer whose vocabulary has all bytes, an end token and the tags of tool calls. It has the attributes that
    llguidance requires of a tokenizer."""

    eos_token_id = EOS
    bos_token_id = None
    tokens = tuple([bytes([byte]) for byte in range(256)] + [b"<eos>"] + [tag.encode() for tag in TAGS])
    special_token_ids = (EOS, *TAGS.values())

    def __call__(self, text: bytes) -> list[int]:
        return list(text)


@cache
def byte_tokenizer() -> llguidance.LLTokenizer:
    wrapper = llguidance.TokenizerWrapper(ByteTokenizer())
    return llguidance.LLTokenizer(wrapper, n_vocab=len(ByteTokenizer.tokens), slices=[])


class CheckHere:
    """Checks whether llguidance can compile a grammar. It compiles in this process and not in a child process, which is
    acceptable because the schemas of a test suite are known to be harmless."""

    def outcome(self, grammar: str, allowance: Allowance | None = None) -> Outcome:
        return Outcome(verdict(grammar, byte_tokenizer()))

    def close(self) -> None:
        pass


def builder() -> GrammarBuilder:
    return GrammarBuilder(CheckHere(), TAGS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Function:
    """A function that a model may call, as a request would declare it."""

    name: str
    parameters: dict[str, Any] = field(default_factory=dict[str, Any])
    strict: bool = False
    param: str = "tools"


def groups(draft: str = "draft2020-12") -> Iterator[dict[str, Any]]:
    """Yields the test groups of the JSON-Schema-Test-Suite. Each group has a schema, and values that are valid or
    invalid under this schema."""
    with lzma.open(SUITE, "rt", encoding="utf-8") as lines:
        for line in lines:
            group = json.loads(line)
            if group["draft"] == draft:
                yield group


def functions(path: Path) -> Iterator[Function]:
    """Yields the functions of a file of the Berkeley Function-Calling Leaderboard."""
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            for function in json.loads(line)["function"]:
                yield Function(name=function["name"], parameters=function["parameters"])


def refused_keyword(schema: Any) -> str | None:
    """Returns the keyword for which the server refuses the schema, "no value" for a schema that allows none, or None if
    the server accepts the schema."""
    try:
        builder().build(OutputFormat(kind="json_schema", value=schema))
    except RequestRejected as error:
        message = str(error)
        if "allows no value" in message:
            return "no value"
        found = re.search(r"keyword `([^`]+)`", message) or re.search(r"#/(?:\S*/)?([^\s/]+) ", message)
        return found[1] if found else message
    return None


def refuses(function: Function, *, strict: bool) -> bool:
    one = Function(name=function.name, parameters=function.parameters, strict=strict)
    try:
        builder().build(None, ToolGrammar(functions=(one,), mode="required", style="hermes"))
    except RequestRejected:
        return True
    return False


def rendered() -> str:
    """Returns the text of docs/structured-outputs.md."""
    fates = [refused_keyword(group["schema"]) for group in groups()]
    refused = Counter(fate for fate in fates if fate is not None)
    accepted = fates.count(None)
    formats = ", ".join(f"`{name}`" for name in sorted(BUILT_IN | PATTERNS.keys()))
    rows = [f"| {_reason(keyword)} | {number} |" for keyword, number in sorted(refused.items(), key=_most_first)]
    lines = [
        INTRODUCTION,
        "## What is accepted",
        "",
        f"Of the {len(fates)} schemas of the JSON-Schema-Test-Suite (draft 2020-12 with its optional parts), "
        f"{accepted} are accepted ({100 * accepted / len(fates):.0f} %).",
        "For each of them, the tests check that the grammar accepts every valid instance and no invalid one.",
        f"The formats are {formats}.",
        "",
        "| refused because of | schemas of the suite |",
        "| --- | --- |",
        *rows,
        "",
    ]
    return "\n".join(lines)


def _most_first(row: tuple[str, int]) -> tuple[int, str]:
    return -row[1], row[0]


def _reason(keyword: str) -> str:
    return "no value is allowed" if keyword == "no value" else f"`{keyword}`"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail where the page is out of date")
    parser.add_argument("--functions", nargs="+", type=Path, metavar="FILE", help="files of functions to try instead")
    options = parser.parse_args()
    if options.functions:
        tried = [function for path in cast("list[Path]", options.functions) for function in functions(path)]
        for strict in (False, True):
            accepted = sum(not refuses(function, strict=strict) for function in tried)
            print(f"strict {strict}: {accepted} of {len(tried)} functions are accepted")
    elif not options.check:
        PAGE.write_text(rendered(), encoding="utf-8")
    elif PAGE.read_text(encoding="utf-8") != rendered():
        sys.exit("docs/structured-outputs.md is out of date: run python -m tools.schema_suite")


if __name__ == "__main__":
    main()
