"""Which parameters of a test run in every `make test`, and which only in `make test-nightly`.

A parameter is left to the nightly run if the other parameters have shown the same already. What remains is chosen by
position, never at random, so that every run has the same tests.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import product

import pytest
from _pytest.mark import ParameterSet


def nightly(values: Iterable[object]) -> list[ParameterSet]:
    """Returns the values as parameters of nightly tests. A tuple has the values of several arguments."""
    return [pytest.param(*_tuple(value), marks=pytest.mark.nightly) for value in values]


def each_pair(values: Mapping[str, Iterable[object]], *, indirect: Sequence[str] = ()) -> pytest.MarkDecorator:
    """Runs a test with every combination of values. A key names an argument, or several with commas between them.

    `make test` has every combination of all arguments but the last, each with one value of the last argument. This
    value changes from one combination to the next, so that it meets all values of the others.
    """
    lists = [list(choices) for choices in values.values()]
    found: list[ParameterSet] = []
    for places in product(*(range(len(choices)) for choices in lists)):
        chosen = [choices[place] for choices, place in zip(lists, places, strict=True)]
        arguments = [argument for value in chosen for argument in _tuple(value)]
        marks = () if sum(places[:-1]) % len(lists[-1]) == places[-1] else pytest.mark.nightly
        found.append(pytest.param(*arguments, marks=marks, id="-".join(map(_name, arguments))))
    return pytest.mark.parametrize([name for key in values for name in key.split(", ")], found, indirect=list(indirect))


def _tuple(value: object) -> tuple[object, ...]:
    return value if isinstance(value, tuple) else (value,)


def _name(argument: object) -> str:
    return str(getattr(argument, "__name__", argument)).removeprefix("torch.")
