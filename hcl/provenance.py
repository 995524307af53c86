"""Where a result comes from: commit, code, versions, device, date."""

import hashlib
import platform
import re
import subprocess
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from hcl import project_root

SCIENCE = (  # what a result depends on
    "losses", "annealing", "debiasing", "negatives", "units", "checks", "rowstats", "tiles",
    "kernels", "distributed", "moco", "ordering", "initial", "muon",
    "sphere", "imagesets", "views", "vision", "train", "objective", "measure", "probe", "geometry",
    "collapse", "methods", "synthetic", "unremix", "relatives", "transport",
    "corpus", "neighbours", "sentences", "sentence_tasks",
    "graphs/batch", "graphs/data", "graphs/families", "graphs/gin", "graphs/infograph",
    "graphs/sets", "graphs/views", "crossval",
)  # fmt: skip


def provenance(device: torch.device) -> dict[str, Any]:
    """Where and with what a Record is being made."""
    packages = ("torchvision", "torch_geometric", "numpy", "scikit-learn")
    return {
        "commit": _git("rev-parse", "HEAD"),
        "clean": _git("status", "--porcelain", "--", "hcl") == "",
        "code": code_fingerprint(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        **{name: version for name in packages if (version := _version(name))},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


@cache
def code_fingerprint() -> str:
    """Twelve hexadecimal digits of the SHA-256 of the modules that a result depends on."""
    here = Path(__file__).parent
    sources = [here / f"{name}.py" for name in SCIENCE]
    text = b"\0".join(path.read_bytes() for path in sources if path.exists())
    return hashlib.sha256(text).hexdigest()[:12]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # of a part of the study that is not used here
        return None


@cache
def _git(*words: str) -> str | None:
    try:
        done = subprocess.run(["git", *words], cwd=project_root(), capture_output=True, text=True)
    except OSError:  # no git on this machine
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.+)", cpuinfo.read_text()) if cpuinfo.exists() else []
    return f"CPU, {names[0] if names else platform.processor() or platform.machine()}"
