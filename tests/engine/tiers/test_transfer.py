"""Segments that move to another folder, under the keys of another cache salt."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from jamba_server.engine.cache.tiers.segment import Segment
from jamba_server.engine.disk_tier.format import BadSegment
from jamba_server.engine.disk_tier.transfer import Arrivals, find_chain
from tests.engine.tiers.files import BLOCK_SIZE, open_folder, segment

ENDS = (7, 12, 13, 30)  # in a page, at the end of one, and two in the same page
TOKENS = [(7 * i) % 1000 for i in range(40)]


def chain(salt: str) -> Iterator[Segment]:
    return (segment(TOKENS[:end], start, salt=salt) for start, end in zip((0, *ENDS[:-1]), ENDS, strict=True))


def test_a_chain_gets_the_keys_of_another_salt(tmp_path: Path) -> None:
    one, other = open_folder(tmp_path / "one"), open_folder(tmp_path / "other")
    for part in chain("a"):
        one.write(part)
    found = find_chain(one, TOKENS, "a")
    assert [header.entry for header in found] == [part.entry for part in chain("a")]
    assert find_chain(one, TOKENS, "b") == []
    arrivals = Arrivals(other, "b")
    for header in found:
        arrivals.take(one.path_of(header.entry.key))
    assert arrivals.num_written == len(ENDS)
    moved = find_chain(other, TOKENS, "b")
    expected = list(chain("b"))
    assert [header.entry for header in moved] == [part.entry for part in expected]
    for part in expected:
        read = other.read(part.entry)
        assert (read.tokens, read.tensors) == (part.tokens, part.tensors)
    assert find_chain(other, TOKENS, "a") == []
    again = Arrivals(other, "b")
    again.take(one.path_of(found[0].entry.key))
    assert again.num_written == 0, "it is there already"


def test_the_longest_whole_chain_is_found(tmp_path: Path) -> None:
    folder, parts = open_folder(tmp_path), list(chain(""))
    for part in parts:
        folder.write(part)
    assert len(find_chain(folder, TOKENS[:29], "")) == 3
    assert len(find_chain(folder, [*TOKENS[:12], 5, *TOKENS[13:]], "")) == 2
    folder.path_of(parts[1].key).unlink()
    assert [header.entry for header in find_chain(folder, TOKENS, "")] == [parts[0].entry]
    folder.path_of(parts[0].key).unlink()
    assert find_chain(folder, TOKENS, "") == []


@pytest.mark.parametrize(("order", "good"), [((1,), 0), ((0, 2), 1), ((0, 0), 1)])
def test_a_chain_with_gaps_is_refused(tmp_path: Path, order: tuple[int, ...], good: int) -> None:
    one, other, parts = open_folder(tmp_path / "one"), open_folder(tmp_path / "other"), list(chain(""))
    for part in parts:
        one.write(part)
    arrivals = Arrivals(other, "")
    for number in order[:good]:
        arrivals.take(one.path_of(parts[number].key))
    with pytest.raises(BadSegment, match="does not continue the segment before it"):
        arrivals.take(one.path_of(parts[order[good]].key))
    assert len(other.keys()) == good


def test_a_segment_of_another_text_is_refused(tmp_path: Path) -> None:
    """It begins where the one before it ends, inside a page whose first tokens differ."""
    assert ENDS[0] % BLOCK_SIZE
    one, other = open_folder(tmp_path / "one"), open_folder(tmp_path / "other")
    first, stranger = segment(TOKENS[: ENDS[0]], 0), segment([*range(500, 500 + ENDS[1])], ENDS[0])
    for part in (first, stranger):
        one.write(part)
    arrivals = Arrivals(other, "")
    arrivals.take(one.path_of(first.key))
    with pytest.raises(BadSegment, match="does not continue the segment before it"):
        arrivals.take(one.path_of(stranger.key))


def test_a_segment_of_another_model_is_refused(tmp_path: Path) -> None:
    one, other = open_folder(tmp_path / "one", model=1), open_folder(tmp_path / "other", model=2)
    part = next(chain(""))
    one.write(part)
    with pytest.raises(BadSegment, match="another model or configuration has written it"):
        Arrivals(other, "").take(one.path_of(part.key))
