"""Check a folder of data against the manifest, data.json: whether every file is there, with its rows and its hash.

    python recipes/check_data.py DATA
    python recipes/check_data.py --table  # the table of DATA.md

Prints a line for each file that is missing or differs, and ends with status 1 if there is one. Files that the manifest
doesn't know are named, too: recipes read all files of `train/` and `text/`, and evaluation all of `eval/`, so that one
more changes what they make.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import sys
from pathlib import Path

MANIFEST = Path(__file__).with_name("data.json")
FOLDERS = ("text", "train", "eval")


def read_manifest() -> dict[str, dict]:
    """What is known of a file, by its path below DATA."""
    return json.loads(MANIFEST.read_text(encoding="utf-8"))


def count_rows(content: bytes) -> int | None:
    """Lines of a gzip file; None if it is none, or only a part of one."""
    try:
        return len(gzip.decompress(content).splitlines())
    except (OSError, EOFError):
        return None


def differences(data: Path, manifest: dict[str, dict]) -> list[str]:
    """A line for each file of the manifest that is missing or has other rows or bytes, and for each one beside them."""
    found = []
    for name, known in manifest.items():
        path = data / name
        if not path.is_file():
            found.append(f"{name}: missing")
            continue
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() == known["sha256"]:
            continue
        rows = count_rows(content)
        if rows is None:
            found.append(f"{name}: not a whole gzip file")
        elif rows != known["rows"]:
            found.append(f"{name}: {rows:,} rows instead of {known['rows']:,}")
        else:
            found.append(f"{name}: as many rows, but other bytes")
    present = (path.relative_to(data).as_posix() for folder in FOLDERS for path in sorted((data / folder).glob("*")))
    return found + [f"{name}: not in the manifest" for name in present if name not in manifest]


def table(manifest: dict[str, dict]) -> str:
    """Markdown, a row a file."""
    lines = ["| file | rows | what it is | origin | licence | SHA-256 |", "| --- | ---: | --- | --- | --- | --- |"]
    for name, known in manifest.items():
        cells = [f"`{name}`", f"{known['rows']:,}", known["what"], known["origin"], known["licence"], known["sha256"]]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?", type=Path, help="the folder, with text/, train/ and eval/")
    parser.add_argument("--table", action="store_true", help="print the manifest as a Markdown table instead")
    args = parser.parse_args()
    manifest = read_manifest()
    if args.table:
        print(table(manifest))
        return 0
    if args.data is None or not args.data.is_dir():
        parser.error(f"data={str(args.data)!r} is no folder: give the one that holds text/, train/ and eval/")
    found = differences(args.data, manifest)
    print("\n".join(found) or f"all {len(manifest)} files are those of the manifest")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
