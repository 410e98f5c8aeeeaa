"""Messages that the pages quote are those that the project says."""

import ast
import re
from functools import cache
from pathlib import Path

from dmd_ds.recipe import REPOSITORY
from tests.docs.pages import PAGES, blocks

LEAST = 12  # letters of a text in the source that say something


@cache
def texts() -> list[re.Pattern[str]]:
    """All that the project can say: the texts in its source, those with values in them too. What is certain of one is in its groups."""
    found = []
    files = [file for room in ("dmd_ds", "tools", "inference") for file in (REPOSITORY / room).rglob("*.py")]
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            said = [part.value for part in parts if isinstance(part, ast.Constant) and isinstance(part.value, str)]
            if sum(map(len, said)) >= LEAST and "\n" not in "".join(said):
                found.append(re.compile(".*?".join(f"({re.escape(text)})" for text in said)))
    return found


def share_that_is_said(message: str) -> float:
    """How many of its words, but for paths and numbers, the source has in one text or in several that are put together."""
    certain = set()
    for pattern in texts():
        if match := pattern.search(message):
            certain |= {place for group in range(1, pattern.groups + 1) for place in range(*match.span(group))}
    words = [word for word in re.finditer(r"(?<![\w/.'-])[a-z]{3,}(?![\w/'-]|\.\w)", message)]
    return sum(word.start() in certain for word in words) / len(words)


def messages(page: Path) -> list[str]:
    lines = [line for block in blocks(page) if block.language == "text" for line in block.text.splitlines() if line]
    return [re.sub(r"^(error: |warning: step \d+: )", "", line) for line in lines]


def test_every_message_that_is_quoted_is_one_that_the_project_says():
    quoted = [(page, message) for page in PAGES for message in messages(page)]
    assert len(quoted) > 15
    for page, message in quoted:
        assert share_that_is_said(message) >= 0.5, f"{page.name}: {message}"
    assert share_that_is_said("no reply within 300 s (parallel.join_timeout) from rank 8 on worker-2") < 0.5
    assert share_that_is_said("worker-1 has 4 accelerators, but slots for at least 5 in the hostfile") < 0.5
