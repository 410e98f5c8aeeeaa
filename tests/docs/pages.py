"""The pages of the documentation, taken apart: blocks of code, the commands in them, words in backticks, headings, links."""

import dataclasses
import re
import shlex
from functools import cached_property
from pathlib import Path

from dmd_ds.recipe import REPOSITORY

PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
FOR_GPUS = "# GPUs"  # the first line of a block that needs GPUs or published weights
FIRST_WORDS = ("python", "deepspeed", "make", "pip", "sbatch", "kubectl", "source", "pre-commit", "printf", "head")


@dataclasses.dataclass(frozen=True)
class Block:
    """Of code. `language`: what stands behind the fence; empty where it is indented."""

    page: Path
    line: int
    language: str
    text: str

    @property
    def for_gpus(self) -> bool:
        return self.text.startswith(FOR_GPUS)

    @property
    def commands(self) -> list["Command"]:
        """In an indented block lines of other kinds may stand between them."""
        if self.language not in ("sh", ""):
            return []
        lines = [line.strip() for line in self.text.splitlines() if line.strip() and not line.strip().startswith("#")]
        if not self.language:
            lines = [line for line in lines if line.split()[0] in FIRST_WORDS]
        return [Command(self.page, self.line, line, self.for_gpus) for line in lines]


@dataclasses.dataclass(frozen=True)
class Command:
    page: Path
    line: int
    text: str
    for_gpus: bool

    @cached_property
    def words(self) -> list[str]:
        """Without its comment, and without what stands for more of the same: `...` and `[STUDENT ...]`."""
        text = re.sub(r" \[[A-Z]+ \.\.\.\]", "", self.text)
        return [word for word in shlex.split(text, comments=True) if word != "..."]

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}: {self.text}"


def blocks(page: Path) -> list[Block]:
    found, kept, language, start = [], [], None, 0
    previous = ""
    for number, line in enumerate([*page.read_text().splitlines(), ""], 1):
        fence = re.fullmatch(r"```(.*)", line)
        if fence and language is None and not kept:
            language, start = fence[1].strip(), number
        elif fence and language is not None:
            found.append(Block(page, start, language or "none", "\n".join(kept) + "\n"))
            language, kept = None, []
        elif language is not None:
            kept.append(line)
        elif line.startswith("    ") and (kept or not previous.strip()):
            start = start if kept else number
            kept.append(line[4:])
        elif kept and line.strip():
            found.append(Block(page, start, "", "\n".join(kept) + "\n"))
            kept = []
        previous = line
    if kept:
        found.append(Block(page, start, "", "\n".join(kept) + "\n"))
    assert language is None, f"{page}: a fence is not closed"
    return found


def prose(page: Path) -> str:
    """All but the blocks."""
    inside, lines = False, []
    for line in page.read_text().splitlines():
        if line.startswith("```"):
            inside = not inside
        elif not inside and not line.startswith("    "):
            lines.append(line)
    return "\n".join(lines)


def inline_code(page: Path) -> list[str]:
    """What stands in backticks, a line break within read as a space."""
    return [re.sub(r"\s+", " ", code) for code in re.findall(r"`([^`]+)`", prose(page))]


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        number = sum(other == slug or re.fullmatch(rf"{re.escape(slug)}-\d+", other) is not None for other in found)
        found.add(f"{slug}-{number}" if number else slug)
    return found


def links(page: Path) -> list[str]:
    return re.findall(r"\]\(([^)\s]+)\)", prose(page))
