#!/usr/bin/env python3
"""Makes one page about several runs: their curves over each other, their samples side by side, what their recipes differ in.

    python tools/compare.py outputs/a outputs/b outputs/c --out comparison.html

The page is as that of tools/report.py: a file that a browser opens from the disk. Where the runs have other prompts than the
first, what they made of the same ones is shown.
"""

from pathlib import Path

from dmd_ds.commands import command_parser
from dmd_ds.errors import UserError, one_line_errors
from dmd_ds.report.page import MEGABYTES, write_page


def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="the folders of two runs or more")
    parser.add_argument("--out", type=Path, default=Path("comparison.html"), help="default: %(default)s")
    parser.add_argument("--megabytes", type=float, default=MEGABYTES, help="of videos in the page, at most (default: %(default)s)")
    a = parser.parse_args()
    with one_line_errors():
        if len(a.runs) < 2:
            raise UserError(f"{a.runs[0]}: one run; name at least two, or use tools/report.py")
        if a.megabytes <= 0:
            raise UserError(f"--megabytes {a.megabytes:g}: must be more than 0")
        write_page(a.runs, a.out, a.megabytes)
    print(a.out)


if __name__ == "__main__":
    main()
