"""Contrastive learning with hard negative samples: losses, trainers and the study behind them."""

from pathlib import Path


def project_root() -> Path:
    """The checkout that holds book/ and data/; the current directory for an installed package."""
    checkout = Path(__file__).resolve().parent.parent
    return checkout if (checkout / "_toc.yml").exists() else Path.cwd()
