#!/usr/bin/env python3
"""Writes clips of moving shapes with their captions, to try the way from clips to a student on.

    python tools/make_clips.py CLIPS --count 54

CLIPS gets 0000.mp4 and so on, 17 frames of 64x64 at 8 fps, of the 54 captions in turn, and clips.jsonl, which names them for
tools/encode_videos.py.
"""

from pathlib import Path

from dmd_ds.commands import command_parser
from dmd_ds.data import moving_shapes
from dmd_ds.data.clips import write_clips
from dmd_ds.errors import UserError, one_line_errors


def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument("clips", type=Path, metavar="CLIPS", help="the folder that is made")
    parser.add_argument("--count", type=int, default=len(moving_shapes.CAPTIONS), help="of clips (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of sizes, paths and directions (default: %(default)s)")
    a = parser.parse_args()
    with one_line_errors():
        if a.count < 1 or a.seed < 0:
            raise UserError(f"--count {a.count} --seed {a.seed}: at least 1, and no seed below 0")
        write_clips(a.clips, a.count, a.seed)
    print(f"{a.clips / 'clips.jsonl'}: {a.count} clips")


if __name__ == "__main__":
    main()
