"""Measures xgrammar for the program `benchmarks.cpu.grammar`: compiles JSON schemas and processes the tokens of valid
instances.

The program imports xgrammar and no module of this project. It reads a JSON object from its standard input: the path of
the tokenizer.json, the size of the vocabulary, the ids of the end tokens, and a list of (schema, token ids). It prints
one line of JSON with the version of xgrammar and times in microseconds.
"""

# Pyright, a type checker, reports errors here because xgrammar is not installed where the types are checked. The
# settings below turn these reports off. pyright: reportMissingImports=false, reportUnknownVariableType=false,
# reportUnknownMemberType=false

from __future__ import annotations

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import xgrammar  # pyright: ignore[reportMissingImports]


def main() -> None:
    given: dict[str, Any] = json.load(sys.stdin)
    vocabulary = [""] * given["vocab_size"]
    content = json.loads(Path(given["tokenizer"]).read_text(encoding="utf-8"))
    for token, token_id in content["model"]["vocab"].items():
        vocabulary[token_id] = token
    for entry in content["added_tokens"]:
        vocabulary[entry["id"]] = entry["content"]
    info = xgrammar.TokenizerInfo(
        vocabulary,
        vocab_type=xgrammar.VocabType.BYTE_FALLBACK,
        vocab_size=len(vocabulary),
        stop_token_ids=list(given["eos"]),
    )
    mask = xgrammar.allocate_token_bitmask(1, len(vocabulary))
    compile_times: list[float] = []
    token_times: list[float] = []
    for schema, tokens in given["work"]:
        compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)
        start = time.perf_counter()
        compiled = compiler.compile_json_schema(json.dumps(schema), any_whitespace=False, separators=(",", ":"))
        matcher = xgrammar.GrammarMatcher(compiled)
        matcher.fill_next_token_bitmask(mask)
        compile_times.append((time.perf_counter() - start) * 1e6)
        for token in tokens:
            start = time.perf_counter()
            matcher.fill_next_token_bitmask(mask)
            accepted = matcher.accept_token(token)
            token_times.append((time.perf_counter() - start) * 1e6)
            if not accepted:
                raise SystemExit(f"xgrammar refuses token {token} of {tokens} under {schema}")
    print(json.dumps({"version": version("xgrammar"), "compile": compile_times, "token": token_times}))


if __name__ == "__main__":
    main()
