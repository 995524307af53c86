"""What an epoch of InfoGraph with hard negatives costs, beside the released code's loop.

    python benchmarks/graphs.py [--data mutag,proteins,imdb-binary,graphs] [--rounds 7]

Everybody trains the same network (GIN of three layers, two heads) with the same loss on the same
batches, and runs once in a round, in an order drawn anew.

- ours: graphs are picked out of one large graph on the device, the masks are one scatter.
- released loop: our transcription of the released code from its description. PyTorch Geometric's
  DataLoader joins a list of graphs anew in every epoch, and the two masks are filled in a Python
  loop over nodes, entry by entry.
- loader, masks at once: the same loader with our loss, to tell the two savings apart.

`masks` is the making of the two masks of a batch alone, which is what the loop was.

The time is the processor time of one thread, or with a GPU the wall clock between synchronisations.
A data set that HCL_DATA does not have is left out and said to be; "graphs" are the synthetic ones.
"""

import argparse
import json
import math
import random
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from hcl import memory
from hcl.atomic import whole_or_nothing
from hcl.graphs import Heads, local_global_released
from hcl.graphs.gin import GIN
from hcl.graphs.pyg import pyg
from hcl.provenance import provenance
from hcl.runs import Run
from hcl.train import load_data

OURS, LOOP, LOADER = "ours", "released loop", "loader, masks at once"
FIELDS = {
    "seconds": "median time of an epoch, or of the masks of one batch",
    "ratio": "median over rounds of its time divided by ours; _q1, _q3: quartiles",
}
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
Entrant = Callable[[], Any]


def looped(nodes: Tensor, graphs: Tensor, batch: Tensor, beta: float = 1.0) -> Tensor:
    """The released loss with its masks filled node by node; tau_plus is 0.5."""
    v, g, tau_plus = len(nodes), len(graphs), 0.5
    pos_mask, neg_mask = looped_masks(batch, g)
    res = nodes @ graphs.t()
    p, q = res * pos_mask, res * neg_mask
    e_pos = math.log(2) - F.softplus(-p) - tau_plus / (1 - tau_plus) * F.softplus(p)
    e_neg = F.softplus(-q) + q
    reweight = torch.exp(beta * -2 * q / torch.max(q.max(), q.min().abs()))
    reweight = reweight / reweight.mean(dim=1, keepdim=True)
    e_neg = reweight * e_neg / (1 - tau_plus) - math.log(2)
    return e_neg.sum() / (v * (g - 1)) - e_pos.sum() / v


def looped_masks(batch: Tensor, g: int) -> tuple[Tensor, Tensor]:
    """Where the graph is the node's own (V, g), and where not, as the released code fills them."""
    pos_mask = torch.zeros(len(batch), g, device=batch.device)
    neg_mask = torch.ones(len(batch), g, device=batch.device)
    for node, graph in enumerate(batch):
        pos_mask[node][graph] = 1.0
        neg_mask[node][graph] = 0.0
    return pos_mask, neg_mask


def masks(batch: Tensor, g: int) -> tuple[Tensor, Tensor]:
    """The same as our loss makes them."""
    pos_mask = torch.zeros(len(batch), g, device=batch.device).scatter(1, batch[:, None], 1.0)
    return pos_mask, 1 - pos_mask


class Epoch:
    """One epoch of training with a model and optimiser of its own."""

    def __init__(self, batches: Callable[[], Iterable[Any]], in_dim: int, loss: Loss, device: Any):
        torch.manual_seed(0)
        self.encoder = GIN(in_dim).to(device)
        self.heads = Heads(self.encoder.out_dim).to(device)
        parameters = [*self.encoder.parameters(), *self.heads.parameters()]
        self.optimizer = torch.optim.Adam(parameters, lr=1e-3)
        self.batches, self.loss, self.device = batches, loss, device

    def __call__(self) -> float:
        """Mean loss of the epoch's batches."""
        values = []
        for graphs in self.batches():
            graphs = graphs.to(self.device)
            nodes, pooled = self.encoder.both(graphs)
            loss = self.loss(self.heads.local(nodes), self.heads(pooled), graphs.batch)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            values.append(loss.item())
        return statistics.mean(values)


def now() -> float:
    if not torch.cuda.is_available():
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def entrants(name: str, batch: int, device: torch.device) -> dict[str, dict[str, Entrant]]:
    """What everybody does on a data set, in one order of its graphs."""
    run = Run(data=name, encoder="gin", method="infograph", epochs=1)
    data: Any = load_data(run, device)
    order = torch.randperm(len(data.x_train), generator=torch.Generator().manual_seed(0))
    separate = [one_graph(data, int(g)) for g in order]
    loader = pyg("loader").DataLoader(separate, batch_size=batch)
    rows = order.to(device).split(batch)
    width = data.graphs.x.shape[1]

    def picked() -> Iterable[Any]:
        return (data.inputs(r) for r in rows)

    first = data.inputs(rows[0]).batch
    return {
        "epoch": {
            OURS: Epoch(picked, width, local_global_released, device),
            LOOP: Epoch(lambda: loader, width, looped, device),
            LOADER: Epoch(lambda: loader, width, local_global_released, device),
        },
        "masks": {
            OURS: lambda: masks(first, len(rows[0])),
            LOOP: lambda: looped_masks(first, len(rows[0])),
        },
    }


def one_graph(data: Any, graph: int) -> Any:
    """A graph as PyTorch Geometric's Data."""
    found = data.inputs(torch.tensor([graph], device=data.x_train.device)).to("cpu")
    return pyg("data").Data(x=found.x, edge_index=found.edge_index)


def seconds(entrant: Entrant) -> float:
    start = now()
    entrant()
    return now() - start


def race(entered: dict[str, Entrant], rounds: int) -> dict[str, dict[str, float]]:
    """Median seconds of everybody, and the median ratio to ours with its quartiles."""
    names, shuffle = list(entered), random.Random(0).shuffle
    for entrant in entered.values():
        entrant()  # warm up
    times: list[dict[str, float]] = []
    for _ in tqdm(range(rounds), desc="rounds", leave=False):
        shuffle(names)
        times.append({name: seconds(entered[name]) for name in names})
    found = {}
    for name in entered:
        low, middle, high = statistics.quantiles([t[name] / t[OURS] for t in times], n=4)
        median = statistics.median(t[name] for t in times)
        found[name] = {"seconds": median, "ratio": middle, "ratio_q1": low, "ratio_q3": high}
    return found


def measure(names: list[str], batch: int, rounds: int, device: torch.device) -> dict[str, Any]:
    """Everybody on every data set that is there."""
    found: dict[str, Any] = {}
    for name in names:
        try:
            everybody = entrants(name, batch, device)
            found[name] = {what: race(entered, rounds) for what, entered in everybody.items()}
        except FileNotFoundError as error:
            found[name] = {"skipped": str(error)}
    return found


def arguments(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="mutag,proteins,imdb-binary,graphs")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    args = parser.parse_args(words)
    for name in ("batch", "rounds"):
        if getattr(args, name) < 2:
            parser.error(f"--{name} {getattr(args, name)}: must be 2 or more")
    return args


def main(words: list[str] | None = None) -> None:
    args = arguments(words)
    torch.set_num_threads(1)
    memory.keep()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    names = args.data.split(",")
    found = measure(names, args.batch, args.rounds, device)
    clock = "processor time of one thread" if device.type == "cpu" else "wall"
    setting = {"batch": args.batch, "rounds": args.rounds, "beta": 1.0, "clock": clock}
    body = {"setting": setting, "fields": FIELDS, "data": found, "provenance": provenance(device)}
    with whole_or_nothing(args.out) as part:
        part.write_text(json.dumps(body, indent=1, allow_nan=False) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
