"""Code that all scripts of this folder use. Each script tries one client library on a running server.

A script runs in an environment that has the library but not this project. It gets the address of the server in the
environment variable URL, and prints one line of JSON for each check.
"""

import json
import os
import traceback
from collections.abc import Callable

URL = os.environ["URL"]  # the server's base URL, without a slash at its end
MODEL = "jamba-demo"
MAX_TOKENS = 128
QUESTION = "Tell me a story about a dog."

# The JSON schema that is used both for the arguments of a tool and for replies in JSON. It allows only a few short
# values, so that even a very small model completes the JSON.
SCHEMA = {
    "type": "object",
    "properties": {"room": {"type": "string", "enum": ["kitchen", "hall"]}, "on": {"type": "boolean"}},
    "required": ["room", "on"],
    "additionalProperties": False,
}


def check(name: str, work: Callable[[], object]) -> None:
    """Calls the function `work`, and prints one line of JSON that says whether it raised an exception."""
    try:
        work()
        error = ""
    except BaseException as exc:
        traceback.print_exc()
        error = f"{type(exc).__name__}: {exc}"[:300]
    print(json.dumps({"check": name, "error": error}), flush=True)


def check_arguments(arguments: object) -> None:
    """Raises AssertionError if the arguments of a tool call, or a reply, do not match SCHEMA."""
    assert isinstance(arguments, dict), arguments
    assert set(arguments) == {"room", "on"}, arguments
    assert arguments["room"] in ("kitchen", "hall") and arguments["on"] in (True, False), arguments
