"""What the commands of this repo are made of. Loading a model needs none of it."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]  # the Hub repo that this is part of
