"""A user's mistakes: one clear line each, never a traceback."""

import contextlib
import os
import sys
import time


class UserError(ValueError):
    """Something the user handed over is wrong; the message names file, key or number, what was found and what was expected."""


@contextlib.contextmanager
def one_line_errors():
    """Turns a UserError into one line on stderr, from one rank, and exit code 2.

    The other ranks leave a little later: a launcher that sees any rank end stops all of them, and the first must have spoken.
    """
    try:
        yield
    except UserError as error:
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        else:
            time.sleep(5)
        sys.exit(2)
