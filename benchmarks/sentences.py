"""How many sentences a second quick-thoughts trains on, beside a plain loop in PyTorch.

    python benchmarks/sentences.py [--rounds 40] [--batch 400] [--width 64] [--hidden 64]

Both train the bidirectional GRUs of quick-thoughts (Logeswaran & Lee 2018) from the same weights,
with its loss and Adam, on the same blocks of consecutive sentences of CPython's language reference.

- ours: the trainer's step. Sentences are rows of a table on the device; padding is left out before
  the words are looked up; the loss is `hcl.neighbours.quick_thoughts`.
- plain loop: written from the paper with torch alone. A block's sentences are a list of tensors,
  padded to the longest of them; embeddings of all places are packed; the scores are a dense matrix
  whose diagonal is set to 0; the cross-entropy is with targets uniform on the neighbours.

In a round each takes one step on the same block, in an order drawn anew; the figure is the median
over rounds of the plain loop's time divided by ours. The time is the processor time of one thread,
or with a GPU the wall clock between synchronisations.
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_sequence
from tqdm import tqdm

from hcl import memory
from hcl.atomic import whole_or_nothing
from hcl.objective import Objective
from hcl.provenance import provenance
from hcl.runs import Run
from hcl.train import build_model, load_data, optimizers_of

OURS, PLAIN = "ours", "plain loop"
FIELDS = {
    "seconds": "median time of a step",
    "sentences_per_second": "of a block, by that time",
    "ratio": "median over rounds of its time divided by ours; _q1, _q3: quartiles",
}
Entrant = Callable[[Tensor], Tensor]  # a step on the rows of a block; its loss


def run_of(args: argparse.Namespace) -> Run:
    """Quick-thoughts as published: inner products as they are, no temperature."""
    return Run(
        data="pydoc", encoder="quickthoughts", method="quick_thoughts", normalize="none",
        temperature=1.0, batch=args.batch, epochs=1, lr=5e-4, weight_decay=0.0,
        encoder_args={"width": args.width, "hidden": args.hidden},
    )  # fmt: skip


class Ours:
    """The trainer's step."""

    def __init__(self, run: Run, data: Any):
        self.model = build_model(run, data).to(data.x_train.device).train()
        self.objective = Objective(run, self.model, data)
        self.objective.begin(1)
        fused = data.x_train.device.type == "cuda"
        (self.optimizer,), _ = optimizers_of(run, self.model, 1, fused=fused)
        self.generator = torch.Generator(data.x_train.device)

    def __call__(self, rows: Tensor) -> Tensor:
        loss = self.objective(rows, self.generator)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return loss.detach()


class PlainGRU(nn.Module):
    """Padded words (B, L) and their numbers to the last states of both directions."""

    def __init__(self, words: int, width: int, hidden: int):
        super().__init__()
        self.words = nn.Embedding(words, width, padding_idx=0)
        self.gru = nn.GRU(width, hidden, batch_first=True, bidirectional=True)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(
            self.words(tokens), lengths, batch_first=True, enforce_sorted=False
        )
        _, last = self.gru(packed)
        return torch.cat([last[0], last[1]], dim=1)


class Plain:
    """The same step as a user would write it from the paper."""

    def __init__(self, run: Run, data: Any):
        self.device = data.x_train.device
        sizes = len(data.vocabulary), run.encoder_args["width"], run.encoder_args["hidden"]
        self.f, self.g = (PlainGRU(*map(int, sizes)).to(self.device) for _ in range(2))
        parameters = [*self.f.parameters(), *self.g.parameters()]
        self.optimizer = torch.optim.Adam(parameters, lr=run.lr)
        self.sentences = [row[row != 0].long() for row in data.tokens.cpu()]
        self.book = data.book.cpu()

    def __call__(self, rows: Tensor) -> Tensor:
        block = [self.sentences[i] for i in rows.tolist()]
        lengths = torch.tensor([len(sentence) for sentence in block])
        tokens = pad_sequence(block, batch_first=True).to(self.device)
        scores = self.f(tokens, lengths) @ self.g(tokens, lengths).T
        scores = scores.masked_fill(torch.eye(len(block), device=self.device).bool(), 0.0)
        target = neighbours(self.book[rows.cpu()]).to(self.device)
        known = target.sum(dim=1) > 0  # a book of one sentence has no neighbours
        loss = F.cross_entropy(scores[known], target[known])
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach()


def neighbours(book: Tensor) -> Tensor:
    """The targets (B, B) of consecutive sentences: uniform on those beside one in its book."""
    beside = torch.zeros(len(book), len(book))
    same = (book[1:] == book[:-1]).float()
    beside += torch.diag(same, 1) + torch.diag(same, -1)
    return beside / beside.sum(dim=1, keepdim=True).clamp(min=1)


def entrants(run: Run, data: Any) -> dict[str, Entrant]:
    """Both, from the same weights."""
    ours, plain = Ours(run, data), Plain(run, data)
    encoder = cast(Any, ours.model.encoder)
    plain.f.load_state_dict(encoder.f.state_dict())
    plain.g.load_state_dict(encoder.g.state_dict())
    return {OURS: ours, PLAIN: plain}


def now() -> float:
    if not torch.cuda.is_available():
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def race(entered: dict[str, Entrant], blocks: list[Tensor], rounds: int) -> list[dict[str, float]]:
    """Seconds of everybody's step in every round."""
    names, shuffle = list(entered), random.Random(0).shuffle
    for entrant in entered.values():
        entrant(blocks[0])  # warm up
    times = []
    for k in tqdm(range(rounds), desc="rounds", leave=False):
        shuffle(names)
        row = {}
        for name in names:
            start = now()
            entered[name](blocks[k % len(blocks)])
            row[name] = now() - start
        times.append(row)
    return times


def summary(times: list[dict[str, float]], batch: int) -> dict[str, dict[str, float]]:
    """Median seconds, sentences a second, and the median ratio to ours with its quartiles."""
    found = {}
    for name in (OURS, PLAIN):
        low, middle, high = statistics.quantiles([t[name] / t[OURS] for t in times], n=4)
        median = statistics.median(t[name] for t in times)
        found[name] = {
            "seconds": median, "sentences_per_second": batch / median,
            "ratio": middle, "ratio_q1": low, "ratio_q3": high,
        }  # fmt: skip
    return found


def arguments(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=400)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    args = parser.parse_args(words)
    for name, least in (("batch", 4), ("width", 1), ("hidden", 1), ("rounds", 2)):
        if (value := getattr(args, name)) < least:
            parser.error(f"--{name} {value}: must be {least} or more")
    return args


def main(words: list[str] | None = None) -> None:
    args = arguments(words)
    torch.set_num_threads(1)
    memory.keep()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    run = run_of(args)
    data: Any = load_data(run, device)
    blocks = list(data.blocks(args.batch, torch.Generator(device).manual_seed(0)))
    found = summary(race(entrants(run, data), blocks, args.rounds), args.batch)
    clock = "processor time of one thread" if device.type == "cpu" else "wall"
    setting = {name: getattr(args, name) for name in ("batch", "width", "hidden", "rounds")}
    setting |= {"data": "pydoc", "sentences": len(data.x_train), "clock": clock}
    setting |= {"vocabulary": len(data.vocabulary), "max_words": data.max_words}
    body = {"setting": setting, "fields": FIELDS, "step": found, "provenance": provenance(device)}
    with whole_or_nothing(args.out) as part:
        part.write_text(json.dumps(body, indent=1, allow_nan=False) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
