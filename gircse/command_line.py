"""What the commands have in common: text that a shell passes, help texts, consoles of any encoding."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

DTYPES = ("float32", "bfloat16", "float16")
LOG_SECONDS = 30  # between the lines of a log that stand for a bar


def unescape(text: str) -> str:
    r"""Text of a command line: a shell's quotes leave `\n` as two characters, which stand for a line break (`\t` for a
    tab, `\\` for one backslash)."""
    return re.sub(r"\\([nt\\])", lambda match: {"n": "\n", "t": "\t"}.get(match[1], "\\"), text)


def positive_int(value: str) -> int:
    """An argument that is a whole number from 1."""
    if not value.isdecimal() or int(value) < 1:
        raise argparse.ArgumentTypeError(f"{value!r} is not a whole number above 0")
    return int(value)


def local_path(value: str) -> Path:
    """An argument that is a path to write to; one of a bucket would become a folder that is called so."""
    if "://" in value:
        raise argparse.ArgumentTypeError(f"{value!r} is no path: give one of a disk, and upload it when it is done")
    return Path(value).expanduser()


def check_writable(folder: str | Path) -> None:
    """Makes the folder, and raises a ValueError if it can't be written to: now, not after hours of work."""
    probe = Path(folder, ".write_test")
    try:
        probe.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink(missing_ok=True)  # another process of this run may have removed it
    except OSError as error:
        raise ValueError(f"output_dir={str(folder)!r} can't be written to ({error}); choose another") from error


def lenient_console() -> None:
    """Prints characters that the console's encoding lacks as escape sequences; they would raise an error otherwise, as
    on Windows, where encodings often have 256 characters."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def parser_of(documentation: str | None) -> argparse.ArgumentParser:
    """A command's parser, without arguments yet: its help has the first line of the module's documentation before them,
    and the rest as it is after them."""
    description, _, rest = (documentation or "").partition("\n")
    formatter = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(description=description, epilog=rest, formatter_class=formatter)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Leaves out defaults of None, which say nothing, and escapes plain per cent signs in help texts, such as those of
    some of transformers' arguments, which argparse would take for formats."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = (action.help if action.default is None else super()._get_help_string(action)) or ""
        return re.sub(r"%(%|\(\w+\)\w)?", lambda match: match[0] if match[1] else "%%", text)


class Log:
    """A file for tqdm that prints each state of a bar as a line of its own."""

    def write(self, text: str) -> None:
        if line := text.strip():
            print(line, file=sys.stderr, flush=True)

    def flush(self) -> None:
        pass


def progress(**options: Any) -> tqdm:
    """A bar; where stderr is no terminal, as in a log, a line at once and then one every LOG_SECONDS at most."""
    if not sys.stderr.isatty():
        options |= {"file": Log(), "mininterval": LOG_SECONDS, "maxinterval": LOG_SECONDS, "miniters": 0}
    return tqdm(**options)
