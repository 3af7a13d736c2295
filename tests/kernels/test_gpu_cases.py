"""What `benchmarks.gpu.check` runs on a GPU, at a tiny shape: the reference against itself, and triton interpreted."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import probe, tune
from benchmarks.gpu.cases import Case, Maker, Shape, check, groups
from benchmarks.gpu.compile import Elsewhere, compiling_only, shapes_alone
from benchmarks.gpu.predict import Ceilings
from benchmarks.gpu.sweep import config_of
from benchmarks.gpu.targets import Target
from benchmarks.gpu.tune import best_of, difference
from benchmarks.gpu.variants import Variant, applied
from jamba_server.kernels.table import OPS, select
from jamba_server.kernels.triton import interpreted

TINY = Shape(name="tiny", h=24, f=20, d=40, heads=4, kv_heads=2, z=16, experts=5, r=6, v=300, s=8)
REFERENCE = select("cpu", {"all": "reference"})


def cases() -> list[Case]:
    maker = Maker(TINY, torch.device("cpu"))
    groups = [maker.rows(5), maker.experts(5), maker.recurrence(3, 1), maker.recurrence(2, 7), maker.storage(32, 2)]
    return [*itertools.chain(*groups), *maker.sampling(3), *maker.attention(2, 1, 40), *maker.attention(2, 5, 40)]


def test_there_are_cases_of_every_op_and_they_agree_with_the_reference() -> None:
    found = cases()
    assert {case.op for case in found} == set(OPS)
    ours = select("cuda", {"all": "triton"}) if interpreted() else REFERENCE
    for case in found:
        assert check(case, ours, REFERENCE) <= case.tolerance, case.label
        assert case.bytes_moved(getattr(ours, case.op)(*case.prepare(ours))) > 0


@pytest.mark.parametrize(("shape", "missing"), [("mini", set[str]()), ("3b", {"route_experts", "run_experts"})])
def test_the_sweep_has_cases_of_every_op_of_a_model(shape: str, missing: set[str]) -> None:
    maker = Maker(Shape.of(shape, config_of(shape)), torch.device("meta"))
    assert {case.op for group in groups(maker) for case in group} == set(OPS) - missing


@pytest.mark.parametrize("factor", [1.05, torch.nan])
def test_an_error_is_found(factor: float) -> None:
    [case] = [case for case in cases() if case.op == "rms_norm"]
    norm: Any = REFERENCE.rms_norm
    wrong = replace(REFERENCE, rms_norm=lambda *args: tuple(part * factor for part in norm(*args)))
    assert not check(case, wrong, REFERENCE) <= case.tolerance


def test_the_probe_compares_tiles_bit_by_bit_in_tritons_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    if not interpreted():
        pytest.skip("it is for triton's interpreter")
    from jamba_server.kernels.triton.linear import Linear

    monkeypatch.setattr(probe, "ROWS", 70)
    monkeypatch.setattr(probe, "FEW", (1, 64))
    monkeypatch.setattr(probe, "CHAIN", 2)
    monkeypatch.setattr(probe, "CHAIN_SIZE", 40)
    assert probe.launch("cpu")["passed"]
    assert probe.dependent("cpu")["passed"]
    for name in ("bf16", "int8"):
        row = probe.tiles(name, "cpu", {"a rest": (20, 70)})
        assert (row["passed"], row["products"], row["different"]) == (True, 2, 0), row
    plain = Linear.__call__

    def wrong(self: Linear, x: torch.Tensor, weight: Any, bias: Any = None) -> torch.Tensor:
        return plain(self, x, weight, bias) * (1 + 2**-7 * (len(x) == 1))

    monkeypatch.setattr(Linear, "__call__", wrong)
    row = probe.tiles("bf16", "cpu", {"a rest": (20, 70)})
    assert (row["passed"], row["different"]) == (False, 1)
    assert row["largest_difference"] > 0


# What tunes them ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ["3b", "mini", "tiny"])
def test_what_is_tuned_is_named_once_and_can_be_tried(shape: str) -> None:
    pytest.importorskip("triton")
    targets = shapes_alone(shape)
    assert len({target.label for target in targets}) == len(targets)
    for target in targets:
        labels = [variant.label for variant in target.variants]
        assert labels and "" not in labels and len(set(labels)) == len(labels), target.label
        for variant in target.variants:
            with applied(variant):
                pass  # every place that it names is there


def test_a_variant_changes_tiles_constants_and_options_and_nothing_afterwards() -> None:
    pytest.importorskip("triton")
    from jamba_server.kernels.triton import attention, linear, mamba, scan

    before = (linear.tile_for, attention.OPTIONS, attention.SPLIT, mamba.block_channels)
    changes = {"linear.tile_for": {"columns": 16}, "attention.OPTIONS": {"num_stages": 3}, "attention.SPLIT": 64}
    variant = Variant(changes | {"mamba.block_channels": 64, "scan.GROUP": 2})
    assert variant.label == "columns 16, stages 3, SPLIT 64, block_channels 64, GROUP 2"
    usual = linear.tile_for(1, 2)
    with applied(variant):
        assert linear.tile_for(1, 2) == usual._replace(columns=16)
        assert before[1] | {"num_stages": 3} == attention.OPTIONS
        assert (attention.SPLIT, mamba.block_channels(16), scan.GROUP) == (64, 64, 2)
    assert (linear.tile_for, attention.OPTIONS, attention.SPLIT, mamba.block_channels) == before


@pytest.mark.skipif(interpreted(), reason="the compiler is not there where kernels are interpreted")
@pytest.mark.parametrize("name", ["in_proj, 70 rows", "attention, 2 x 1 of 40 keys"])
def test_kernels_compiled_without_numbers_are_those_that_numbers_want(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the names of triton's cache: a second call, with tensors that have numbers, adds none."""
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    real = tune.targets_of("tiny", "cpu")
    found: list[set[str]] = []
    for device, targets in enumerate((shapes_alone("tiny"), [target for group in real.groups() for target in group])):
        # what a process has compiled it keeps by the device's number
        monkeypatch.setattr(Elsewhere, "get_current_device", lambda self, device=device: device)
        [target] = [target for target in targets if target.label == name]
        with compiling_only(90):
            target.case.called(target.kernels())(*target.case.prepare(target.kernels()))
        found.append({path.name for path in tmp_path.iterdir()})
    assert found[0] and found[1] == found[0]


def test_a_target_knows_its_work_without_a_result() -> None:
    reference = select("cpu", {"all": "reference"})
    for target in [target for group in tune.targets_of("tiny", "cpu").groups() for target in group]:
        if target.case.quantization is None and not target.case.method:
            result = getattr(reference, target.case.op)(*target.case.prepare(reference))
            assert target.work().bytes == target.case.bytes_moved(result), target.label


def test_the_best_variant_is_one_with_the_right_result() -> None:
    variants = [Variant({"scan.GROUP": 2}), Variant({"scan.GROUP": 8}), Variant({"attention.SPLIT": 64}, exact=False)]
    [target, *_] = shapes_alone("tiny")
    times = {"as it is": 10.0, "GROUP 2": 8.0, "GROUP 8": 1.0, "SPLIT 64": 7.0, "stages 9": "OutOfResources: 300 KiB"}
    row = best_of(replace(target, variants=variants), times, {"GROUP 8": 1e-3})
    assert (row["best"], row["best_us"], row["best_exact"], row["best_exact_us"]) == ("SPLIT 64", 7.0, "GROUP 2", 8.0)
    none = best_of(replace(target, variants=variants), {"as it is": 10.0, "GROUP 2": "no"}, {})
    assert (none["best"], none["best_exact"]) == ("as it is", "as it is")


def test_bits_and_nan_make_a_difference() -> None:
    x = torch.ones(3)
    assert difference((x, 1), (x.clone(), 1), same=True) == 0
    assert 0 < difference((x,), (x + 1e-7,), same=True) < 1e-6
    assert 0 < difference((x, (x,)), (x, (x + 1e-7,)), same=False) < 1e-6
    assert not difference((x * torch.nan,), (x,), same=False) <= 1


@pytest.mark.skipif(not interpreted(), reason="needs triton's interpreter")
def test_variants_are_timed_and_compared() -> None:
    maker = Maker(Shape.of("tiny", config_of("tiny")), torch.device("cpu"))
    case = maker.linear("", 2, maker.matrix(64, 192), None)
    tiles = ({"columns": 16}, {"inner": 17})  # the second one no kernel takes
    variants = [Variant({"linear.tile_for": tile}) for tile in tiles]
    target = Target(case=case, label="", count=1, variants=variants)
    row = tune.measure(target, [], "cpu", Ceilings(bandwidth=1e10, matmul=1e11))
    assert row["best"] in ("as it is", "columns 16") and row["best_us"] <= row["default_us"]
    assert isinstance(row["variants"]["columns 16"], float)
    assert "power of 2" in row["variants"]["inner 17"]
    assert row["differ"] == {}
