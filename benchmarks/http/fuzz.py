"""Sends valid and invalid requests to a server. The library schemathesis derives the requests from the server's OpenAPI
document.

    python -m benchmarks.http.fuzz [--cases 10000] [--seed 0] [--minutes 30] [-- flags of `jamba serve`]

The program starts `jamba serve` with the demonstration checkpoint. The requirements are: no reply has a status of 500
or above; each reply has a status, a media type and a body that the document describes; a request that violates the
document is refused; and no process of the server ends. The program prints the number of replies for each status, and
each kind of failure once.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import jsonschema
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.core.failures import FailureGroup
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

from benchmarks.http.processes import processes
from benchmarks.http.serving import running_server

CHECKS: Any = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    negative_data_rejection,
]
CASES_WITHOUT_BODY = 2  # number of test requests to an endpoint without a request body, because there is little to vary
BATCH_LINE = b'{"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "Hi"}}\n'
SERVER_FLAGS = ["--threads", "1", "--max-model-len", "512"]
START_TIMEOUT = 300.0


@dataclass
class Findings:
    """The number of replies for each status, and the failures: the text of each kind of failure, and how often it
    occurred."""

    statuses: Counter[int] = field(default_factory=Counter[int])
    failures: Counter[str] = field(default_factory=Counter[str])

    @property
    def num_cases(self) -> int:
        return self.statuses.total()


def fuzz(schema: Any, *, cases: int, random_seed: int, until: float = float("inf")) -> Findings:
    """Sends about `cases` requests, half of them invalid, to the endpoints of an OpenAPI document that schemathesis has
    loaded.

    Stops early when `time.monotonic()` exceeds `until`.
    """
    operations = [result.ok() for result in schema.get_all_operations()]
    with_body = [operation for operation in operations if operation.body]
    findings = Findings()
    file_id = _upload(schema)
    rest = cases - CASES_WITHOUT_BODY * (len(operations) - len(with_body))
    for operation in operations:
        if operation not in with_body:
            check = _checker(findings, until, file_id)
            _run(operation, GenerationMode.POSITIVE, CASES_WITHOUT_BODY, random_seed, check)
            continue
        for mode in GenerationMode:
            number = max(1, rest // (2 * len(with_body)))
            _run(operation, mode, number, random_seed, _checker(findings, until, file_id))
    return findings


def _upload(schema: Any) -> str:
    """Uploads a file with the request of a batch, and returns its id."""
    body = {"purpose": "batch", "file": BATCH_LINE}
    reply = schema["/v1/files"]["POST"].Case(body=body, media_type="multipart/form-data").call()
    return json.loads(reply.content)["id"]


def _checker(findings: Findings, until: float, file_id: str) -> Callable[[Any], None]:
    def check(case: Any) -> None:
        if time.monotonic() > until:
            return
        if case.operation.path == "/v1/batches" and _is_valid(case):
            case.body["input_file_id"] = file_id  # a random text is never the id of a file
        response = case.call()
        findings.statuses[response.status_code] += 1
        # schemathesis does not know that a body which is too large (413) is refused, too.
        refused = 400 <= response.status_code < 500
        invalid = not refused and not _is_valid(case)
        # The status 504 is the answer to requests whose own field `timeout` is too short.
        in_time = response.status_code != 504
        # schemathesis compares each event of a stream with the description of the whole body.
        is_stream = response.headers.get("content-type", [""])[0].startswith("text/event-stream")
        unfit = {
            negative_data_rejection: not invalid,
            not_a_server_error: not in_time,
            response_schema_conformance: is_stream,
        }
        checks = [check for check in CHECKS if not unfit.get(check, False)]
        try:
            case.validate_response(response, checks=checks)
        except FailureGroup as group:
            for failure in group.exceptions:
                findings.failures[f"{case.operation.label}: {failure}"] += 1

    return check


def _is_valid(case: Any) -> bool:
    """Returns whether the body of a request follows the OpenAPI document. schemathesis takes some such bodies for
    invalid: those in which it replaced a text by null where the document allows both, and forms in which it replaced a
    value by a list with this value, which is sent in the same way, or by an empty list, which is not sent."""
    document = case.operation.schema.raw_schema
    body = document["paths"][case.operation.path][case.operation.method].get("requestBody")
    if body is None or case.media_type not in body["content"]:
        return False
    schema = {**body["content"][case.media_type]["schema"], "components": document["components"]}
    sent = case.body
    if case.media_type == "multipart/form-data" and isinstance(sent, dict):
        sent = {name: _in_form(value) for name, value in sent.items() if value != []}
    return jsonschema.Draft202012Validator(schema).is_valid(sent)


def _in_form(value: Any) -> Any:
    """Returns the value of a form's field as JSON has it: a text for a file, and the value alone for a list of one."""
    if isinstance(value, list) and len(value) == 1:
        return _in_form(value[0])
    return value if value is None or isinstance(value, (str, int, float, list, dict)) else ""


def _run(operation: Any, mode: GenerationMode, number: int, random_seed: int, check: Callable[[Any], None]) -> None:
    @seed(random_seed)
    @settings(
        max_examples=number,
        database=None,
        deadline=None,
        suppress_health_check=cast("list[HealthCheck]", list(HealthCheck)),
        phases=[Phase.generate],
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def run(case: Any) -> None:
        check(case)

    # Hypothesis, a library for property-based tests, raises this error if every possible request is valid for the
    # endpoint, so that no invalid request can be made.
    with contextlib.suppress(Unsatisfiable):
        run()


def _main_processes() -> dict[str, int | None]:
    """Returns the process ids of the server and of its engine. Other processes come and go: those that render templates
    and compile grammars are replaced if they take too long."""
    found = processes()
    return {name: found.get(name) for name in ("http", "engine.process")}


def main() -> None:
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=2000, help="requests to send")
    parser.add_argument("--seed", type=int, default=0, help="seed of the requests")
    parser.add_argument("--minutes", type=float, default=60.0, help="minutes after which the program ends")
    flags = parser.parse_args(sys.argv[1:split])
    with (
        tempfile.TemporaryDirectory() as folder,
        running_server([*SERVER_FLAGS, "--data-dir", folder, *sys.argv[split + 1 :]], START_TIMEOUT) as (url, _),
    ):
        before, start = _main_processes(), time.monotonic()
        schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
        findings = fuzz(schema, cases=flags.cases, random_seed=flags.seed, until=start + 60 * flags.minutes)
        lost = _main_processes() != before
        seconds = time.monotonic() - start
    print(
        f"{findings.num_cases} cases in {seconds:.0f} s; replies by status: {dict(sorted(findings.statuses.items()))}"
    )
    for text, number in findings.failures.most_common():
        print(f"\n{number} x {text}")
    if findings.failures or lost:
        sys.exit(f"{len(findings.failures)} kinds of failures{'; a process has ended' if lost else ''}.")


if __name__ == "__main__":
    main()
