"""Draws comments and docstrings of this project at random, for a reader who judges whether each is clear at first
reading.

    python tools/sample_comments.py [--number 10] [--draws 3] [--seed COMMIT]

The seed is the commit that is checked out, so nobody can choose the sample. Comments on consecutive lines are joined.
Only the first paragraph of a docstring is shown. Markers for tools (`# noqa`, `# type:`, `# fmt:`) do not count.
"""

from __future__ import annotations

import argparse
import ast
import io
import random
import re
import subprocess
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("src", "server", "engine", "kernels", "benchmarks", "tools")
CPP_COMMENT = re.compile(r"(?:^[ \t]*//[^\n]*\n)+|//[^\n]*", re.MULTILINE)
TOOL_MARKER = re.compile(r"#\s*(noqa|type:|pyright|fmt:|ruff)")
SHORTEST = 15  # comments with fewer characters than this are left out


def python_comments(source: str) -> Iterator[tuple[int, str]]:
    """Yields (line, text) for each comment in Python source. Comments on consecutive lines are joined."""
    lines: dict[int, tuple[str, bool]] = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and not TOOL_MARKER.match(token.string):
            alone = token.line.lstrip().startswith("#")
            lines[token.start[0]] = (token.string.lstrip("# "), alone)
    for number, (text, alone) in lines.items():
        if alone and lines.get(number - 1, ("", False))[1]:
            continue  # this line continues a comment that began on an earlier line
        following = number + 1
        while alone and lines.get(following, ("", False))[1]:
            text += " " + lines[following][0]
            following += 1
        yield number, text


def docstrings(source: str) -> Iterator[tuple[int, str]]:
    """Yields (line, first paragraph) for each docstring of a module, class or function."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield node.body[0].lineno, " ".join(text.split("\n\n")[0].split())


def cpp_comments(source: str) -> Iterator[tuple[int, str]]:
    """Yields (line, text) for each `//` comment in C++ source. Comments on consecutive lines are joined."""
    for match in CPP_COMMENT.finditer(source):
        text = " ".join(line.strip().lstrip("/ ") for line in match[0].splitlines())
        yield source.count("\n", 0, match.start()) + 1, text


def all_comments() -> list[str]:
    """Returns every comment and docstring in FOLDERS as "path:line: text", in the order of the paths."""
    found: list[str] = []
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix not in (".py", ".h", ".cpp", ".inl") or not path.is_file():
                continue
            source = path.read_text(encoding="utf-8")
            if path.suffix == ".py":
                comments = sorted([*python_comments(source), *docstrings(source)])
            else:
                comments = list(cpp_comments(source))
            name = path.relative_to(ROOT)
            found += [f"{name}:{line}: {text}" for line, text in comments if len(text) >= SHORTEST]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--number", type=int, default=10, help="number of comments in a draw")
    parser.add_argument("--draws", type=int, default=3, help="number of draws")
    parser.add_argument("--seed", help="seed to use instead of the commit that is checked out")
    arguments = parser.parse_args()
    head = ["git", "rev-parse", "HEAD"]
    seed = arguments.seed or subprocess.run(head, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    comments, source = all_comments(), random.Random(seed)
    print(f"{len(comments)} comments and docstrings, seed {seed}")
    for draw in range(arguments.draws):
        print(f"\nDraw {draw + 1}")
        print(*source.sample(comments, min(arguments.number, len(comments))), sep="\n")


if __name__ == "__main__":
    main()
