"""Translates regular expressions to the syntax of Rust's crate `regex-syntax`, which llguidance reads.

JSON Schema's patterns have the syntax and the meaning of ECMA-262. Most patterns mean the same in Rust; this module
rewrites the parts that do not.
"""

from __future__ import annotations

import re

# The characters that `\s` matches in ECMA-262: white space and line terminators. In Rust, `\s` also matches U+0085 and
# does not match U+FEFF.
_SPACE = r"\t\n\x0B\f\r \u{A0}\u{1680}\u{2000}-\u{200A}\u{2028}\u{2029}\u{202F}\u{205F}\u{3000}\u{FEFF}"
# The characters that a dot matches in ECMA-262; in Rust a dot matches everything except "\n".
_ANY = r"[^\n\r\u{2028}\u{2029}]"
_CONTROL = re.compile(r"c([A-Za-z])")
_LOOKS_AROUND = re.compile(r"(?<!\\)(?:\\\\)*(?:\(\?<?[=!]|\\[bBk1-9])")
_CLASSES = {
    "s": (f"[{_SPACE}]", _SPACE),
    "S": (f"[^{_SPACE}]", f"[^{_SPACE}]"),
    "d": ("[0-9]", "0-9"),
    "D": ("[^0-9]", "[^0-9]"),
    "w": ("[0-9A-Za-z_]", "0-9A-Za-z_"),
    "W": ("[^0-9A-Za-z_]", "[^0-9A-Za-z_]"),
}


def from_ecma(pattern: str) -> str:
    """Translates `pattern`, a regular expression of ECMA-262 (JavaScript), to a Rust regular expression that finds the
    same texts.

    Syntax that Rust does not have, such as a look-ahead, is left as it is; llguidance refuses it.
    """
    return "".join(_tokens(pattern, dot=_ANY))


def looks_around(pattern: str) -> bool:
    """Returns whether a pattern has a look-around, a word boundary or a back-reference, which llguidance refuses."""
    return _LOOKS_AROUND.search(pattern) is not None


def for_full_match(pattern: str) -> str:
    """Returns a Rust regular expression for the texts that `pattern` matches as a whole, from the first character to
    the last.

    The anchors ^ and $ at the ends of an alternative are removed. They are redundant if the whole text must match, and
    llguidance refuses them.
    """
    tokens = _tokens(pattern, dot=".")
    depth = 0
    kept: list[str] = []
    for position, token in enumerate(tokens):
        depth += (token == "(") - (token == ")")
        begins = position == 0 or tokens[position - 1] == "|"
        ends = position == len(tokens) - 1 or tokens[position + 1] == "|"
        if depth == 0 and ((token == "^" and begins) or (token == "$" and ends)):
            continue
        kept.append(token)
    return "".join(kept)


def _tokens(pattern: str, *, dot: str) -> list[str]:
    """Splits the pattern into its characters, escapes and quantifiers, each translated to Rust's syntax.

    A "?" that makes a quantifier lazy is removed. It only changes which match is found first, not which texts match.
    """
    tokens: list[str] = []
    position, in_class = 0, False
    while position < len(pattern):
        character = pattern[position]
        if character == "\\":
            token, position = _escape(pattern, position, in_class)
            tokens.append(token)
            continue
        position += 1
        if in_class:
            in_class = character != "]"
            tokens.append("\\" + character if character in "[&~" else character)
        elif character == "[":
            in_class = True
            negated = pattern.startswith("^", position)
            tokens.append("[^" if negated else "[")
            position += negated
        elif character == ".":
            tokens.append(dot)
        elif character in "*+?" or (character == "{" and _quantifier(pattern, position - 1)):
            end = position if character != "{" else pattern.index("}", position) + 1
            tokens.append(pattern[position - 1 : end])
            position = end + pattern.startswith("?", end)
        else:
            position, token = _group(pattern, position, character)
            tokens.extend(token)
    return tokens


def _group(pattern: str, position: int, character: str) -> tuple[int, list[str]]:
    """Reads an ordinary character or the beginning of a group, such as "(?:", in which the "?" is not a quantifier.
    Returns the position after what was read, and its tokens."""
    if character == "(" and pattern.startswith("?", position):
        return position + 1, ["(", "?"]
    return position, [character]


def _quantifier(pattern: str, position: int) -> bool:
    return re.compile(r"\{\d+(,\d*)?\}").match(pattern, position) is not None


def _escape(pattern: str, position: int, in_class: bool) -> tuple[str, int]:
    """Returns the translation of the escape at `position` and the position after it."""
    letter = pattern[position + 1 : position + 2]
    if control := _CONTROL.match(pattern, position + 1):
        return f"\\x{ord(control[1]) % 32:02X}", position + 3
    if letter in _CLASSES:
        return _CLASSES[letter][in_class], position + 2
    if letter == "/":
        return "/", position + 2
    if letter == "0" and not pattern[position + 2 : position + 3].isdigit():
        return r"\x00", position + 2
    return pattern[position : position + 2], position + 2
