"""Bytes of cache units against published numbers, and the memory plan against its rules for random machines."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest

from jamba_server.engine.cache.spec import CacheSpec
from jamba_server.engine.config import EngineConfig
from jamba_server.engine.errors import ConfigError
from jamba_server.engine.model_cache import cache_layout, wanted_layout
from jamba_server.engine.model_config import JambaConfig, load_model_config
from jamba_server.engine.start.machine import available_cpus, available_memory, format_bytes
from jamba_server.engine.start.memory_plan import MemoryPlan, plan_memory
from jamba_server.engine.weight_sizes import weight_bytes
from tests.geometries import GEOMETRIES, write_geometry

MIB, GIB = 1024**2, 1024**3
Geometry = dict[str, JambaConfig]


@pytest.fixture(scope="module")
def geometry(tmp_path_factory: pytest.TempPathFactory) -> Geometry:
    return {name: load_model_config(write_geometry(tmp_path_factory.mktemp(name), name)) for name in GEOMETRIES}


def make_plan(config: JambaConfig, available: int, device: str = "cpu", **settings: Any) -> MemoryPlan:
    engine = EngineConfig(model="x", dtype="bfloat16", **settings)
    return plan_memory(
        config,
        engine,
        wanted_layout(config, engine),
        weight_bytes=weight_bytes(config, 2),
        available_bytes=available,
        device=device,
    )


def make_spec(config: JambaConfig, *, dtype_bytes: int, **kinds: Any) -> CacheSpec:
    dtype = {2: "bfloat16", 4: "float32"}[dtype_bytes]
    return CacheSpec.of(cache_layout(config, block_size=16, dtype=dtype, **kinds))


# Bytes a unit ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kv_bytes_per_token", "bytes_per_slot"),
    [
        ("mini", 16_384, 1_376_256 + 14_680_064),
        ("large", 36_864, 6_193_152 + 66_060_288),
        ("3b", 1_024, 798_720 + 8_519_680),
        ("tiny-dev", 1_024, 14 * 1024 * (3 * 2 + 16 * 4)),
    ],
)
def test_bytes_a_unit_in_bfloat16(geometry: Geometry, name: str, kv_bytes_per_token: int, bytes_per_slot: int) -> None:
    spec = make_spec(geometry[name], dtype_bytes=2)
    assert spec.kv_bytes_per_token == kv_bytes_per_token
    assert spec.bytes_per_page == 16 * kv_bytes_per_token
    assert spec.bytes_per_slot == bytes_per_slot


def test_float32_doubles_pages_and_conv_state_but_not_the_ssm_state(geometry: Geometry) -> None:
    half, full = (make_spec(geometry["mini"], dtype_bytes=size) for size in (2, 4))
    assert full.bytes_per_page == 2 * half.bytes_per_page
    assert full.bytes_per_slot - half.bytes_per_slot == 1_376_256


def test_fp8_pages_take_one_byte_a_number_whatever_the_dtype(geometry: Geometry) -> None:
    plain = make_spec(geometry["mini"], dtype_bytes=2)
    for size in (2, 4):
        spec = make_spec(geometry["mini"], dtype_bytes=size, kv_cache_dtype="fp8")
        assert spec.bytes_per_page * 2 == plain.bytes_per_page
        assert spec.kv_bytes_per_token * 2 == plain.kv_bytes_per_token
        assert spec.bytes_per_slot == make_spec(geometry["mini"], dtype_bytes=size).bytes_per_slot


def test_an_int8_saved_state_has_a_byte_a_number_and_a_scale_a_channel(geometry: Geometry) -> None:
    for name, size, expected in (
        ("3b", 2, 798_720 + 26 * 5_120 * (16 + 4)),
        ("mini", 2, 1_376_256 + 28 * 8_192 * (16 + 4)),
        ("mini", 4, 2 * 1_376_256 + 28 * 8_192 * (16 + 4)),
    ):
        plain = make_spec(geometry[name], dtype_bytes=size)
        spec = make_spec(geometry[name], dtype_bytes=size, state_cache_dtype="int8")
        assert plain.bytes_per_saved_state == plain.bytes_per_slot == spec.bytes_per_slot
        assert spec.bytes_per_saved_state == expected


def test_a_sequence_takes_its_blocks_one_to_spare_and_a_slot(geometry: Geometry) -> None:
    spec = make_spec(geometry["3b"], dtype_bytes=2)
    assert [spec.pages(n) for n in (1, 16, 17, 32)] == [2, 2, 3, 3]
    assert spec.sequence_bytes(17) == 3 * 16 * 1_024 + 9_318_400


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (9_318_400, "8.9 MiB"), (96 * GIB, "96.0 GiB")]
)
def test_bytes_in_words(count: int, text: str) -> None:
    assert format_bytes(count) == text


# The plan ----------------------------------------------------------------------------------------------------------


def test_mini_on_a_large_gpu_gets_everything_it_asks_for(geometry: Geometry) -> None:
    plan = make_plan(geometry["mini"], 141 * GIB, "cuda")
    assert plan.warnings == ()
    assert (plan.max_model_len, plan.max_num_seqs, plan.max_num_batched_tokens) == (262_144, 64, 8192)
    assert plan.weight_bytes == 103_140_646_656 + 28 * 8192 * 18 * 2  # A, D and the dt bias are kept in float32
    assert plan.kv_bytes == plan.num_pages * 262_144
    assert plan.state_bytes == plan.num_slots * 16_056_320
    assert plan.total_bytes > 130 * GIB  # a GPU is the server's own: nearly all of it is used


def test_a_cpu_keeps_three_quarters_of_what_weights_leave(geometry: Geometry) -> None:
    available = 16 * GIB
    plan = make_plan(geometry["3b"], available)
    room = available - plan.weight_bytes - plan.activation_bytes
    assert plan.kv_bytes + plan.state_bytes <= room / 4
    assert plan.max_num_batched_tokens == 128


def test_a_small_model_takes_little_of_a_big_machine(geometry: Geometry) -> None:
    plan = make_plan(geometry["tiny-dev"], 1024 * GIB, max_model_len=4096)
    assert plan.warnings == ()
    assert plan.kv_bytes + plan.state_bytes < 512 * MIB


def test_weights_that_do_not_fit_are_an_error_with_both_numbers(geometry: Geometry) -> None:
    with pytest.raises(ConfigError, match=rf"96\.1 GiB .* 80\.0 GiB \({80 * GIB} bytes\)"):
        make_plan(geometry["mini"], 80 * GIB, "cuda")


def test_no_room_for_a_cache_is_an_error_with_the_need(geometry: Geometry) -> None:
    weights = weight_bytes(geometry["3b"], 2)
    with pytest.raises(ConfigError, match=r"the smallest cache takes .* bytes"):
        make_plan(geometry["3b"], weights + 200 * MIB)


def test_sizes_shrink_with_a_warning_that_names_wish_and_result(geometry: Geometry) -> None:
    plan = make_plan(geometry["3b"], weight_bytes(geometry["3b"], 2) + 2 * GIB, max_num_seqs=100)
    assert plan.max_num_seqs < 100
    assert plan.max_model_len < 262_144
    [seqs, length] = plan.warnings
    assert seqs.startswith(f"max_num_seqs 100 is reduced to {plan.max_num_seqs}: ")
    assert length.startswith(f"max_model_len 262144 is reduced to {plan.max_model_len}: ")


def test_replies_are_beside_the_prompts_budget(geometry: Geometry) -> None:
    plan = make_plan(geometry["3b"], 64 * GIB, max_num_seqs=64, max_num_batched_tokens=48)
    assert (plan.max_num_seqs, plan.max_num_batched_tokens, plan.warnings) == (64, 48, ())
    plan = make_plan(geometry["3b"], 64 * GIB, max_num_seqs=512)
    assert (plan.max_num_seqs, plan.max_num_batched_tokens) == (512, 128)


def test_a_context_beyond_the_trained_one_is_reduced(geometry: Geometry) -> None:
    plan = make_plan(geometry["3b"], 64 * GIB, max_model_len=1_000_000)
    assert plan.max_model_len == 262_144
    reason = "the model's max_position_embeddings is the limit"
    assert plan.warnings == (f"max_model_len 1000000 is reduced to 262144: {reason}",)


def test_kv_cache_memory_counts_pages_only_and_bounds_the_context(geometry: Geometry) -> None:
    plan = make_plan(geometry["3b"], 64 * GIB, kv_cache_memory_bytes=10 * MIB + 5)
    assert plan.num_pages == 10 * MIB // (16 * 1024)
    assert plan.max_model_len == (plan.num_pages - 2) * 16
    assert plan.num_slots >= 1 + plan.max_num_seqs + 2  # states come on top
    message = "kv_cache_memory_bytes is 49151; it must be at least 49152, the bytes of 3 pages"
    with pytest.raises(ConfigError, match=message):
        make_plan(geometry["3b"], 64 * GIB, kv_cache_memory_bytes=49_151)


def test_checkpoint_memory_comes_on_top_of_the_running_slots(geometry: Geometry) -> None:
    plan = make_plan(geometry["3b"], 64 * GIB, max_num_seqs=8, state_cache_memory_bytes=10 * 9_318_400)
    assert plan.num_slots == 1 + 8 + 10
    assert plan.warnings == ()


def test_checkpoints_take_a_quarter_of_an_explicit_cache(geometry: Geometry) -> None:
    plan = make_plan(geometry["3b"], 64 * GIB, max_num_seqs=8, kv_cache_memory_bytes=30 * 9_318_400)
    assert plan.num_slots == 1 + 8 + 10


def test_without_prefix_caching_there_are_no_saved_states(geometry: Geometry) -> None:
    plan = make_plan(geometry["3b"], 64 * GIB, max_num_seqs=8, enable_prefix_caching=False)
    assert plan.num_slots == 1 + 8


def test_int8_saved_states_lie_beside_the_slots_that_run_and_stage(geometry: Geometry) -> None:
    settings: dict[str, Any] = {"max_num_seqs": 8, "state_cache_memory_bytes": 10 * 9_318_400}
    plan = make_plan(geometry["3b"], 64 * GIB, state_cache_dtype="int8", **settings)
    assert plan.num_slots == 1 + 8 + 4
    assert plan.num_saved == plan.num_compressed - 1 == 10 * 9_318_400 // 3_461_120 == 26
    assert plan.state_bytes == 13 * 9_318_400 + 27 * 3_461_120
    assert plan.warnings == ()
    plain = make_plan(geometry["3b"], 64 * GIB, **settings)
    assert (plain.num_compressed, plain.num_saved) == (0, 10)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_invariant": True}, "batch_invariant and state_cache_dtype 'int8' exclude each other"),
        ({"enable_prefix_caching": False}, "state_cache_dtype 'int8' .* needs enable_prefix_caching"),
    ],
)
def test_what_rules_out_int8_saved_states(geometry: Geometry, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_plan(geometry["3b"], 64 * GIB, state_cache_dtype="int8", **settings)
    make_plan(geometry["3b"], 64 * GIB, **settings)


def test_checkpoint_memory_below_zero_is_an_error(geometry: Geometry) -> None:
    with pytest.raises(ConfigError, match="state_cache_memory_bytes is -1; it must be at least 0"):
        make_plan(geometry["3b"], 64 * GIB, "cpu", state_cache_memory_bytes=-1)


@pytest.mark.parametrize("name", ["max_model_len", "max_num_seqs", "max_num_batched_tokens", "block_size", "threads"])
def test_sizes_below_one_are_an_error(geometry: Geometry, name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} is 0; it must be at least 1"):
        make_plan(geometry["3b"], 64 * GIB, "cpu", **{name: 0})


def test_more_sequences_than_a_grid_has_are_an_error(geometry: Geometry) -> None:
    with pytest.raises(ConfigError, match="max_num_seqs is 65536; it must be at most 65535"):
        make_plan(geometry["3b"], 64 * GIB, max_num_seqs=65_536)


def random_settings(rng: random.Random) -> dict[str, Any]:
    choices: dict[str, list[Any]] = {
        "max_model_len": [None, 1, 15, 400, 5000, 10**6],
        "max_num_seqs": [1, 2, 7, 64, 4096],
        "max_num_batched_tokens": [None, 1, 16, 48, 100_000],
        "kv_cache_memory_bytes": [None, None, 10**5, 10**7, 10**9, 10**12],
        "state_cache_memory_bytes": [None, None, 0, 10**7, 10**9, 10**12],
        "block_size": [1, 16, 256, 16384],
        "enable_prefix_caching": [True, False],
    }
    settings = {name: rng.choice(values) for name, values in choices.items()}
    if settings["enable_prefix_caching"]:
        settings["state_cache_dtype"] = rng.choice(["auto", "int8"])
    return settings


@pytest.mark.parametrize("name", GEOMETRIES)
def test_random_machines_and_wishes(geometry: Geometry, name: str) -> None:
    config, rng, plans = geometry[name], random.Random(name), 0
    weights = weight_bytes(config, 2)
    for _ in range(1500):
        available = int(weights * rng.uniform(0.9, 1.2) + 10 ** rng.uniform(6, 11.5))
        settings, device = random_settings(rng), rng.choice(["cpu", "cuda"])
        try:
            plan = make_plan(config, available, device, **settings)
        except ConfigError:
            continue
        plans += 1
        check_plan(plan, config, available, device, settings)
    assert plans > 500


def test_pages_that_are_larger_than_states(geometry: Geometry) -> None:
    config = geometry["tiny-dev"]
    settings: dict[str, Any] = {"block_size": 16384, "max_num_seqs": 4096, "max_num_batched_tokens": 4096}
    smallest = weight_bytes(config, 2) + 2 * GIB
    fitting = 0
    for available in range(smallest, smallest + 5 * GIB, 8 * MIB):
        try:
            plan = make_plan(config, available, "cuda", **settings)
        except ConfigError:
            assert not fitting  # more memory never takes a plan away
            continue
        fitting += 1
        check_plan(plan, config, available, "cuda", settings)
    assert fitting > 100


def check_plan(plan: MemoryPlan, config: JambaConfig, available: int, device: str, settings: dict[str, Any]) -> None:
    engine = EngineConfig(model="x", dtype="bfloat16", **settings)
    spec = CacheSpec.of(wanted_layout(config, engine))
    assert plan.total_bytes <= available, settings
    assert plan.kv_bytes == plan.num_pages * spec.bytes_per_page
    saved = plan.num_compressed * spec.bytes_per_saved_state
    assert plan.state_bytes == plan.num_slots * spec.bytes_per_slot + saved
    assert plan.num_pages - 1 >= math.ceil(plan.max_model_len / engine.block_size) + 1
    assert min(plan.max_num_seqs, plan.max_num_batched_tokens) >= 1
    assert plan.max_model_len >= 1
    compressed = engine.state_cache_dtype == "int8"
    assert (plan.num_compressed > 0) == compressed
    num_saved = plan.num_compressed - 1 if compressed else plan.num_slots - 1 - plan.max_num_seqs
    assert num_saved == plan.num_saved
    if compressed:
        assert plan.num_slots == 1 + plan.max_num_seqs + 4
    assert num_saved >= 2 if engine.enable_prefix_caching else num_saved == 0
    if engine.kv_cache_memory_bytes is not None:
        assert plan.kv_bytes <= engine.kv_cache_memory_bytes
    if engine.state_cache_memory_bytes is not None:
        assert num_saved <= max(2, engine.state_cache_memory_bytes // spec.bytes_per_saved_state)
    requested = {
        "max_model_len": engine.max_model_len or config.max_position_embeddings,
        "max_num_seqs": engine.max_num_seqs,
        "max_num_batched_tokens": engine.max_num_batched_tokens or {"cpu": 128, "cuda": 8192}[device],
    }
    shrunk = {line.split()[0] for line in plan.warnings}
    for key, size in requested.items():
        result = getattr(plan, key)
        assert result <= size
        assert (key in shrunk) == (result < size), (key, plan.warnings)
    mentioned = [line for line in plan.warnings if line.startswith("max_num_seqs")]
    assert not mentioned or mentioned[-1].split(":")[0].endswith(f"reduced to {plan.max_num_seqs}")


# The machine -------------------------------------------------------------------------------------------------------


def machine(root: Path, files: dict[str, str]) -> Path:
    for name, text in ({"proc/meminfo": "MemTotal: 9000 kB\nMemAvailable:    8000 kB\n"} | files).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_memory_of_a_machine_without_control_groups(tmp_path: Path) -> None:
    assert available_memory(machine(tmp_path, {})) == 8000 * 1024


def test_memory_of_a_control_group_version_2(tmp_path: Path) -> None:
    group = "sys/fs/cgroup/a/b"
    files = {
        "proc/self/cgroup": "0::/a/b\n",
        f"{group}/memory.max": "5000000\n",
        f"{group}/memory.current": "3000000\n",
        f"{group}/memory.stat": "anon 10\ninactive_file 500000\n",
    }
    assert available_memory(machine(tmp_path, files)) == 2_500_000  # its idle page cache counts as free


def test_memory_of_the_groups_above_counts_too(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/a/b\n",
        "sys/fs/cgroup/a/b/memory.max": "max\n",
        "sys/fs/cgroup/a/b/memory.current": "1\n",
        "sys/fs/cgroup/a/memory.max": "4000000\n",
        "sys/fs/cgroup/a/memory.current": "1000000\n",
    }
    assert available_memory(machine(tmp_path, files)) == 3_000_000


@pytest.mark.parametrize("path", ["/", "/docker/0123"])
def test_memory_of_a_control_group_version_1(tmp_path: Path, path: str) -> None:
    """In a container the path is the host's, and only the mounted root exists."""
    files = {
        "proc/self/cgroup": f"3:cpuset:/\n2:cpu,cpuacct:{path}\n4:memory:{path}\n0::/\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "2000000",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": "1500000",
        "sys/fs/cgroup/memory/memory.stat": "inactive_file 1\ntotal_inactive_file 100000",
    }
    assert available_memory(machine(tmp_path, files)) == 600_000


def test_memory_is_never_negative(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/\n",
        "sys/fs/cgroup/memory.max": "1000",
        "sys/fs/cgroup/memory.current": "2000",
    }
    assert available_memory(machine(tmp_path, files)) == 0


@pytest.mark.parametrize(
    ("cgroup", "files", "limit"),
    [
        ("0::/\n", {"cpu.max": "150000 100000"}, 1),
        ("0::/\n", {"cpu.max": "50000 100000"}, 1),  # half a core is one thread
        ("0::/\n", {"cpu.max": "max 100000"}, None),
        ("5:cpu:/\n", {"cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.cfs_period_us": "100000"}, 1),
        ("5:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
    ],
)
def test_cores_of_a_control_group(tmp_path: Path, cgroup: str, files: dict[str, str], limit: int | None) -> None:
    unlimited = available_cpus(tmp_path)  # no proc/, no quota: the affinity
    root = machine(tmp_path, {"proc/self/cgroup": cgroup} | {f"sys/fs/cgroup/{n}": text for n, text in files.items()})
    assert available_cpus(root) == (unlimited if limit is None else limit)
