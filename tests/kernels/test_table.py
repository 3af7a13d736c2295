from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from jamba_server.kernels import table
from jamba_server.kernels.ops import Kernels
from jamba_server.kernels.reference import attention, bitmask, conv, linear, mamba, moe, norm, sample, scan, slots
from jamba_server.kernels.table import Implementation, KernelError, KernelUnavailable, TableRow


def reference_kernels() -> Kernels:
    """Written out, so that the type checker compares every reference with its protocol."""
    products = linear.Linear()
    update = scan.selective_state_update
    return Kernels(
        rms_norm=norm.rms_norm,
        causal_conv1d=conv.causal_conv1d,
        causal_conv1d_update=conv.causal_conv1d_update,
        selective_scan=scan.selective_scan,
        selective_state_update=update,
        write_kv=slots.write_kv,
        attention_prefill=attention.attention_prefill,
        attention_decode=attention.attention_decode,
        copy_slots=slots.copy_slots,
        compress_states=slots.compress_states,
        restore_states=slots.restore_states,
        silu_and_mul=moe.silu_and_mul,
        route_experts=moe.route_experts,
        run_experts=moe.RunExperts(),
        linear=products,
        sample=sample.sample,
        apply_bitmask=bitmask.apply_bitmask,
        mamba_decode=mamba.MambaDecode(conv.causal_conv1d_update, products, norm.rms_norm, update),
        names=dict.fromkeys(table.OPS, "reference"),
    )


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_reference_can_be_wished_for_as_a_whole(device: str) -> None:
    chosen, expected = table.select(device, {"all": "reference"}), reference_kernels()
    assert chosen.names == expected.names
    for op in table.OPS:
        wanted = getattr(expected, op)
        assert getattr(chosen, op) == wanted or type(getattr(chosen, op)) is type(wanted)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_op_ends_with_the_reference_and_names_are_unique(device: str) -> None:
    for op in table.OPS:
        names = [entry.name for entry in table.implementations(op, device)]
        assert names[-1] == "reference"
        assert len(set(names)) == len(names)
    assert {entry.op for entry in table.TABLE} == set(table.OPS)


def test_families_hold_known_ops() -> None:
    for ops in table.FAMILIES.values():
        assert set(ops) <= set(table.OPS)


def unavailable() -> Any:
    raise KernelUnavailable("needs a newer CPU")


def missing_package() -> Any:
    raise ModuleNotFoundError("No module named 'fast_kernels'")


def broken() -> Any:
    raise RuntimeError("a mistake in our own code")


def add(monkeypatch: pytest.MonkeyPatch, name: str, ops: tuple[str, ...], load: Callable[[], Any]) -> None:
    """Puts implementations for the CPU above what the table has."""
    entries = tuple(Implementation(op, name, ("cpu",), load) for op in ops)
    monkeypatch.setattr(table, "TABLE", entries + table.TABLE)


@pytest.fixture(autouse=True)
def _only_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:  # pyright: ignore[reportUnusedFunction]
    monkeypatch.setattr(table, "TABLE", tuple(entry for entry in table.TABLE if entry.name == "reference"))


def test_the_first_that_loads_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = object()
    add(monkeypatch, "fast", ("linear", "copy_slots"), lambda: fast)
    chosen = table.select("cpu", {})
    assert chosen.linear is fast
    assert chosen.copy_slots is fast
    assert chosen.names == {op: "fast" if op in ("linear", "copy_slots") else "reference" for op in table.OPS}
    assert table.select("cuda", {}).names["linear"] == "reference"


def test_a_preferred_one_that_cannot_load_is_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    add(monkeypatch, "fast", ("linear", "copy_slots"), unavailable)
    add(monkeypatch, "external", ("linear",), missing_package)
    with caplog.at_level(logging.WARNING):
        assert table.select("cpu", {}).names["linear"] == "reference"
    assert sorted(caplog.messages) == [
        "kernels: the implementation external of linear is skipped: No module named 'fast_kernels'",
        "kernels: the implementation fast of copy_slots, linear is skipped: needs a newer CPU",
    ]


def test_a_mistake_in_a_loader_is_not_taken_for_absence(monkeypatch: pytest.MonkeyPatch) -> None:
    add(monkeypatch, "fast", ("linear",), broken)
    with pytest.raises(RuntimeError, match="our own code"):
        table.select("cpu", {})


def test_no_implementation_left_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "TABLE", tuple(entry for entry in table.TABLE if entry.op != "linear"))
    add(monkeypatch, "fast", ("linear",), unavailable)
    with pytest.raises(KernelError, match=r"linear.*cpu.*fast.*needs a newer CPU"):
        table.select("cpu", {})


def test_the_narrower_wish_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    add(monkeypatch, "fast", table.OPS, object)
    wishes = {"causal_conv1d": "fast", "mamba": "reference", "all": "fast"}
    names = table.select("cpu", wishes).names
    assert {op for op, name in names.items() if name == "reference"} == {
        "causal_conv1d_update",
        "mamba_decode",
        "selective_scan",
        "selective_state_update",
    }


@pytest.mark.parametrize(
    ("wishes", "message"),
    [
        ({"scan": "reference"}, r"'scan' is neither.*selective_scan.*mamba"),
        ({"linear": "fastest"}, r"linear has no implementation 'fastest' for cpu; there are fast, reference"),
        ({"linear": ""}, r"linear has no implementation ''"),
        ({"linear": "fast"}, r"linear=fast cannot run on this machine: needs a newer CPU"),
        ({"moe": "fast"}, r"route_experts has no implementation 'fast'"),
    ],
)
def test_a_wish_that_cannot_be_met_is_an_error(
    wishes: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(monkeypatch, "fast", ("linear",), unavailable)
    with pytest.raises(KernelError, match=message):
        table.select("cpu", wishes)


def test_an_op_of_parts_is_loaded_with_those_that_were_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    add(monkeypatch, "fast", ("linear",), lambda: "fast linear")
    entry = Implementation("mamba_decode", "fast", ("cpu",), lambda *parts: parts, ("linear", "rms_norm"))
    monkeypatch.setattr(table, "TABLE", (entry, *table.TABLE))
    assert table.select("cpu", {}).mamba_decode == ("fast linear", norm.rms_norm)
    linear_by_reference = table.select("cpu", {"linear": "reference"})
    assert linear_by_reference.mamba_decode == (linear_by_reference.linear, norm.rms_norm)
    for entry in table.TABLE:
        assert all(table.OPS.index(part) < table.OPS.index(entry.op) for part in entry.parts)


def add_inexact(monkeypatch: pytest.MonkeyPatch, *ops: str) -> None:
    entries = tuple(Implementation(op, "rough", ("cpu",), object, batch_invariant=False) for op in ops)
    monkeypatch.setattr(table, "TABLE", entries + table.TABLE)


def test_exact_ones_go_first_and_inexact_ones_are_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    add(monkeypatch, "fast", ("linear", "run_experts"), object)
    add_inexact(monkeypatch, "linear", "copy_slots")
    for batch_invariant in (None, True):
        chosen = table.select("cpu", {}, batch_invariant)
        assert (chosen.names["linear"], chosen.names["copy_slots"]) == ("fast", "reference")
        assert chosen.batch_dependent_ops == ()
    fastest = table.select("cpu", {}, batch_invariant=False)
    assert (fastest.names["linear"], fastest.names["copy_slots"]) == ("rough", "rough")
    assert fastest.batch_dependent_ops == ("copy_slots", "linear", "mamba_decode")
    assert not caplog.messages


def test_without_an_exact_one_the_default_starts_and_exact_does_not() -> None:
    assert table.select("cpu", {}).batch_dependent_ops == ("run_experts", "linear", "mamba_decode")
    assert "sample" in table.select("cuda", {}).batch_dependent_ops
    with pytest.raises(KernelError, match="no batch-invariant implementation of run_experts runs on this cpu device"):
        table.select("cpu", {}, batch_invariant=True)
    wished = table.select("cpu", {"linear": "reference", "moe": "reference"}, batch_invariant=True)
    assert wished.batch_dependent_ops == ("run_experts", "linear", "mamba_decode")


def test_an_unknown_device_is_an_error() -> None:
    with pytest.raises(KernelError, match=r"'tpu'; there are some for cpu, cuda"):
        table.select("tpu", {})


def test_describe_says_what_would_run_and_why_not_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    add(monkeypatch, "fast", ("linear",), object)
    add(monkeypatch, "faster", ("linear",), unavailable)
    rows = table.describe("cpu")
    assert [row for row in rows if row.op == "linear"] == [
        TableRow("linear", "faster", "needs a newer CPU"),
        TableRow("linear", "fast", "selected"),
        TableRow("linear", "reference", "available", batch_invariant=False),
    ]
    add_inexact(monkeypatch, "linear")
    assert [row for row in table.describe("cpu") if row.op == "linear"][2:] == [
        TableRow("linear", "rough", "available", batch_invariant=False),
        TableRow("linear", "reference", "available", batch_invariant=False),
    ]
    assert [row.op for row in rows if row.status == "selected"] == list(table.OPS)


def test_importing_the_package_imports_no_torch() -> None:
    script = "import sys, kernels; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_the_module_prints_the_machine_and_the_table() -> None:
    command = [sys.executable, "-m", "jamba_server.kernels"]
    printed = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert set(printed) == {
        *("python", "torch", "platform", "cpu_flags", "cpu_level", "cpu_levels", "cpu_units", "cpu_amx", "threads"),
        *("cuda_devices", "kernels"),
    }
    assert printed["cpu_level"] is None or printed["cpu_level"] in printed["cpu_levels"]
    assert {row["op"] for row in printed["kernels"]["cpu"]} == set(table.OPS)
    assert {row["op"] for row in printed["kernels"]["cpu"] if row["status"] == "selected"} == set(table.OPS)
