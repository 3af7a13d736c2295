"""What the engine says that a step computed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from jamba_server.engine.core import kind_of


@pytest.mark.parametrize(
    ("decodes", "kind"),
    [([True], "decode"), ([True, True], "decode"), ([True, False], "mixed"), ([False], "prefill")],
)
def test_the_kind_of_a_step(decodes: list[bool], kind: str) -> None:
    step: Any = SimpleNamespace(chunks=[SimpleNamespace(is_decode=decode) for decode in decodes])
    assert kind_of(step) == kind
