"""Prepares the demonstration model's training text: stories, chats that ask for a story, small talk and picture books.

The files named in FILES are read from one folder. They are compressed to .xz and contain UTF-8 text or one JSON object
per line.
"""

from __future__ import annotations

import json
import lzma
import random
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STORIES, SMALL_TALK = "tinystories-subset.txt.xz", "chitchat-qna.jsonl.xz"
EXCHANGES, BOOKS = "chatterbot-english.jsonl.xz", "storybooks-cc-by.jsonl.xz"
FILES = (STORIES, SMALL_TALK, EXCHANGES, BOOKS)
# number of stories at the end of the stories' file that are not used to train the model or the tokenizer
HELD_OUT = 141
# Of the small-talk chats that begin with a question, the fraction GREETING_SHARE gets a greeting before the question.
GREETINGS, GREETING_SHARE = ("Hi", "Hello", "Hey", "Hi there"), 0.15
BOS, EOS, EOM = "<|startoftext|>", "<|endoftext|>", "<|eom|>"
STYLES = ("friendly", "caring")  # only these two of the five styles of small talk are used
CHAT_STORIES = 0.45  # fraction of the stories in an epoch that are written as the answer to a request
# number of small-talk chats in an epoch, and number of picture books in an epoch
SMALL_TALK_SHARE, BOOK_SHARE = 5000, 240
SYSTEM = ("You are a helpful assistant.", "You are a friendly storyteller.", "You tell stories to children.")
REQUESTS = (
    "Tell me a story about {}.",
    "Tell me a story about {}.",
    "Please tell me a story about {}.",
    "Can you tell me a story about {}?",
    "Write a short story about {}.",
    "Write a story about {}.",
    "I would like a story about {}.",
    "A story about {}, please.",
    "tell me a story about {}",
    "Could you tell me a short story about {}?",
)
OPEN_REQUESTS = (
    "Tell me a story.",
    "Tell me a story",
    "Please tell me a story.",
    "Write a story.",
    "Can you tell me a story?",
)
# These words often follow "a" or "the" in stories, but nobody would ask for a story about one of these words. No
# request is therefore made from one of these words.
_DULL = re.compile(
    "time|day|lot|little|big|great|good|very|new|old|small|long|way|bit|while|few|other|same|next|first|last|one|"
    "end|thing|moment|part|piece|special|nice|happy|sad|kind|best|most|more|whole|red|blue|green|yellow|loud|"
    "beautiful|pretty|brave|scary|dark|bright|tall|shiny|soft|strong|strange|fun|funny|cold|hot|warm|wise|lesson|"
    "morning|night|second|rest|top|bottom|side|middle|back|front|young|three|two|had|was|and|but|tiny|fast|lucky|"
    "huge|mean|poor|colorful|delicious|friendly|magical|mysterious|white|black|brown|pink|purple|wonderful|deep|"
    "surprise|idea|right|only|there|together|too|again|came|began|away|home|outside|inside|before|down|she|he|they|"
    "just|around|anymore|air|thought|look|people|place|story|ground|smile|walk|face|voice|problem|plan|up|out|her|him|"
    "it|so|then|not|all|back|went|ran|took|got|felt|knew|heard|found|gave|made|sat|kept|off|over|very|about|after|"
    r"nearby|fell|woke|grew|flew|put|let|met|left|(?!bed|seed)\w+ed|\w{3,}est|\w+ly"
)
# This pattern finds nouns. A word counts as a noun if the word ends a phrase that begins with an article. The phrase
# must end before a punctuation mark or a word that is no noun. Words that end with a single "s" are left out, because a
# plural does not go with "a".
_NOUN = re.compile(
    r"\b(?:a|an|the|The|A) (?:[a-z]+ )??([a-z]{2,}(?:[a-rt-z]|ss))"
    r"(?=[.,!?]| (?:and|was|is|in|on|at|to|that|who|had|named|called|with|said|saw|went|wanted|for|from|ran|looked|"
    r"but)\b)"
)
_QUESTIONS = ("how ", "what ", "who ", "can ", "could ", "do ", "are ", "where ", "why ", "tell ", "will ", "would ")
_NAME = re.compile(r"\bnamed ([A-Z][a-z]+)\b")


@dataclass(frozen=True, slots=True)
class Text:
    stories: list[str]
    held_out: list[str]
    small_talk: list[tuple[list[str], str]]
    exchanges: list[list[str]]
    books: list[str]


def read(folder: Path) -> Text:
    with lzma.open(folder / STORIES, "rt", encoding="utf-8") as file:
        stories = [story for part in file.read().split(EOS) if (story := part.strip())]
    talk = [(item["questions"], item["answer"]) for item in _records(folder / SMALL_TALK) if item["style"] in STYLES]
    exchanges = [item["turns"] for item in _records(folder / EXCHANGES)]
    books = [item["title"] + "\n" + " ".join(item["pages"]) for item in _records(folder / BOOKS)]
    return Text(stories[:-HELD_OUT], stories[-HELD_OUT:], talk, exchanges, books)


def _records(path: Path) -> Iterator[dict[str, Any]]:
    with lzma.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def chat(turns: list[str], system: str = "") -> str:
    """Returns a chat as text in the format of the chat template. The first turn is the user's, and user and assistant
    alternate."""
    text = f"{BOS}<|bom|><|system|> {system}{EOM}"
    for number, turn in enumerate(turns):
        text += f"<|bom|><|{'assistant' if number % 2 else 'user'}|> {turn}{EOM}"
    return text


def request(story: str, random_: random.Random) -> str:
    """Returns a request for a story. The request contains one to three frequent nouns of the story, and sometimes the
    name of a character."""
    counts = Counter(word for word in _NOUN.findall(story) if not _DULL.fullmatch(word))
    words = [word for word, _ in counts.most_common(4)]
    if not words or random_.random() < 0.08:
        return random_.choice(OPEN_REQUESTS)
    chosen = random_.sample(words, min(len(words), random_.choice((1, 2, 2, 3))))
    subjects = [("an " if word[0] in "aeiou" else "a ") + word for word in chosen]
    names = _NAME.findall(story)
    if names and random_.random() < 0.2:
        subjects[0] += (
            f" and {names[0]}"
            if random_.random() < 0.3
            else f" named {names[0]}"
            if f"{chosen[0]} named {names[0]}" in story
            else ""
        )
    joined = ", ".join(subjects[:-1]) + " and " + subjects[-1] if len(subjects) > 1 else subjects[0]
    return random_.choice(REQUESTS).format(joined)


def epoch(text: Text, seed: int) -> list[str]:
    """Returns the documents of one epoch, shuffled. An epoch contains each training story once.

    The seed determines the requests, and the choice of small talk and picture books.
    """
    random_ = random.Random(seed)
    documents: list[str] = []
    for story in text.stories:
        if random_.random() < CHAT_STORIES:
            system = random_.choice(SYSTEM) if random_.random() < 0.2 else ""
            documents.append(chat([request(story, random_), story], system))
        else:
            documents.append(BOS + story + EOS)
    for _ in range(SMALL_TALK_SHARE):
        turns: list[str] = []
        for _ in range(random_.choice((1, 1, 1, 2))):
            questions, answer = random_.choice(text.small_talk)
            turns += [random_.choice(questions), answer]
        if random_.random() < GREETING_SHARE and turns[0].lower().startswith(_QUESTIONS):
            turns[0] = f"{random_.choice(GREETINGS)}, {turns[0][0].lower()}{turns[0][1:]}"
        documents.append(chat(turns, SYSTEM[0] if random_.random() < 0.1 else ""))
    documents += [chat(turns[: len(turns) // 2 * 2]) for turns in text.exchanges if len(turns) > 1]
    documents += [BOS + book + EOS for book in random_.sample(text.books, min(BOOK_SHARE, len(text.books)))]
    random_.shuffle(documents)
    return documents


def tokenizer_text(text: Text) -> Iterator[str]:
    """Yields the lines from which the tokenizer learns its vocabulary."""
    for part in (*text.stories, *text.books[::3]):
        yield from part.split("\n")
    for questions, answer in text.small_talk:
        yield from (answer, *questions[:20])
