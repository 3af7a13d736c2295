"""Chains: knows which KV pages the saved states need.

A saved state is of use only together with all pages of the prefix before it, which are its chain. If one of these pages
is evicted, the state can no longer lead to a prefix hit. A page that no saved state needs cannot lead to one either.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field


@dataclass(slots=True)
class _Node:
    """A page that a saved state needs. The page before it in the chain is `parent`, or None for the first page. The
    pages after it that are needed are `children`."""

    parent: bytes | None
    children: set[bytes] = field(default_factory=set[bytes])


class Chains:
    """A forest of the needed pages. Pages are named by their keys, and a saved state by the key of the last page of its
    chain, which is also the key of the state.

    Adding or removing a state takes a time proportional to the number of pages that become needed or cease to be.
    """

    def __init__(self) -> None:
        self._nodes: dict[bytes, _Node] = {}
        self._states: set[bytes] = set()

    def __contains__(self, page: bytes) -> bool:
        """Returns whether a saved state needs the page."""
        return page in self._nodes

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._nodes)

    def add(self, chain: Sequence[bytes]) -> list[bytes]:
        """Adds the state at the end of `chain`, which has the keys of the pages from the first to the last. Returns the
        pages that are needed from now on."""
        self._states.add(chain[-1])
        fresh: list[bytes] = []
        child: bytes | None = None
        for number in range(len(chain) - 1, -1, -1):
            page = chain[number]
            if is_fresh := page not in self._nodes:
                self._nodes[page] = _Node(chain[number - 1] if number else None)
                fresh.append(page)
            if child is not None:
                self._nodes[page].children.add(child)
            if not is_fresh:
                break  # the pages before a needed page are needed already
            child = page
        return fresh

    def remove(self, state: bytes) -> list[bytes]:
        """Removes a state. Returns the pages that are no longer needed."""
        self._states.discard(state)
        freed: list[bytes] = []
        page: bytes | None = state
        while page is not None and page in self._nodes and page not in self._states:
            node = self._nodes[page]
            if node.children:
                break
            del self._nodes[page]
            freed.append(page)
            if node.parent in self._nodes:
                self._nodes[node.parent].children.discard(page)
            page = node.parent
        return freed

    def states_after(self, page: bytes) -> list[bytes]:
        """Returns the states that need `page`."""
        found: list[bytes] = []
        left = [page] if page in self._nodes else []
        while left:
            page = left.pop()
            left += self._nodes[page].children
            if page in self._states:
                found.append(page)
        return sorted(found)  # the order of a set differs between runs

    def restrict(self, states: Iterable[bytes]) -> list[bytes]:
        """Forgets all states but `states`, and builds the forest anew, because an interrupt might have left it
        inconsistent. Returns the pages that were needed before."""
        before, self._nodes = self._nodes, {}
        kept, self._states = self._states.intersection(states), set()
        for state in kept:
            chain: list[bytes] = []
            page: bytes | None = state
            while page is not None and page in before:
                chain.append(page)
                page = before[page].parent
            if page is None:
                self.add(chain[::-1])
        return list(before)
