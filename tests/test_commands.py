"""Every command says what it does with an example, what each word of it means, and which version it is of."""

import argparse
import functools
import importlib
import os
import re
import subprocess
import sys

import pytest

from dmd_ds import __version__
from dmd_ds.recipe import REPOSITORY, known_keys, shipped_recipes

COMMANDS = sorted(str(path.relative_to(REPOSITORY)) for room in ("tools", "inference") for path in (REPOSITORY / room).glob("*.py"))
COMMANDS += ["dmd_ds/train.py"]


class Asked(Exception):
    """Holds the parser of a command that was about to read its arguments."""


@functools.cache
def parser_of(path: str) -> argparse.ArgumentParser:
    """That of a command's script."""

    def asked(parser, *_):
        raise Asked(parser)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Asked) as found:
        patch.setattr(argparse.ArgumentParser, "parse_args", asked)
        patch.setattr(argparse.ArgumentParser, "parse_intermixed_args", asked)
        importlib.import_module(path.removesuffix(".py").replace("/", ".")).main()
    return found.value.args[0]


@pytest.fixture(params=COMMANDS)
def command(request) -> tuple[str, argparse.ArgumentParser]:
    return request.param, parser_of(request.param)


def test_a_commands_help_has_an_example_and_explains_every_word(command, capsys):
    path, parser = command
    assert re.search(rf"^    (python|deepspeed .*) {path} ", parser.description, re.MULTILINE)
    words = [action for action in parser._actions if action.help != argparse.SUPPRESS]
    assert [action.dest for action in words if not action.help] == []
    assert {"help", "version"} <= {action.dest for action in words}
    parser.print_help()
    assert "\x1b" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, message",
    [
        (["tools/report.py"], "report.py: error: the following arguments are required: RUN\n"),
        (["tools/compare.py", "nowhere", "elsewhere"], "error: nowhere: not the folder of a run; recipe.yaml is missing\n"),
        (["tools/compare.py", "alone"], "error: alone: one run; name at least two, or use tools/report.py\n"),
        (["tools/report.py", "nowhere", "--megabytes", "0"], "error: --megabytes 0: must be more than 0\n"),
    ],
)
def test_a_mistake_goes_to_stderr_with_exit_code_2(words, message, monkeypatch, capsys):
    path, *arguments = words
    monkeypatch.setattr(sys, "argv", [path, *arguments])
    with pytest.raises(SystemExit) as end:
        importlib.import_module(path.removesuffix(".py").replace("/", ".")).main()
    out, err = capsys.readouterr()
    assert end.value.code == 2 and out == "" and err.endswith(message)


COMPLETIONS = """
source tools/completion.bash
for words in "train.py t2v_14b" "train.py tiny generator.l" "train.py --l"; do
    COMP_WORDS=($words); COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
    _dmd_ds_train
    echo "${COMPREPLY[@]}"
done
"""


def test_recipes_keys_and_options_are_completed():
    environment = {**os.environ, "DMD_DS_PYTHON": sys.executable}
    done = subprocess.run(["bash", "-c", COMPLETIONS], cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
    recipes, keys, options = (set(line.split()) for line in done.stdout.splitlines())
    assert recipes == {name for name in shipped_recipes() if name.startswith("t2v_14b")}
    assert keys == {f"{key}=" for key in known_keys() if key.startswith("generator.l")} and len(keys) >= 2
    assert options == {"--list-recipes"}


def test_the_changes_of_this_version_are_told():
    assert f"## {__version__}\n" in (REPOSITORY / "CHANGELOG.md").read_text()
