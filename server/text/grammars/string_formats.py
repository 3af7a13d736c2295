"""Regular expressions for the values of JSON Schema's keyword `format`.

For some formats, llguidance has an expression of its own that allows invalid texts, such as February 30 as a date. This
module has stricter expressions for these formats. Some of the expressions here are narrower than the specification:
they do not allow leap seconds at time offsets other than zero, and Punycode labels in host names. A model has no reason
to write such texts, and regular expressions for them would be very large.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final


def _ipv6() -> str:
    """Returns a regular expression for an IPv6 address, following RFC 3986. At most one "::" may take the place of
    groups that are zero."""
    last = f"(?:{_GROUP}:{_GROUP}|{_IPV4})"  # matches the last 32 bits of the address
    forms = [f"(?:{_GROUP}:){{6}}{last}"]
    for after in range(5, -1, -1):  # the number of 16-bit groups between "::" and the last 32 bits of the address
        before = 5 - after
        head = f"(?:(?:{_GROUP}:){{0,{before - 1}}}{_GROUP})?" if before else ""
        forms.append(f"{head}::(?:{_GROUP}:){{{after}}}{last}")
    forms.append(f"(?:(?:{_GROUP}:){{0,5}}{_GROUP})?::{_GROUP}")
    forms.append(f"(?:(?:{_GROUP}:){{0,6}}{_GROUP})?::")
    return "(?:" + "|".join(forms) + ")"


_BYTE = r"(?:25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
_IPV4 = rf"{_BYTE}(?:\.{_BYTE}){{3}}"
_GROUP = "[0-9A-Fa-f]{1,4}"
_IPV6: Final = _ipv6()

_LEAP_YEAR = r"(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:[02468][048]|[13579][26])00)"
_DATE = (
    r"(?:[0-9]{4}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    rf"|02-(?:0[1-9]|1[0-9]|2[0-8]))|{_LEAP_YEAR}-02-29)"
)
_HOURS_MINUTES = "(?:[01][0-9]|2[0-3]):[0-5][0-9]"
_TIME = (
    rf"(?:{_HOURS_MINUTES}:[0-5][0-9](?:\.[0-9]+)?(?:[Zz]|[+-]{_HOURS_MINUTES})"
    r"|23:59:60(?:\.[0-9]+)?(?:[Zz]|[+-]00:00))"
)

# A label of a host name has at most 63 characters and no "-" at its beginning or end. Labels with "--" as third and
# fourth character are not allowed: they are Punycode, whose validity a regular expression cannot check.
_END, _INNER = "[0-9A-Za-z]", "[0-9A-Za-z-]"
_HOST_LABEL = f"{_END}(?:{_END}|{_INNER}{{1,2}}{_END}|{_INNER}(?:{_END}{_INNER}|-{_END}){_INNER}{{0,58}}{_END})?"
_ATOM = r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+"
_QUOTED = r'"(?:[\x20\x21\x23-\x5B\x5D-\x7E]|\\[\x20-\x7E])*"'
_DOMAIN = rf"{_HOST_LABEL}(?:\.{_HOST_LABEL})*"
_EMAIL = rf"(?:{_ATOM}(?:\.{_ATOM})*|{_QUOTED})@(?:{_DOMAIN}|\[{_IPV4}\]|\[IPv6:{_IPV6}\])"

_POINTER = r"(?:/(?:[^~/]|~[01])*)*"

# The formats for which llguidance's own expressions are used.
BUILT_IN: Final = frozenset({"duration", "ipv4", "uuid", "uri"})

PATTERNS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "date": _DATE,
        "time": _TIME,
        "date-time": f"{_DATE}[Tt]{_TIME}",
        "email": _EMAIL,
        "hostname": _DOMAIN,
        "ipv6": _IPV6,
        "json-pointer": _POINTER,
        "relative-json-pointer": f"(?:0|[1-9][0-9]*)(?:#|{_POINTER})",
    }
)

# The maximum number of characters of a text in a format, for formats whose regular expression does not limit the
# length.
MAX_LENGTHS: Final[Mapping[str, int]] = MappingProxyType({"hostname": 253})

# Formats of OpenAPI and pydantic that only say how a program uses the string. They allow every string.
UNCONSTRAINED: Final = frozenset(
    {"password", "binary", "float", "double", "decimal", "path", "file-path", "directory-path"}
)
