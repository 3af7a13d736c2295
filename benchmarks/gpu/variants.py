"""Lists the kernel variants that the part `tune` of the GPU check times: other tile sizes, stages and warps.

The kernels have no options for this. Their constants, and the functions that choose a tile, are replaced while a
variant is `applied`.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import import_module
from itertools import product
from typing import Any
from unittest import mock

SHARED_BYTES = 227 << 10  # largest size in bytes of the shared memory that a thread block can use on an H100 or H200
# The matmul kernels have special tile sizes for products with few rows. If the weights are not quantised, the special
# tile sizes are used for at most FEW_ROWS rows. If the weights are quantised, the special tile sizes are used for
# at most FEWER_ROWS rows.
FEW_ROWS, FEWER_ROWS = 64, 16
PRODUCT_TILES = {"linear": "linear.tile_for", "run_experts": "moe.tile_for", "gated": "gated.tile_for"}
Fields = dict[str, int | None]


@dataclass(frozen=True, slots=True)
class Variant:
    """A variant of the Triton kernels: new values for constants and functions in the kernels' modules.

    The keys of `changes` are "module.name" in kernels.triton. For a dictionary, or a function that returns a dictionary
    or a named tuple, the value has the changed fields. For another function it is the new result, and for a constant
    the new value. If `exact` is true, the results must have the same bits as those of the unchanged kernel.
    """

    changes: Mapping[str, Any]
    exact: bool = True

    @property
    def label(self) -> str:
        words: dict[str, None] = {}
        for place, value in self.changes.items():
            name = place.split(".")[-1]
            fields = value.items() if isinstance(value, dict) else ((name, value),)
            words |= {f"{field.removeprefix('num_')} {number}": None for field, number in fields}
        return ", ".join(words)

    @property
    def whole_tile(self) -> bool:
        """True if the variant sets all tile sizes of a matrix product, so that no tile size depends on the number of
        rows."""
        return any(place in self.changes for place in PRODUCT_TILES.values())


AS_IT_IS = Variant({})


@contextmanager
def applied(variant: Variant) -> Generator[None]:
    with ExitStack() as stack:
        for place, value in variant.changes.items():
            module_name, _, name = place.rpartition(".")
            module = import_module(f"jamba_server.kernels.triton.{module_name}")
            stack.enter_context(mock.patch.object(module, name, _changed(getattr(module, name), value)))
        yield


def _changed(old: Any, value: Any) -> Any:
    if isinstance(old, dict):
        return old | value
    if not callable(old):
        return value
    inner: Callable[..., Any] = old
    if isinstance(value, dict):

        def changed(*args: Any, **kwargs: Any) -> Any:
            found = inner(*args, **kwargs)
            return found | value if isinstance(found, dict) else found._replace(**value)

        return changed
    return lambda *args, **kwargs: value


def grid(place: str, *, exact: bool = True, **choices: tuple[int | None, ...]) -> Iterator[Variant]:
    """Yields a variant for every combination of the values in `choices`.

    `place` names a function or a dictionary in kernels.triton. `choices` has the values to try for each of its fields.
    """
    for values in product(*choices.values()):
        yield Variant({place: dict(zip(choices, values, strict=True))}, exact)


def constants(exact: bool, **choices: tuple[int, ...]) -> Iterator[Variant]:
    """Yields variants that each set one constant to one of the constant's values in `choices`. A key of the form
    `module__NAME` is the constant NAME of the module `module`."""
    for name, values in choices.items():
        yield from (Variant({name.replace("__", "."): value}, exact) for value in values)


def product_variants(op: str, rows: int, *, quantized: bool) -> list[Variant]:
    """Returns the variants of the matrix product in the op `linear` or `run_experts`, or of a gated product, for `rows`
    rows."""
    tiles = _quantized_tiles(rows) if quantized else _plain_tiles(rows)
    found = [Variant({PRODUCT_TILES[op]: tile}) for tile in tiles]
    if rows > FEW_ROWS:  # in which order the tiles are computed
        module = PRODUCT_TILES[op].split(".")[0]
        found += constants(True, **{f"{module}__GROUP": (4, 8, 32, 1 << 20)})
    return _distinct(found)


def _distinct(variants: Iterable[Variant]) -> list[Variant]:
    return list({variant.label: variant for variant in variants}.values())


def _tile(rows: int, columns: int, num_warps: int, num_stages: int, **more: int | None) -> Fields:
    return {"rows": rows, "columns": columns, "num_warps": num_warps, "num_stages": num_stages} | more


def _plain_tiles(rows: int) -> Iterator[Fields]:
    """Yields tile sizes for bfloat16 matrix products. The field `inner` is the number of elements of a tile along the
    inner dimension K."""
    few = product((16, 32, 64, 128), (64, 128), (4, 8), (3, 4, 6, 8))
    for columns, inner, warps, stages in few if rows <= 4 * FEW_ROWS else ():
        if 2 * (64 + columns) * inner * stages > SHARED_BYTES or (warps == 8 and (columns < 64 or inner > 64)):
            continue
        if stages == 3 and columns < 64:
            continue
        if rows <= FEW_ROWS or (columns >= 32 and inner == 64):
            yield _tile(64, columns, warps, stages, inner=inner)
    if rows > FEW_ROWS:
        for warps, stages in ((8, 3), (8, 4), (4, 3), (4, 4)):
            yield _tile(128, 128, warps, stages, inner=64)
        for warps, stages in ((8, 3), (8, 4)):
            yield _tile(128, 256, warps, stages, inner=64)
            yield _tile(256, 128, warps, stages, inner=64)
        yield from (_tile(64, 256, 4, 4, inner=64), _tile(128, 64, 4, 4, inner=64))
        yield from (_tile(128, 128, 8, 2, inner=128), _tile(128, 256, 8, 2, inner=128))


def _quantized_tiles(rows: int) -> Iterator[Fields]:
    """Yields tile sizes for matrix products with quantised weights.

    The matrix units take the weight as their left operand, so the weight's columns are their rows.
    """
    if rows <= FEWER_ROWS:
        for columns, warps, stages in product((64, 128), (4, 8), (3, 4, 6, 8)):
            if warps == 4 or columns == 128:
                yield _tile(16, columns, warps, stages)
        yield _tile(16, 64, 4, 6, max_registers=None)
        yield _tile(16, 64, 4, 6, max_registers=128)
    if FEWER_ROWS < rows <= 4 * FEW_ROWS:
        for tile_rows, (columns, warps), stages in product((16, 32, 64), ((64, 4), (128, 8)), (3, 4)):
            yield _tile(tile_rows, columns, warps, stages)
    if rows > FEW_ROWS:
        for columns, warps, stages in ((128, 8, 2), (128, 8, 3), (128, 8, 4), (128, 4, 3), (64, 4, 3), (256, 8, 2)):
            yield _tile(64, columns, warps, stages)
        for columns, warps, stages in ((64, 4, 3), (128, 8, 2), (128, 8, 3), (256, 8, 2)):
            yield _tile(128, columns, warps, stages)


def narrow_variants(rows: int) -> list[Variant]:
    """Returns the variants of the matrix product x_proj, whose kernel divides the inner dimension K into sections."""
    tiles = grid("sections.tile_for", columns=(16, 32, 64), num_stages=(3, 4, 6), num_warps=(4,))
    if rows > FEW_ROWS:
        wide = grid("sections.tile_for", rows=(64, 128), columns=(32, 64), num_stages=(3, 4), num_warps=(4, 8))
        tiles = iter([*tiles, *wide])
    sections = constants(False, sections__SECTION=(256, 1024))
    return _distinct([*tiles, *sections, *constants(True, sections__MANY_ROWS=(64, 1 << 20))])


def gated_variants(rows: int, *, quantized: bool) -> list[Variant]:
    """Returns the variants of a product with its activation. In the last one the activation has a kernel of its own."""
    return [*product_variants("gated", rows, quantized=quantized), Variant({"linear.silu_and_mul": "separate"})]


def sectioned_variants(rows: int, *, quantized: bool) -> list[Variant]:
    """Returns the variants of a matrix product whose weight has at most 4,096 rows, such as out_proj and down.

    K is not split with MOST_OUTPUTS 0, as it was not before, and its sections are shorter or longer with other numbers
    of PROGRAMS. The other variants are tiles, and whether one program computes all sections.
    """
    found = [*constants(False, sections__MOST_OUTPUTS=(0,), sections__PROGRAMS=(80, 240, 320))]
    found += constants(True, sections__MANY_ROWS_WIDE=(64, 1 << 20))
    tiles = _quantized_tiles(rows) if quantized else _plain_tiles(rows)
    found += [Variant({"sections.wide_tile_for": tile}) for tile in tiles]
    if rows <= FEW_ROWS and not quantized:  # without sections, the narrowest tiles give the most programs
        narrow = [_tile(64, 16, 4, stages, inner=inner) for inner, stages in ((64, 10), (128, 5))]
        found += [Variant({"sections.MOST_OUTPUTS": 0, "linear.tile_for": tile}, exact=False) for tile in narrow]
    if rows > FEW_ROWS and not quantized:  # without sections, the widest tile has room for its sums
        wide = _tile(128, 256, 8, 3, inner=64)
        found.append(Variant({"sections.MOST_OUTPUTS": 0, "linear.tile_for": wide}, exact=False))
    return _distinct(found)


def mamba_decode_variants() -> list[Variant]:
    found = [*constants(True, mamba__STAGES=(1, 3), mamba__PROGRAMS=(1, 256, 4096, 1 << 20))]
    found += constants(True, mamba__block_channels=(64, 128))
    found += grid("sections.tile_for", columns=(16, 64), num_stages=(4, 6))
    found += grid("mamba.tile_for", num_warps=(2, 8), exact=False)
    return [*found, *constants(False, sections__SECTION=(256, 1024))]


def attention_variants(*, decode: bool) -> list[Variant]:
    """Returns the variants of the attention kernels. Variants that change the constant KEYS (keys per tile), ROWS or
    SPLIT add the terms of sums in another order."""
    module = import_module("jamba_server.kernels.triton.attention")
    own = decode and hasattr(module, "DECODE_OPTIONS")
    place = "attention.DECODE_OPTIONS" if own else "attention.OPTIONS"
    options = [
        {"num_stages": stages, "num_warps": warps}
        for warps, stages in product((4, 8), (1, 2, 3, 4, 6)[: 5 if own else 3])
    ]
    found = [Variant({place: chosen}, exact=chosen["num_warps"] == 4) for chosen in options]
    for keys, chosen in product((16, 32, 64, 128), options):
        if chosen["num_stages"] in (2, 3):
            found.append(Variant({"attention._tile": {"KEYS": keys}, place: chosen}, exact=False))
    if decode:
        found += grid("attention._tile", ROWS=(16,), exact=False)
    else:
        found += grid("attention._tile", ROWS=(64, 128))
    if decode:
        found += constants(True, attention__DECODE_PROGRAMS=(1024, 1 << 30))
    return [*found, *constants(False, attention__SPLIT=(256, 1024))]


def scan_variants(implementation: str) -> list[Variant]:
    """Returns the variants of the selective scan kernel that prefill uses."""
    if implementation == "triton-chunked":
        found = [*constants(False, scan_chunked__CHUNK=(64, 128, 512))]
        found += constants(True, scan_chunked__BLOCK_CHANNELS=(8, 32), scan_chunked__GROUP=(2, 8))
        return found
    found = [Variant({"scan.GROUP": group}) for group in (2, 8)]
    found += [
        Variant({"scan.block_channels": block, "scan.GROUP": group}) for block, group in product((8, 16, 32), (2, 4, 8))
    ]
    return [*found, *grid("scan.OPTIONS", num_warps=(2,), exact=False)]
