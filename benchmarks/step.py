"""What hardness costs: a whole training step with HCL against the same step with SimCLR's loss.

    python benchmarks/step.py [--rounds 40] [--encoder small] [--batch 256] [--size 32]

Both steps (views, forward, loss, backward, Adam) run in turn on the same random pictures, so drift
of the machine hits both alike; the figure is the median over rounds of the ratio of their times.
On a CPU that is the processor time of one thread, on a GPU the wall clock between synchronisations.
The result is printed and written to benchmarks/step.json with its provenance.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from hcl.atomic import whole_or_nothing
from hcl.losses import ContrastiveLoss
from hcl.provenance import provenance
from hcl.train import Model, projection_head
from hcl.views import SIMCLR, augment
from hcl.vision import encoder

LOSSES = {
    "SimCLR": ContrastiveLoss("nt_xent"),
    "Debiased": ContrastiveLoss("debiased"),
    "HCL": ContrastiveLoss("hard"),
}


class Step:
    """One training step of a loss with a model and optimiser of its own."""

    def __init__(self, loss: nn.Module, name: str, device: torch.device):
        torch.manual_seed(0)
        net = encoder(name)
        self.model = Model(net, projection_head(int(net.out_dim))).to(device)  # type: ignore[arg-type]
        self.model.to(memory_format=torch.channels_last)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3, weight_decay=1e-6)
        self.loss, self.device = loss, device
        self.generator = torch.Generator(device).manual_seed(0)

    def __call__(self, x: Tensor) -> None:
        views = torch.cat([augment(x, SIMCLR, self.generator) for _ in range(2)])
        z1, z2 = self.model(views).chunk(2)
        loss = self.loss(z1, z2)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()

    def seconds(self, x: Tensor) -> float:
        """Time of one step."""
        if self.device.type == "cpu":
            start = time.process_time()
            self(x)
            return time.process_time() - start
        torch.cuda.synchronize()
        start = time.perf_counter()
        self(x)
        torch.cuda.synchronize()
        return time.perf_counter() - start


def measure(
    encoder_name: str, batch: int, size: int, rounds: int, device: torch.device
) -> dict[str, float]:
    """Median seconds of SimCLR's step, and every loss's median ratio to it with its quartiles."""
    x = torch.randint(256, (batch, 3, size, size), dtype=torch.uint8, device=device)
    steps = {label: Step(loss, encoder_name, device) for label, loss in LOSSES.items()}
    for step in steps.values():
        step.seconds(x)  # warm up
    times = [
        {label: step.seconds(x) for label, step in steps.items()}
        for _ in tqdm(range(rounds), desc="rounds", leave=False)
    ]
    found = {"SimCLR_seconds": statistics.median(t["SimCLR"] for t in times)}
    for label in list(LOSSES)[1:]:
        low, middle, high = statistics.quantiles([t[label] / t["SimCLR"] for t in times], n=4)
        found |= {f"{label}_ratio": middle, f"{label}_q1": low, f"{label}_q3": high}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--encoder", default="small")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--size", type=int, default=32)
    args = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = measure(args.encoder, args.batch, args.size, args.rounds, device)
    body = {"setting": vars(args), "result": found, "provenance": provenance(device)}
    with whole_or_nothing(Path(__file__).with_suffix(".json")) as part:
        part.write_text(json.dumps(body, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
