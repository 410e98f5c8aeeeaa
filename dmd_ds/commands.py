"""What all commands have in common: help with the examples of their own description, and `--version`."""

import argparse

from dmd_ds import __version__


def command_parser(description: str, **options) -> argparse.ArgumentParser:
    """`description`: what the command does, with an example or more, shown as it is written."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, **options)
    parser.add_argument("--version", action="version", version=f"dmd_ds {__version__}")
    return parser
