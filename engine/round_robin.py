"""The class `RoundRobin` is a queue in which several owners take turns."""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import Generic, TypeVar

T = TypeVar("T")


class RoundRobin(Generic[T]):
    """A queue of items that belong to owners, such as API keys. The owners take turns: `pop` returns one item of each
    owner before it returns a second item of any of them. The items of one owner keep their order. So an owner with
    thousands of items delays each other owner by one item at a time."""

    def __init__(self) -> None:
        # The owner whose turn is next comes first. Only owners with items are in this dict.
        self._items: OrderedDict[str, deque[T]] = OrderedDict()
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def put(self, owner: str, item: T) -> None:
        self._items.setdefault(owner, deque()).append(item)
        self._length += 1

    def pop(self) -> T:
        """Removes and returns the next item. The queue must not be empty."""
        owner, items = next(iter(self._items.items()))
        item = items.popleft()
        self._length -= 1
        if items:
            self._items.move_to_end(owner)
        else:
            del self._items[owner]
        return item

    def remove(self, owner: str, item: T) -> None:
        """Removes an item of an owner, which must be in the queue."""
        items = self._items[owner]
        items.remove(item)
        self._length -= 1
        if not items:
            del self._items[owner]
