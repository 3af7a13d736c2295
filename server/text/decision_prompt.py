"""Writes the questions of the Decisions API as text, and reads the probabilities of their labels.

A question ends with the request to answer by one of a few labels: Yes or No, or the letter of an option. No label is
the beginning of another one, so their probabilities are those of different replies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Literal

Kind = Literal["predicate", "choice", "score"]


@dataclass(frozen=True, slots=True)
class Option:
    """An option of a question: its name, and what it means ("": not said)."""

    name: str
    description: str = ""


@dataclass(frozen=True, slots=True)
class DecisionQuestion:
    """A question about a text. A predicate has no options, a score has its levels, the lowest first."""

    kind: Kind
    instructions: str
    options: tuple[Option, ...] = ()

    @property
    def labels(self) -> tuple[str, ...]:
        """Returns the labels by which the model answers, in the order of the options; for a predicate Yes and No."""
        if self.kind == "predicate":
            return ("Yes", "No")
        letters = ascii_uppercase
        if len(self.options) <= len(letters):
            return tuple(letters[: len(self.options)])
        pairs = (first + second for first in letters for second in letters)
        return tuple(pair for pair, _ in zip(pairs, self.options, strict=False))

    @property
    def text(self) -> str:
        """Returns the text that follows the input."""
        if self.kind == "predicate":
            return f"Is this statement about the above true?\n{self.instructions}\nAnswer Yes or No only."
        lines = [
            f"{label}. {option.name}{': ' + option.description if option.description else ''}"
            for label, option in zip(self.labels, self.options, strict=True)
        ]
        what = "option" if self.kind == "choice" else "level"
        word = "letter" if len(self.options) <= len(ascii_uppercase) else "letters"
        first, last = self.labels[0], self.labels[-1]
        return "\n".join(
            [
                self.instructions,
                *lines,
                f"Answer with the {word} of the {what} that fits best ({first} to {last}) only.",
            ]
        )


def choice_confidence(probabilities: Sequence[float]) -> float:
    """Returns how far the highest probability is above chance: 0 if all options are equally likely, 1 if one is
    certain. transformers' decision models define it so."""
    chance = 1 / len(probabilities)
    return max(0.0, (max(probabilities) - chance) / (1 - chance))


def score_confidence(probabilities: Sequence[float]) -> float:
    """Returns how close to the most likely level the others are expected: 1 if that level is certain, 0 if the expected
    distance is at least that of equally likely levels from their middle. transformers defines it so."""
    count, best = len(probabilities), max(range(len(probabilities)), key=probabilities.__getitem__)
    distance = sum(p * abs(level - best) for level, p in enumerate(probabilities))
    uniform = sum(abs(level - (count - 1) / 2) for level in range(count)) / count
    return max(0.0, 1 - distance / uniform)


def expected_level(probabilities: Sequence[float]) -> float:
    return sum(level * p for level, p in enumerate(probabilities))


def with_question(messages: Sequence[Mapping[str, object]], question: str) -> list[dict[str, object]]:
    """Returns a conversation that ends with the question. It becomes the end of the last message if that is the user's,
    because some chat templates refuse two messages of the user in a row."""
    *earlier, last = messages
    if last.get("role") == "user" and isinstance(last["content"], str):
        return [*map(dict, earlier), {**last, "content": f"{last['content']}\n\n{question}"}]
    return [*map(dict, messages), {"role": "user", "content": question}]
