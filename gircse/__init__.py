"""What the commands of this repo are made of. Loading a model needs none of it."""

from pathlib import Path

# The Hub repo that this is part of. The folder's links are followed, the file's are not: in the Hub's cache, they lead
# out of the repo.
ROOT = Path(__file__).parent.resolve().parent
