"""Finds the merges of a byte-pair vocabulary whose file does not list them.

A GGUF file has the pieces of a vocabulary with a score for each. The score says how early a piece is made of two
others. Published Jamba files have the same score for all pieces. Both of Jamba's tokenizers number the pieces in the
order in which they were learnt, so the order is then taken from the ids.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from jamba_server.engine.errors import CheckpointError, shown
from jamba_server.engine.gguf.vocabulary import BYTE, CONTROL, Vocabulary

SPACE: Final = "\u2581"  # stands for a space in the pieces
_MAX_PIECE: Final = 128  # characters; finding the splits of a piece takes time that grows with the square of its length
Merge = tuple[str, str]


def find_merges(vocabulary: Vocabulary) -> list[Merge]:
    """Returns the pairs of pieces that are merged, the most urgent pair first. A piece is made of two others in every
    way in which it can be split into two pieces; splits are ordered by the id of the left part, then of the right part.

    Raises CheckpointError if a piece is too long, or if all scores are equal and the pieces are not numbered in the
    order in which they were learnt.
    """
    kinds = vocabulary.types
    if (longest := max(map(len, vocabulary.pieces))) > _MAX_PIECE:
        raise vocabulary.refusal(
            "tokenizer.ggml.tokens", f"a piece has {longest:,} characters; at most {_MAX_PIECE} are expected"
        )
    ids = {piece: id for id, piece in enumerate(vocabulary.pieces) if kinds[id] not in (CONTROL, BYTE)}
    splits = {id: pairs for piece, id in ids.items() if (pairs := _splits(piece, ids))}
    scores = vocabulary.scores
    if len({scores[id] for id in splits}) > 1:
        order = sorted(splits, key=lambda id: (-scores[id], id))
    else:
        order = _order_of_ids(vocabulary, ids, splits)
    return [pair for id in order for pair in splits[id]]


def _splits(piece: str, ids: Mapping[str, int]) -> list[Merge]:
    pairs = [(piece[:i], piece[i:]) for i in range(1, len(piece)) if piece[:i] in ids and piece[i:] in ids]
    return sorted(pairs, key=lambda pair: (ids[pair[0]], ids[pair[1]])) if len(pairs) > 1 else pairs


def _order_of_ids(vocabulary: Vocabulary, ids: Mapping[str, int], splits: Mapping[int, Sequence[Merge]]) -> list[int]:
    """Returns the ids of the pieces in `splits` in the order in which they were learnt: by id, but first the learnt
    pieces, and after them the runs of spaces and the pieces that were added in front of the first learnt one."""
    pieces = vocabulary.pieces
    first = _first_learnt(vocabulary, splits)
    late = {id for id in splits if id < first or not pieces[id].strip(SPACE)}
    order = [id for id in sorted(splits) if id not in late] + sorted(late)
    place = {id: number for number, id in enumerate(order)}

    def is_early(part: str, id: int) -> bool:
        return len(part) == 1 or place.get(ids[part], len(order)) < place[id]

    for piece, id in ids.items():
        if id < first or len(piece) == 1:
            continue
        if not any(is_early(left, id) and is_early(right, id) for left, right in splits.get(id, ())):
            raise CheckpointError(
                f"{vocabulary.file.path}: all pieces in tokenizer.ggml.tokens have the same score, and the piece "
                f"{shown(piece)} (id {id}) is not made of earlier ones, so the order in which text is split into "
                "tokens is unknown; give the model's tokenizer.json with --tokenizer."
            )
    return order


def _first_learnt(vocabulary: Vocabulary, splits: Mapping[int, Sequence[Merge]]) -> int:
    """Returns the id of the first learnt piece. Special pieces and single bytes have lower ids."""
    after_bytes = max((id + 1 for id, kind in enumerate(vocabulary.types) if kind == BYTE), default=0)
    return min((id for id in splits if id >= after_bytes), default=len(vocabulary.pieces))
