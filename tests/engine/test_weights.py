"""Every layout of a checkpoint loads to the same model; every broken one is one clear sentence."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from jamba_server.engine.errors import CheckpointError
from jamba_server.engine.layers.parameter import Destination
from jamba_server.engine.model_config import load_model_config
from jamba_server.engine.models import Model, build_model
from jamba_server.engine.quantization.stored import Read
from jamba_server.engine.start.sources import Source, open_weights
from jamba_server.engine.start.weights import dummy_weights, fill_uniform, load_weights
from jamba_server.engine.weight_sizes import weight_bytes
from jamba_server.kernels.ops import Weight
from jamba_server.kernels.reference.mamba import MambaDecode
from jamba_server.kernels.table import select
from tests.engine.feeding import Feed, Feeder
from tests.numpy_jamba import tensor_shapes

CPU = torch.device("cpu")
CONFIG = {
    "model_type": "jamba",
    "architectures": ["JambaForCausalLM"],
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 4,
    "attn_layer_period": 4,
    "attn_layer_offset": 2,
    "mamba_d_state": 4,
}
MODEL_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
MOE, MAMBA = "model.layers.1.feed_forward.", "model.layers.0.mamba."
Tensors = dict[str, Tensor]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint as AI21 publishes them, in one file, of random bfloat16 numbers."""
    return write_checkpoint(tmp_path)


def write_checkpoint(folder: Path, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Path:
    (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    generator = torch.Generator().manual_seed(0)
    shapes = tensor_shapes(load_model_config(folder))
    tensors = {name: torch.randn(shape, generator=generator).to(dtype) / 3 for name, shape in shapes.items()}
    save_file(tensors, folder / MODEL_FILE)
    return folder


def tensors_of(folder: Path) -> Tensors:
    return load_file(folder / MODEL_FILE)


def rewrite(folder: Path, change: Callable[[Tensors], object]) -> None:
    tensors = tensors_of(folder)
    change(tensors)
    save_file(tensors, folder / MODEL_FILE)


def shard(folder: Path, parts: Iterable[Iterable[str]]) -> None:
    """Splits the single file into several, by the names of the tensors, and writes an index."""
    tensors, weight_map = tensors_of(folder), dict[str, str]()
    for number, names in enumerate(parts, start=1):
        file_name = f"model-{number:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in names}, folder / file_name)
        weight_map |= dict.fromkeys(names, file_name)
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / MODEL_FILE).unlink()


def fuse(tensors: Tensors) -> None:
    """Stores the experts of each layer in two tensors, as transformers 5 has them in memory."""
    for layer in (1, 3):
        p = f"model.layers.{layer}.feed_forward.experts."
        gate, up, down = (
            torch.stack([tensors.pop(f"{p}{e}.{name}_proj.weight") for e in range(4)])
            for name in ("gate", "up", "down")
        )
        tensors[f"{p}gate_up_proj"] = torch.cat([gate, up], dim=1)
        tensors[f"{p}down_proj"] = down


def build(folder: Path, dtype: torch.dtype = torch.float32) -> Model:
    return build_model(load_model_config(folder), select("cpu", {}), dtype=dtype, device=CPU)


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Model:
    load_weights(model := build(folder, dtype), folder, lambda phase, fraction: None)
    return model


def logits(model: Model, dtype: torch.dtype = torch.float32) -> Tensor:
    feeder = Feeder(model, dtype=dtype)
    return feeder.step([Feed(feeder.new_sequence(), range(3, 40))])[0]


def test_sharded_and_fused_layouts_give_the_same_model(folder: Path) -> None:
    expected = logits(load(folder))
    assert expected.isfinite().all()
    rewrite(folder, fuse)
    assert torch.equal(logits(load(folder)), expected)
    names = sorted(tensors_of(folder))
    shard(folder, (names[::2], names[1::2]))
    assert torch.equal(logits(load(folder)), expected)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_weights_are_rounded_once_and_the_scan_keeps_float32(
    stored: torch.dtype, dtype: torch.dtype, tmp_path: Path
) -> None:
    write_checkpoint(tmp_path, stored)
    model = build(tmp_path, dtype)
    destinations = model.tensor_map().destinations
    load_weights(model, tmp_path, lambda phase, fraction: None)
    tensors = tensors_of(tmp_path)
    assert set(destinations) == set(tensors)
    scan = ("A_log", "D", "dt_proj.bias")
    for name, destination in destinations.items():
        data = destination.tensor
        is_scan = "mamba" in name and name.endswith(scan)
        assert data.dtype == (torch.float32 if is_scan else dtype)
        expected = tensors[name].to(data.dtype)
        assert torch.equal(data, -expected.exp() if name.endswith("A_log") else expected)
    assert sum(d.tensor.nbytes for d in destinations.values()) == weight_bytes(model.config, dtype.itemsize)
    assert logits(model, dtype).isfinite().all()


def test_progress_rises_to_one(folder: Path) -> None:
    reports: list[tuple[str, float]] = []
    load_weights(build(folder), folder, lambda phase, fraction: reports.append((phase, fraction)))
    assert {phase for phase, _ in reports} == {"loading weights"}
    fractions = [fraction for _, fraction in reports]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0
    assert 10 < len(fractions) <= 103


@pytest.mark.parametrize("extra", ["score.weight", "model.layers.2.self_attn.rotary_emb.inv_freq"])
def test_useless_tensors_are_ignored_by_name(extra: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    expected = logits(load(tmp_path))
    rewrite(tmp_path, lambda tensors: tensors.update({extra: torch.ones(48, 16)}))
    assert torch.equal(logits(load(tmp_path)), expected)


def test_a_classifier_ignores_the_language_head(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, architectures=["JambaForSequenceClassification"])
    rewrite(tmp_path, lambda tensors: tensors.update({"score.weight": torch.ones(2, 16)}))
    assert logits(load(tmp_path)).shape == (37, 2)


class Transposed(NamedTuple):
    data: Tensor


class CopyingLinear:
    """A linear kernel that packs weights by transposing them. It counts how many raw weights exist while it packs."""

    def __init__(self) -> None:
        self.raw: list[weakref.ref[Tensor]] = []
        self.kept: list[int] = []

    def num_raw(self) -> int:
        return sum(ref() is not None for ref in self.raw)

    def pack(self, weight: Weight) -> Transposed:
        assert isinstance(weight, Tensor)
        self.kept.append(self.num_raw())
        self.raw.append(weakref.ref(weight))
        return Transposed(weight.t().clone())

    def rows(self, weight: Transposed | Tensor, ids: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return weight.data.t()[ids] if isinstance(weight, Transposed) else weight[ids]

    def __call__(self, x: Tensor, weight: Transposed, bias: Tensor | None = None) -> Tensor:
        return x @ weight.data if bias is None else x @ weight.data + bias

    def sums(self, x: Tensor, weight: Transposed, out: Tensor) -> None:
        out.copy_(x @ weight.data)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("random", [False, True])
def test_raw_weights_are_let_go_as_they_are_packed(random: bool, tied: bool, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, tie_word_embeddings=tied)
    linear = CopyingLinear()
    kernels = select("cpu", {})
    parts = (kernels.causal_conv1d_update, linear, kernels.rms_norm, kernels.selective_state_update)
    kernels = replace(kernels, linear=linear, mamba_decode=MambaDecode(*parts))
    model = build_model(load_model_config(tmp_path), kernels, dtype=torch.float32, device=CPU)
    if random:
        dummy_weights(model, seed=0)
    else:
        load_weights(model, tmp_path, lambda phase, fraction: None)
    assert len(linear.raw) == 3 * 4 + 2 + 2 * 2 + 2 + 1  # Mamba, attention, dense, routers, head
    assert max(linear.kept) == linear.num_raw() == 0
    if not random:
        torch.testing.assert_close(logits(model), logits(load(tmp_path)))


def test_a_layer_is_packed_before_the_next_but_one_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every weight of layer i is i + 1, so that the kernels can tell which layer they pack."""

    def number(tensors: Tensors) -> None:
        for name, tensor in tensors.items():
            tensor.fill_(int(name.split(".")[2]) + 1 if ".layers." in name else 0)

    rewrite(folder, number)
    events: list[tuple[str, int]] = []

    def watched_source(*arguments: Any) -> Source:
        source = open_weights(*arguments)
        return source._replace(tensors=map(noted, source.tensors))

    def noted(read: Read) -> Read:
        if ".layers." in read.name:
            events.append(("read", int(read.name.split(".")[2])))
        return read

    class Watched:
        """An op that records the weights that it packs."""

        def __init__(self, inner: Any) -> None:
            self.inner = inner

        def pack(self, *weights: Tensor) -> Any:
            assert all((weight == weights[0].flatten()[0]).all() for weight in weights), "of one layer, all filled"
            events.append(("pack", int(weights[0].flatten()[0]) - 1))
            return self.inner.pack(*weights)

    monkeypatch.setattr("jamba_server.engine.start.weights.open_weights", watched_source)
    kernels = select("cpu", {})
    watched: Any = {name: Watched(getattr(kernels, name)) for name in ("linear", "run_experts")}
    model = build_model(load_model_config(folder), replace(kernels, **watched), dtype=torch.float32, device=CPU)
    load_weights(model, folder, lambda phase, fraction: None)
    packs = [[index for index, event in enumerate(events) if event == ("pack", layer)] for layer in range(4)]
    first_reads = [events.index(("read", layer)) for layer in range(4)]
    assert [len(indices) for indices in packs] == [4 + 2, 4 + 2, 2 + 2, 4 + 2], "mixer and feed-forward"
    assert all(max(packs[layer]) < first_reads[layer + 1] for layer in range(3))
    assert packs[1][0] == first_reads[1] + 3 * 4, "the experts at once, not at the layer's end"


def set_tensor(name: str, value: Tensor) -> Callable[[Path], None]:
    return lambda folder: rewrite(folder, lambda tensors: tensors.update({name: value}))


def remove(*names: str) -> Callable[[Path], None]:
    return lambda folder: rewrite(folder, lambda tensors: [tensors.pop(name) for name in names])


def overwrite(data: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda folder: (folder / MODEL_FILE).write_bytes(data((folder / MODEL_FILE).read_bytes()))


def only(*names: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / MODEL_FILE).unlink()
        for name in names:
            (folder / name).write_bytes(b"x")

    return change


def index(text: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / MODEL_FILE).unlink()
        (folder / INDEX_FILE).write_text(text)

    return change


def lose_a_shard(folder: Path) -> None:
    names = sorted(tensors_of(folder))
    shard(folder, (names[::2], names[1::2]))
    (folder / "model-00002-of-00002.safetensors").unlink()


def overlap_shards(folder: Path) -> None:
    names = sorted(tensors_of(folder))
    shard(folder, (names, names[:1]))


def add_fused(folder: Path) -> None:
    tensors = tensors_of(folder)
    fuse(tensors)
    rewrite(folder, lambda old: old.update({f"{MOE}experts.down_proj": tensors[f"{MOE}experts.down_proj"]}))


LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 103140646656\n"
BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "nothing": (only(), "has neither model.safetensors nor model.safetensors.index.json."),
    "pickles": (
        only("pytorch_model-1.bin", "pytorch_model-2.bin"),
        "index.json; pytorch_model-1.bin, pytorch_model-2.bin cannot be loaded: convert them to safetensors "
        "(transformers: from_pretrained, then save_pretrained).",
    ),
    "gguf": (
        only("model.gguf"),
        "model.gguf cannot be loaded: give the path of the GGUF file instead of the folder.",
    ),
    "truncated": (overwrite(lambda data: data[:-1]), "model.safetensors is not a complete safetensors file ("),
    "empty": (overwrite(lambda _: b""), "model.safetensors is not a complete safetensors file (0 bytes; "),
    "lfs pointer": (overwrite(lambda _: LFS_POINTER), "is not a complete safetensors file (77 bytes; "),
    "missing": (
        remove(f"{MAMBA}A_log", f"{MOE}experts.2.up_proj.weight"),
        f": 2 of 83 tensors are missing: {MAMBA}A_log, {MOE}experts.2.up_proj.weight.",
    ),
    "many missing": (
        lambda folder: rewrite(folder, lambda t: [t.pop(name) for name in list(t) if "experts" in name]),
        f"24 of 83 tensors are missing: {MOE}experts.0.gate_proj.weight, {MOE}experts.0.up_proj.weight, "
        f"{MOE}experts.0.down_proj.weight and 21 more.",
    ),
    "extra": (
        set_tensor("model.layers.4.mamba.D", torch.ones(32)),
        "model.safetensors: tensor model.layers.4.mamba.D [32] has no place in the model of ",
    ),
    "foreign": (set_tensor("transformer.wte.weight", torch.ones(1)), "tensor transformer.wte.weight [1] has no place"),
    "shape": (
        set_tensor(f"{MAMBA}conv1d.weight", torch.ones(32, 4, 1)),
        f"tensor {MAMBA}conv1d.weight has shape [32, 4, 1]; ",
    ),
    "int8": (
        set_tensor(f"{MAMBA}D", torch.ones(32, dtype=torch.int8)),
        f"tensor {MAMBA}D has dtype torch.int8; floats of 16 bits or more are expected.",
    ),
    "float8": (
        set_tensor(f"{MAMBA}D", torch.ones(32).to(torch.float8_e4m3fn)),
        f"tensor {MAMBA}D has dtype torch.float8_e4m3fn; floats of 16 bits or more are expected.",
    ),
    "lost shard": (
        lose_a_shard,
        "lacks model-00002-of-00002.safetensors, named in model.safetensors.index.json;",
    ),
    "twice": (overlap_shards, "model-00002-of-00002.safetensors: tensor lm_head.weight fills weights that tensor lm"),
    "fused as well": (
        add_fused,
        f"tensor {MOE}experts.down_proj fills weights that tensor {MOE}experts.0.down_proj.weight has filled already",
    ),
    "index": (index("{"), "model.safetensors.index.json cannot be read as JSON: "),
    "index without map": (
        index("{}"),
        "model.safetensors.index.json cannot be read as an index of shards: it has no weight_map.",
    ),
    "empty index": (index('{"weight_map": {}}'), "index.json: weight_map must map tensor names to names of files"),
    "index that leaves the folder": (index('{"weight_map": {"a": "../b.safetensors"}}'), "weight_map must map tensor"),
    "index of lists": (index('{"weight_map": {"a": [1]}}'), "weight_map must map tensor names to names of files"),
}


@pytest.mark.parametrize("damage", BROKEN)
def test_broken_checkpoints_are_one_clear_sentence(damage: str, folder: Path) -> None:
    change, words = BROKEN[damage]
    change(folder)
    with pytest.raises(CheckpointError) as refusal:
        load(folder)
    message = str(refusal.value)
    assert message.startswith(str(folder))
    assert words in message
    assert message.endswith(".")
    assert "\n" not in message


def test_numbers_beyond_float16_are_refused_not_made_infinite(folder: Path) -> None:
    set_tensor(f"{MAMBA}out_proj.weight", torch.full((16, 32), 70_000.0))(folder)
    assert logits(load(folder, torch.bfloat16), torch.bfloat16).isfinite().all()
    with pytest.raises(CheckpointError, match=r"out_proj.weight holds numbers beyond float16's range; use --dtype bfl"):
        load(folder, torch.float16)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_none_are_refused_by_name(value: float, folder: Path) -> None:
    name = f"{MOE}experts.3.up_proj.weight"
    tensor = tensors_of(folder)[name]
    tensor[5, 7] = value
    set_tensor(name, tensor)(folder)
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors: tensor .*experts\.3\.up_proj.weight holds values th"
    ):
        load(folder)


def random_weights(folder: Path, seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Destination]:
    model = build(folder, dtype)
    destinations = model.tensor_map().destinations
    dummy_weights(model, seed)
    return destinations


def test_random_weights_need_no_file_and_depend_on_the_seed_alone(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "hidden_size": 512, "vocab_size": 2000}))
    threads = torch.get_num_threads()
    first = random_weights(tmp_path, 0)
    try:
        torch.set_num_threads(2 if threads == 1 else 1)
        second, other = random_weights(tmp_path, 0), random_weights(tmp_path, 1)
        half = random_weights(tmp_path, 0, torch.bfloat16)
    finally:
        torch.set_num_threads(threads)
    seen: set[float] = set()
    for name, destination in first.items():
        data, fill = destination.tensor, destination.fill
        assert torch.equal(data, second[name].tensor)
        assert torch.equal(data.to(half[name].tensor.dtype), half[name].tensor)
        if fill in ("normed", "unit"):
            assert not torch.equal(data, other[name].tensor)
            expected = 1.0 if fill == "unit" else data.shape[-1] ** -0.5
            assert data.std().item() == pytest.approx(expected, rel=0.2)
            seen.add(data.flatten()[0].item() / data.std().item())
    assert len(seen) == sum(fill in ("normed", "unit") for _, fill, _ in first.values()), (
        "each tensor has its own numbers"
    )


def test_random_time_steps_and_decays_are_mambas_own(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    weights = random_weights(tmp_path, 0)
    dt = torch.nn.functional.softplus(weights[f"{MAMBA}dt_proj.bias"].tensor)
    assert dt.min() >= 0.00099
    assert dt.max() <= 0.101
    assert dt.max() > 5 * dt.min()
    torch.testing.assert_close(weights[f"{MAMBA}A_log"].tensor, -torch.arange(1.0, 5.0).expand(32, 4))
    assert (weights[f"{MAMBA}D"].tensor == 1).all()


def test_random_numbers_are_those_of_a_plain_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the chunks: of Python's own integers, the number at each index."""

    def number(index: int, key: tuple[int, int]) -> int:
        bits = (index * 0x9E3779B9 + key[0]) % 2**32
        bits = (bits ^ (bits >> 16)) * 0x7FEB352D % 2**32 ^ key[1] % 2**32
        bits = (bits ^ (bits >> 15)) * 0x846CA68B % 2**32
        return bits - 2**32 if bits >= 2**31 else bits

    key = (-123456789, 987654321)
    expected = torch.tensor([number(index, key) for index in range(70 * 11)]).float().view(70, 11) * 2.0**-31
    for chunk in (7, 100, 1 << 20):
        monkeypatch.setattr("jamba_server.engine.start.weights._CHUNK", chunk)
        fill_uniform(data := torch.empty(11, 70).t(), 1.0, key, CPU)
        assert torch.equal(data, expected)


def test_random_numbers_of_two_keys_are_independent_and_uniform() -> None:
    first, second = torch.empty(2, 1 << 20)
    fill_uniform(first, 1.0, (-558133027, 1740219661), CPU)
    fill_uniform(second, 1.0, (1390208809, -214013), CPU)
    for shift in (0, 1, 2):
        products = first * second.roll(shift)
        assert abs(products.mean()) < 5 / 3 / 1024, "five standard errors"
    for power in (1, 2, 4, 8):  # the 20 highest bits
        slots = ((first + 1) * 2 ** (power - 1)).long().clamp(max=2**power - 1)
        counts = slots.bincount(minlength=2**power).float() / len(first)
        assert (counts * 2**power - 1).abs().max() < 5 * (2**power / len(first)) ** 0.5
