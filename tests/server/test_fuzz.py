"""Requests that schemathesis derives from the server's own OpenAPI document."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.server.conftest import MakeBench

schemathesis = pytest.importorskip("schemathesis")


@pytest.mark.filterwarnings("default")  # schemathesis and hypothesis use what their own dependencies deprecate
def test_no_derived_request_breaks_the_description(make_bench: MakeBench, tmp_path: Path) -> None:
    from benchmarks.http.fuzz import fuzz

    schema: Any = schemathesis.openapi.from_asgi("/openapi.json", make_bench(data_dir=str(tmp_path)).app)
    findings = fuzz(schema, cases=200, random_seed=1)
    assert findings.failures == {}
    assert findings.num_cases > 100
    assert findings.statuses[200] > 20
    assert findings.statuses[400] > 20
