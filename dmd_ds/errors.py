"""A user's mistakes: one clear line each, never a traceback."""

import contextlib
import json
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

LONGEST = 1000  # characters of a message


class UserError(ValueError):
    """Something the user handed over is wrong; the message names file, key or number, what was found and what was expected."""

    def __init__(self, message: str):
        super().__init__(one_line(message))


class RunError(RuntimeError):
    """A run cannot go on for something that is not this process's fault; the message names what and where."""

    def __init__(self, message: str):
        super().__init__(one_line(message))


def one_line(text: str) -> str:
    """The text as a terminal may be shown it, whatever a file's own words or a library's message bring along: one line, nothing
    that steers the terminal, and of a very long one its two ends."""
    if not text.isprintable():
        text = "".join(c if c.isprintable() else " " if c.isspace() else c.encode("unicode_escape").decode() for c in text)
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} ... {text[-LONGEST // 2 :]}"


@contextlib.contextmanager
def one_line_errors():
    """Turns a UserError into one line on stderr and exit code 2, a RunError into one line and exit code 1."""
    try:
        yield
    except (UserError, RunError) as error:
        sys.exit(report(error))


def report(error: UserError | RunError) -> int:
    """Prints the one line and returns the exit code.

    Of several ranks that fail the first one speaks: the others wait a little, and a launcher that sees a rank end stops all
    of them. A rank that fails alone is still there after that, and says who and where it is.
    """
    rank = int(os.environ.get("RANK", 0))
    if rank:
        time.sleep(5)
    where = f" (rank {rank} on {socket.gethostname()})" if rank else ""
    print(f"error{where}: {error}", file=sys.stderr, flush=True)
    return 2 if isinstance(error, UserError) else 1


# ---- files that a user hands over -------------------------------------------------------------------------------------


def read_text(path: Path) -> str:
    """The content of a UTF-8 file, with a byte order mark or without."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:  # ValueError: bytes that are no UTF-8, or a NUL in the path
        raise UserError(f"{path}: not readable as text: {error}") from error


def parse_json(text: str | bytes, path: Path, line: int | None = None) -> Any:
    """What the text of a JSON file, or of that line of a .jsonl, says; `UserError` names file and line."""
    try:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair is no text: nothing could print or store it
        return value
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{line or error.lineno}: not readable as JSON: {error.msg}") from error
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, no UTF-8, brackets thousands deep
        raise UserError(f"{path}:{line or 1}: not readable as JSON: {error}") from error


def read_json(path: Path) -> Any:
    """The content of a JSON file; `UserError` names file and line."""
    return parse_json(read_text(path), path)


def read_json_mapping(path: Path) -> dict[str, Any]:
    """The same of a file that holds names and values."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise UserError(f"{path}: a mapping of names to values is expected, not a {type(value).__name__}")
    return value


def read_jsonl(path: Path) -> list[tuple[int, Any]]:
    """(number from 1, content) of the lines of a .jsonl file that are not empty."""
    lines = enumerate(read_text(path).split("\n"), 1)
    return [(number, parse_json(line, path, number)) for number, line in lines if line.strip()]
