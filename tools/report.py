#!/usr/bin/env python3
"""Makes one page about a run: curves, samples, memory, warnings, recipe and machine, in a file that needs nothing else.

    python tools/report.py outputs/tiny                            # writes outputs/tiny/report.html
    python tools/report.py outputs/tiny --out tiny.html --megabytes 200

A browser opens it from the disk, without a network. It can be made while the run goes on. Looks at the samples are left out
where all of them are more than --megabytes; the page says so.
"""

from pathlib import Path

from dmd_ds.commands import command_parser
from dmd_ds.errors import UserError, one_line_errors
from dmd_ds.report.page import MEGABYTES, write_page


def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument("run", metavar="RUN", type=Path, help="the folder of a run")
    parser.add_argument("--out", type=Path, help="default: report.html in the run's folder")
    parser.add_argument("--megabytes", type=float, default=MEGABYTES, help="of videos in the page, at most (default: %(default)s)")
    a = parser.parse_args()
    out = a.out or a.run / "report.html"
    with one_line_errors():
        if a.megabytes <= 0:
            raise UserError(f"--megabytes {a.megabytes:g}: must be more than 0")
        write_page([a.run], out, a.megabytes)
    print(out)


if __name__ == "__main__":
    main()
