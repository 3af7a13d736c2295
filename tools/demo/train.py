"""Trains the demonstration model on a CPU. Training can be interrupted and resumed.

    python tools/demo/train.py --data FOLDER --out FOLDER --minutes 60

The folder --data contains the files that data.FILES names. The folder --out receives tokenizer.json, last.pt, best.pt
(with the lowest held-out loss) and log.jsonl. To resume from last.pt, start the same command again.

The learning rate depends on the time since the first start. It is constant until 65 % of the minutes have passed, then
it falls linearly to zero. A running average of the weights is evaluated and exported.
"""

from __future__ import annotations

import os

os.environ.setdefault(
    "OMP_WAIT_POLICY", "PASSIVE"
)  # idle threads must sleep, because torch and the kernels of scan.cpp each have a thread pool on the same cores

import argparse
import json
import math
import random
import time
from dataclasses import asdict
from pathlib import Path

import data
import tokenizers
import torch
from model import BALANCE, Jamba, Shape
from optimizer import Optimizer
from torch import Tensor
from train_tokenizer import train_tokenizer

SEED = 20
# a step has TOKENS tokens; after the fraction RAMP of the training time, a step has 2 * TOKENS tokens
TOKENS, RAMP = 4096, 0.35
# Number of tokens in each row of the batch: LENGTH in most steps, LONG in every eighth step, and LONGEST in every
# thirty-second step.
LENGTH, LONG, LONGEST = 512, 1024, 2048
# The learning rate rises during the first WARM_UP steps. It falls during the last part of the training time; COOL_DOWN
# is this part as a fraction of the training time.
WARM_UP, COOL_DOWN = 30, 0.35
# Approximate number of steps over which the weights are averaged. The averaged weights have a lower held-out loss than
# the weights of a single step.
WINDOW = 150
EVALUATE_SECONDS, SAVE_SECONDS = 240, 150


class Stream:
    """An endless stream of training tokens. The documents of each epoch are encoded and concatenated when the epoch
    begins."""

    def __init__(self, text: data.Text, tokenizer: tokenizers.Tokenizer, position: tuple[int, int]) -> None:
        self.text, self.tokenizer = text, tokenizer
        self.number, self.offset = position
        self.ids = self._encode()

    def _encode(self) -> Tensor:
        documents = data.epoch(self.text, SEED + self.number)
        encoded = self.tokenizer.encode_batch(documents, add_special_tokens=False)
        return torch.tensor([number for item in encoded for number in item.ids])

    def take(self, count: int) -> Tensor:
        """Returns the next `count` + 1 tokens. The first `count` tokens are the model's input. The final token is only
        a target."""
        if self.offset + count + 1 > len(self.ids):
            self.number, self.offset = self.number + 1, 0
            self.ids = self._encode()
        self.offset += count
        return self.ids[self.offset - count : self.offset + 1]


def held_out_batches(stories: list[str], tokenizer: tokenizers.Tokenizer) -> list[tuple[Tensor, Tensor]]:
    """Returns the held-out stories as batches, each a pair (ids, targets). The stories of a batch have similar lengths.

    Each row is one story from <|startoftext|> to <|endoftext|>. Padding has the target -1.
    """
    texts = [data.BOS + story + data.EOS for story in stories]
    rows = sorted((item.ids for item in tokenizer.encode_batch(texts, add_special_tokens=False)), key=len)
    batches: list[tuple[Tensor, Tensor]] = []
    for start in range(0, len(rows), 16):
        part = rows[start : start + 16]
        ids = torch.zeros(len(part), max(map(len, part)) - 1, dtype=torch.long)
        targets = torch.full_like(ids, -1)
        for number, row in enumerate(part):
            ids[number, : len(row) - 1] = torch.tensor(row[:-1])
            targets[number, : len(row) - 1] = torch.tensor(row[1:])
        batches.append((ids, targets))
    return batches


@torch.no_grad()
def evaluate(model: Jamba, batches: list[tuple[Tensor, Tensor]]) -> float:
    """Returns the model's negative log-likelihood in nats, summed over all targets in `batches` except padding."""
    return sum(float(model(ids, targets)[0]) * int((targets >= 0).sum()) for ids, targets in batches)


class Training:
    def __init__(self, folder: Path, text: data.Text, minutes: float) -> None:
        self.folder = folder
        self.started, self.step, self.tokens, self.best, position = time.time(), 0, 0, math.inf, (0, 0)
        torch.manual_seed(SEED)
        random.seed(SEED)
        self.shape = Shape()
        self.model, self.average = Jamba(self.shape), Jamba(self.shape)
        self.average.load_state_dict(self.model.state_dict())
        self.optimizer = Optimizer(self.model)
        self.tokenizer = self._tokenizer(text)
        if (folder / "last.pt").exists():
            saved = torch.load(folder / "last.pt", weights_only=True)
            self.model.load_state_dict(saved["model"])
            self.average.load_state_dict(saved["average"])
            self.optimizer.load(saved["optimizer"])
            self.started, self.step, self.tokens = saved["started"], saved["step"], saved["tokens"]
            self.best, position = saved["best"], saved["position"]
        self.seconds = minutes * 60
        self.stream = Stream(text, self.tokenizer, position)
        self.batches = held_out_batches(text.held_out, self.tokenizer)
        self.bytes = sum(len(story.encode()) for story in text.held_out)

    def _tokenizer(self, text: data.Text) -> tokenizers.Tokenizer:
        path = self.folder / "tokenizer.json"
        if not path.exists():
            tokenizer = train_tokenizer(data.tokenizer_text(text), self.shape.vocab_size)
            path.write_text(tokenizer.to_str(pretty=False), encoding="utf-8")
        return tokenizers.Tokenizer.from_file(str(path))

    def passed(self) -> float:
        """Returns the fraction of the training time that has passed."""
        return (time.time() - self.started) / self.seconds

    def one_step(self) -> float:
        length = LONGEST if self.step % 32 == 31 else LONG if self.step % 8 == 7 else LENGTH
        ids = self.stream.take(TOKENS if self.passed() < RAMP else 2 * TOKENS)
        loss, balance = self.model(ids[:-1].view(-1, length), ids[1:].view(-1, length))
        (loss + BALANCE * balance).backward()
        torch.nn.utils.clip_grad_norm_(self.optimizer.adam.param_groups[-1]["params"], 1.0)
        warm, cool = (self.step + 1) / WARM_UP, (1 - self.passed()) / COOL_DOWN
        self.optimizer.step(max(0.0, min(1.0, warm, cool)))
        self.model.zero_grad(set_to_none=True)
        self.step += 1
        with torch.no_grad():
            for mean, parameter in zip(self.average.parameters(), self.model.parameters(), strict=True):
                mean.lerp_(parameter, 1 / min(self.step, WINDOW))
        self.tokens += len(ids) - 1
        return float(loss.detach())

    def save(self, name: str) -> None:
        state = {"model": self.model.state_dict(), "average": self.average.state_dict(), "shape": asdict(self.shape)}
        state |= {"optimizer": self.optimizer.state()}
        state |= {"started": self.started, "step": self.step, "tokens": self.tokens, "best": self.best}
        state |= {"position": (self.stream.number, self.stream.offset)}
        torch.save(state, self.folder / f"{name}.partial")
        (self.folder / f"{name}.partial").replace(self.folder / f"{name}.pt")

    def report(self, loss: float | None) -> None:
        nats = evaluate(self.average, self.batches)
        bits = nats / math.log(2) / self.bytes
        line = {
            "step": self.step,
            "tokens": self.tokens,
            "seconds": round(time.time() - self.started),
            "epoch": self.stream.number,
        }
        line |= {"train_nats": loss and round(loss, 4), "held_out_bits_per_byte": round(bits, 5)}
        with (self.folder / "log.jsonl").open("a") as log:
            log.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)
        if bits < self.best:
            self.best = bits
            self.save("best")

    def run(self) -> None:
        evaluated = saved = shown = time.time()
        average: float | None = None
        first = self.step
        while self.passed() < 1:
            loss = self.one_step()
            average = loss if average is None else 0.97 * average + 0.03 * loss
            now = time.time()
            if now - evaluated > EVALUATE_SECONDS:
                self.report(average)
                evaluated = now
            if now - saved > SAVE_SECONDS:
                self.save("last")
                saved = now
            if now - shown > 20:
                shown = now
                print(
                    f"step {self.step} loss {average:.3f} steps {self.step - first} passed {self.passed():.1%}",
                    flush=True,
                )
        self.report(average)
        self.save("last")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demonstration model on a CPU.")
    parser.add_argument("--data", type=Path, required=True, help="folder with " + ", ".join(data.FILES))
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints and the log")
    parser.add_argument("--minutes", type=float, required=True, help="training time, counted from the first start")
    parser.add_argument("--threads", type=int, default=2, help="number of CPU threads")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    Training(out, data.read(arguments.data), arguments.minutes).run()


if __name__ == "__main__":
    main()
