"""A user's mistakes: one clear line each, never a traceback."""

import contextlib
import json
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any


class UserError(ValueError):
    """Something the user handed over is wrong; the message names file, key or number, what was found and what was expected."""


class RunError(RuntimeError):
    """A run cannot go on for something that is not this process's fault; the message names what and where."""


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


def read_json(path: Path) -> Any:
    """The content of a JSON file; `UserError` names file and line."""
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not readable as JSON: {error.msg}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable: {error}") from error
