"""What the commands have in common: text that a shell passes, help texts, consoles of any encoding."""

from __future__ import annotations

import argparse
import re
import sys
from typing import Any

from tqdm import tqdm

LOG_SECONDS = 30  # between the lines of a log that stand for a bar


def unescape(text: str) -> str:
    r"""Text of a command line: a shell's quotes leave `\n` as two characters, which stand for a line break (`\t` for a
    tab, `\\` for one backslash)."""
    return re.sub(r"\\([nt\\])", lambda match: {"n": "\n", "t": "\t"}.get(match[1], "\\"), text)


def lenient_console() -> None:
    """Has characters that the console's encoding lacks (Windows' often has 256) printed as their numbers, not raise."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Help texts with per cent signs that stand for themselves, as some of transformers' do."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = super()._get_help_string(action) or ""
        return re.sub(r"%(%|\(\w+\)\w)?", lambda match: match[0] if match[1] else "%%", text)


class Log:
    """What tqdm writes over and over, as lines."""

    def write(self, text: str) -> None:
        if line := text.strip():
            print(line, file=sys.stderr, flush=True)

    def flush(self) -> None:
        pass


def progress(**options: Any) -> tqdm:
    """A bar; where it can't be drawn, as in a log, a line at once and at most every LOG_SECONDS."""
    if not sys.stderr.isatty():
        options |= {"file": Log(), "mininterval": LOG_SECONDS, "maxinterval": LOG_SECONDS, "miniters": 0}
    return tqdm(**options)
