"""Where an engine process runs if several engines share a machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """The part of the machine that an engine process gets. By default it is the whole machine.

    `name` stands in front of the engine's lines in the log, such as "engine 1: ". The process runs on the `processors`
    with these numbers only; None means on all that its parent may use. `environment` has environment variables of the
    process beside those of its parent.
    """

    name: str = ""
    processors: tuple[int, ...] | None = None
    environment: Mapping[str, str] = field(default_factory=dict[str, str])


WHOLE_MACHINE = Place()
