"""What a method costs: a whole training step with its loss against the same step with SimCLR's.

    python benchmarks/step.py [--rounds 40] [--encoder small] [--batch 256] [--size 32]

In a round every method takes one step (views, forward, loss, backward, Adam) on the same random
pictures, in an order drawn anew; the figure is the median over rounds of the ratio of its time to
that of SimCLR's step in the same round, so drift of the machine hits both alike. Labels, for the
losses that have them, are random, of ten classes. Synthetic negatives are made within the step.
On a CPU that is the processor time of one thread, on a GPU the wall clock between synchronisations.
The result is printed and written to benchmarks/step.json with its provenance.
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from hcl.atomic import whole_or_nothing
from hcl.losses import ContrastiveLoss
from hcl.provenance import provenance
from hcl.relatives import bayesian, ring
from hcl.synthetic import mixtures
from hcl.train import Model, projection_head
from hcl.transport import transported
from hcl.unremix import unremix
from hcl.views import SIMCLR, augment
from hcl.vision import encoder

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # of two views (B, d) and labels (B,)
CLASSES = 10
HARDEST, BETWEEN, WITH_ANCHOR = 64, 32, 16  # of the synthetic negatives


def unsupervised(loss: Callable[[Tensor, Tensor], Tensor]) -> Loss:
    """A loss that has no labels, as one that is given them."""
    return lambda z1, z2, labels: loss(z1, z2)


def mixed(loss: ContrastiveLoss) -> Loss:
    """A loss with mixtures of the hardest negatives, and the making of them."""

    def with_mixtures(z1: Tensor, z2: Tensor, labels: Tensor) -> Tensor:
        k = min(HARDEST, 2 * len(z1) - 2)  # of a small batch all negatives
        made = mixtures(z1, z2, hardest=k, between=BETWEEN, with_anchor=WITH_ANCHOR)
        found: Tensor = loss(z1, z2, synthetic=made)
        return found

    return with_mixtures


LOSSES: dict[str, Loss] = {
    "SimCLR": ContrastiveLoss("nt_xent"),
    "DCL": ContrastiveLoss("decoupled"),
    "Debiased": ContrastiveLoss("debiased"),
    "HCL": ContrastiveLoss("hard"),
    "SCL": ContrastiveLoss("scl"),
    "H-SCL": ContrastiveLoss("hard_scl"),
    "SupCon": ContrastiveLoss("supcon"),
    "SCHaNe": ContrastiveLoss("schane"),
    "UnReMix": unsupervised(unremix),  # no gradient through its weights
    "MoCHi": mixed(ContrastiveLoss("nt_xent")),
    "SSCL": mixed(ContrastiveLoss("hard")),
    "Ring": unsupervised(ring),
    "BCL": unsupervised(bayesian),
    "OT plan": unsupervised(transported),
}


class Step:
    """One training step of a loss with a model and optimiser of its own."""

    def __init__(self, loss: Loss, name: str, device: torch.device):
        torch.manual_seed(0)
        net = encoder(name)
        self.model = Model(net, projection_head(int(net.out_dim))).to(device)  # type: ignore[arg-type]
        self.model.to(memory_format=torch.channels_last)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3, weight_decay=1e-6)
        self.loss, self.device = loss, device
        self.generator = torch.Generator(device).manual_seed(0)

    def __call__(self, x: Tensor, labels: Tensor) -> None:
        views = torch.cat([augment(x, SIMCLR, self.generator) for _ in range(2)])
        z1, z2 = self.model(views).chunk(2)
        loss = self.loss(z1, z2, labels)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()

    def seconds(self, x: Tensor, labels: Tensor) -> float:
        """Time of one step."""
        if self.device.type == "cpu":
            start = time.process_time()
            self(x, labels)
            return time.process_time() - start
        torch.cuda.synchronize()
        start = time.perf_counter()
        self(x, labels)
        torch.cuda.synchronize()
        return time.perf_counter() - start


def measure(
    encoder_name: str, batch: int, size: int, rounds: int, device: torch.device
) -> dict[str, float]:
    """Median seconds of SimCLR's step, and every loss's median ratio to it with its quartiles."""
    x = torch.randint(256, (batch, 3, size, size), dtype=torch.uint8, device=device)
    labels = torch.randint(CLASSES, (batch,), device=device)
    steps = {label: Step(loss, encoder_name, device) for label, loss in LOSSES.items()}
    for step in steps.values():
        step.seconds(x, labels)  # warm up
    names, shuffle = list(steps), random.Random(0).shuffle
    times: list[dict[str, float]] = []
    for _ in tqdm(range(rounds), desc="rounds", leave=False):
        shuffle(names)
        times.append({label: steps[label].seconds(x, labels) for label in names})
    found = {"SimCLR_seconds": statistics.median(t["SimCLR"] for t in times)}
    for label in list(LOSSES)[1:]:
        low, middle, high = statistics.quantiles([t[label] / t["SimCLR"] for t in times], n=4)
        found |= {f"{label}_ratio": middle, f"{label}_q1": low, f"{label}_q3": high}
    return found


def arguments(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--encoder", default="small")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    args = parser.parse_args(words)
    least = 6  # its ten negatives leave one in the band of Ring
    for name, bound in (("rounds", 2), ("batch", least), ("size", 8)):
        if (value := getattr(args, name)) < bound:
            parser.error(f"--{name} {value}: must be {bound} or more")
    return args


def main(words: list[str] | None = None) -> None:
    args = arguments(words)
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = measure(args.encoder, args.batch, args.size, args.rounds, device)
    setting = {name: getattr(args, name) for name in ("rounds", "encoder", "batch", "size")}
    body = {"setting": setting, "result": found, "provenance": provenance(device)}
    with whole_or_nothing(args.out) as part:
        part.write_text(json.dumps(body, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
