"""The applications, once for all tests of this folder."""

from __future__ import annotations

import pytest

from tests.conformance.served import Served, serve


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Served]:
    return {
        "jamba": serve(tmp_path_factory.mktemp("jamba"), "jamba-1.5"),
        "reasoning": serve(tmp_path_factory.mktemp("reasoning"), "reasoning"),
    }
