"""What the pages say is there: commands and their options, recipes and keys, functions, files, links. And what is to be typed works."""

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from deepspeed.launcher.runner import parse_args as parse_launcher

from dmd_ds.errors import UserError
from dmd_ds.parallel.engine import DSConfig
from dmd_ds.recipe import REPOSITORY, Recipe, find_ds_config, known_keys, load_recipe, parse_yaml, shipped_recipes, validated
from tests.docs.pages import FIRST_WORDS, PAGES, Command, anchors, blocks, inline_code, links
from tests.test_commands import COMMANDS, parser_of
from tools import plan
from tools.chain import find_chain, read_chain
from tools.study import find_study, read_study

# What a page's command does is done by another test, on less: by how the command begins, the test.
ELSEWHERE = {
    "make demo": "tests/test_demo.py::test_the_demo_runs_from_mp4_files_to_a_judged_student_and_again_fast",
    "pip install -e .": "tests/test_package.py::test_the_wheel_holds_all_files_of_the_package_and_the_pinned_dependencies",
    "python tools/plan.py": "tests/docs/test_docs.py::test_every_plan_that_a_page_asks_for_is_made",
    "deepspeed --hostfile hostfiles/local --no_ssh_check --master_addr 127.0.0.1 dmd_ds/train.py tiny": (
        "tests/test_train.py::test_the_launcher_with_the_local_hostfile_trains_and_the_same_command_resumes"
    ),
    "python dmd_ds/train.py tiny_reward": "tests/distributed/test_stages.py::test_losses_norms_and_weights_are_those_of_plain_pytorch",
    "python tools/chain.py tiny": "tests/tools/test_chain.py::test_a_chain_runs_from_the_teacher_to_a_rewarded_student_and_again_fast",
    "python tools/study.py": "tests/tools/test_study.py::test_a_study_trains_its_runs_once_and_compares_them_with_the_teacher",
    "python tools/evaluate.py STUDENT [STUDENT ...]": (
        "tests/tools/test_evaluate.py::test_a_table_a_report_and_pictures_and_nothing_is_made_twice"
    ),
    "python tools/evaluate.py STUDENT --vbench": (
        "tests/tools/test_evaluate.py::test_two_ranks_make_videos_for_vbench_and_other_settings_are_refused"
    ),
    "python tools/evaluate.py outputs/chain/1_cfg_distill": (
        "tests/distributed/test_stages.py::test_a_guided_student_is_exported_with_its_embedding_or_folded_and_read_as_it_lies_there"
    ),
    "python tools/evaluate.py student outputs/tiny_reward": (
        "tests/tools/test_evaluate.py::test_at_another_size_the_reference_is_the_teachers_own_or_there_is_none"
    ),
    "python inference/web.py": "tests/inference/test_web.py::test_the_button_makes_the_students_video_and_the_teachers_of_the_same_size",
    "python tools/bench.py all": "tests/bench/test_bench.py::test_a_rank_holds_what_zero_3_says",
}
THE_TESTS = ("make test", "make slow")
WALK = REPOSITORY / "docs" / "distil_your_own.md"
AFTER_IT = [REPOSITORY / "README.md", *(WALK.with_name(f"{name}.md") for name in ("training", "export", "cfg_start", "troubleshooting"))]
LANGUAGES = {"sh", "yaml", "json", "python", "math", "text", ""}
of_pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def all_commands(page: Path) -> list[Command]:
    """Those of its blocks, and those that stand in a sentence."""
    told = [Command(page, 0, code, for_gpus=True) for code in inline_code(page) if code.split()[0] in FIRST_WORDS and " " in code]
    told = [command for command in told if len(command.words) > 2 or command.words[0] != "python"]  # a script's name is only its name
    return [command for block in blocks(page) for command in block.commands] + told


# ---- every command is one that its script takes -----------------------------------------------------------------------


def check_script(script: str, words: list[str]) -> None:
    assert (REPOSITORY / script).is_file(), f"{script} is not there"
    arguments = parser_of(script).parse_intermixed_args(words)
    overrides = list(getattr(arguments, "overrides", []))
    if script == "dmd_ds/train.py" and arguments.recipe and "=" in arguments.recipe:
        overrides.insert(0, arguments.recipe)
        arguments.recipe = None
    if script in ("dmd_ds/train.py", "tools/plan.py", "tools/demo.py"):
        check_files(load_recipe(getattr(arguments, "recipe", None) or "tiny", overrides))
    elif script == "tools/chain.py":
        for step in read_chain(find_chain(arguments.chain), Path("out"), arguments.model, overrides):
            check_files(step.recipe)
    elif script == "tools/study.py":
        read_study(find_study(arguments.study))


def check_files(recipe: Recipe) -> None:
    for name in ("generator", "fake_score"):
        if section := getattr(recipe, name):
            find_ds_config(f"{name}.ds_config", section.ds_config)


def check_command(command: Command) -> None:
    first, *rest = command.words
    if first == "deepspeed":
        launcher = parse_launcher(rest)
        assert launcher.hostfile == "/job/hostfile" or (REPOSITORY / launcher.hostfile).is_file(), launcher.hostfile
        check_script(launcher.user_script, launcher.user_args)
    elif first == "python" and rest[0] == "-c":
        compile(rest[1], str(command), "exec")
    elif first == "python":
        check_script(rest[0], rest[1:])
    elif first == "make":
        assert re.search(rf"^{rest[0]}:", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
    elif first == "pip":
        assert rest[:2] == ["install", "-e"] or rest == ["install", "open_clip_torch"]
        for extra in re.findall(r"\[(\w+)\]", rest[-1]):
            assert re.search(rf"^{extra} = \[", (REPOSITORY / "pyproject.toml").read_text(), re.MULTILINE)
    elif first == "sbatch":
        assert (REPOSITORY / rest[0]).is_file()
        check_script("dmd_ds/train.py", rest[1:])
    elif first in ("kubectl", "source"):
        assert (REPOSITORY / rest[-1]).is_file()
    elif first == "pre-commit":
        assert (REPOSITORY / ".pre-commit-config.yaml").is_file()
    else:
        assert first in ("printf", "head"), "a word that no test knows"


@of_pages
def test_every_command_of_a_page_is_one_that_its_script_takes(page, capsys):
    for command in all_commands(page):
        try:
            check_command(command)
        except (SystemExit, UserError, AssertionError) as error:
            if getattr(error, "code", None) != 0:  # as --version ends
                pytest.fail(f"{command}\n{error} {capsys.readouterr().err}")


def test_every_plan_that_a_page_asks_for_is_made(monkeypatch, capsys):
    told = [command.words for page in PAGES for command in all_commands(page)]
    asked = {tuple(words[1:]) for words in told if words[:2] == ["python", "tools/plan.py"]}
    assert len(asked) >= 5
    for words in asked:
        monkeypatch.setattr(sys, "argv", list(words))
        plan.main()
        assert "GB a GPU: fits" in capsys.readouterr().out, words


def is_run(command: Command) -> bool:
    """Here, by the slow tests below."""
    here = command.page in (WALK, *AFTER_IT) and not command.for_gpus
    return here and elsewhere(command) is None and " ".join(command.words) not in THE_TESTS


def elsewhere(command: Command) -> str | None:
    """The test that does the same, of those that are named above."""
    return next((test for begin, test in ELSEWHERE.items() if command.text.startswith(begin)), None)


@of_pages
def test_every_command_is_for_gpus_or_run_here_or_by_a_test_that_is_there(page):
    for command in (command for block in blocks(page) for command in block.commands):
        test = elsewhere(command)
        assert command.for_gpus or test or is_run(command) or " ".join(command.words) in THE_TESTS, f"{command}: nothing runs it"
        if test:
            file, name = test.split("::")
            assert f"\ndef {name}(" in (REPOSITORY / file).read_text(), test


# ---- the commands run -------------------------------------------------------------------------------------------------


def run_page(page: Path, folder: Path) -> None:
    """What is to be typed, block by block, in this folder, beside the project's own."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1"}
    for block in blocks(page):
        script = "\n".join(command.text for command in block.commands if is_run(command))
        command = ["bash", "-euo", "pipefail", "-c", script]
        if block.language == "python" and "from_pretrained" in block.text:
            command = [sys.executable, "-c", block.text]
        elif not script:
            continue
        done = subprocess.run(command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        assert done.returncode == 0, f"{page.name}:{block.line}\n{block.text}\n{done.stdout}\n{done.stderr}"


def beside_the_project(folder: Path) -> Path:
    for name in ("dmd_ds", "tools", "inference", "ds_configs", "hostfiles"):
        (folder / name).symlink_to(REPOSITORY / name)
    return folder


@pytest.fixture(scope="module")
def walked(tmp_path_factory) -> Path:
    """Where the page has been followed to its end."""
    folder = beside_the_project(tmp_path_factory.mktemp("walk"))
    run_page(WALK, folder)
    return folder


@pytest.mark.slow
def test_the_way_from_clips_to_an_evaluated_student_is_walked_by_copy_and_paste(walked):
    steps = [json.loads(line)["step"] for line in (walked / "outputs" / "shapes" / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 26))
    left = ("data/shapes/index.json", "outputs/shapes/report.html", "students/shapes/model_index.json", "videos/manifest.jsonl")
    for name in (*left, *(f"evaluation/{name}" for name in ("table.txt", "report.json", "curves.png", "contact_sheet.png"))):
        assert (walked / name).is_file(), name
    assert "student" in {row["kind"] for row in json.loads((walked / "evaluation" / "report.json").read_text())["rows"]}


@pytest.mark.slow
@pytest.mark.parametrize("page", AFTER_IT, ids=lambda page: page.name)
def test_the_commands_of_a_page_run_in_their_order(page, walked, tmp_path):
    """With the run and the student of the walk in the place of those that `make demo` leaves."""
    beside_the_project(tmp_path)
    (tmp_path / "outputs" / "demo").mkdir(parents=True)
    (tmp_path / "outputs" / "demo" / "run").symlink_to(walked / "outputs" / "shapes")
    (tmp_path / "outputs" / "demo" / "student").symlink_to(walked / "students" / "shapes")
    run_page(page, tmp_path)


# ---- what else is named -----------------------------------------------------------------------------------------------


def fits_a_recipe(tree: dict) -> bool:
    """Whether some shipped recipe may be changed so."""

    def merged(old: dict, new: dict) -> dict:
        return {**old, **{key: merged(old[key], value) if isinstance(old.get(key), dict) else value for key, value in new.items()}}

    for name in shipped_recipes():
        try:
            validated(Recipe, merged(load_recipe(name).model_dump(mode="json"), tree), name)
        except UserError:
            continue
        return True
    return False


@of_pages
def test_snippets_are_what_they_say(page):
    for block in blocks(page):
        assert block.language in LANGUAGES, f"{page.name}:{block.line}: {block.language}"
        if block.language == "yaml":
            assert fits_a_recipe(parse_yaml(block.text, page.name)), f"{page.name}:{block.line}"
        elif block.language == "json":
            DSConfig.model_validate(json.loads(block.text))
        elif block.language == "math":
            assert block.text.count("{") == block.text.count("}") and "$" not in block.text, f"{page.name}:{block.line}"
        elif block.language == "python":
            compile(block.text, f"{page.name}:{block.line}", "exec")


@of_pages
def test_every_link_leads_to_a_file_or_a_heading(page):
    for link in links(page):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link}; there are {sorted(anchors(target))}"


def names_in(tree: ast.Module) -> Iterator[str]:
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        if isinstance(node, ast.ClassDef):
            yield from (f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef))


@of_pages
def test_every_file_and_function_that_is_named_is_there(page):
    rooms = r"(?:dmd_ds|tools|tests|docs|ds_configs|hostfiles|inference)/[\w./-]+"
    for code in inline_code(page):
        if (named := re.fullmatch(rf"({rooms}\.py): ([\w.]+)", code)) and (file := REPOSITORY / named[1]).is_file():
            assert named[2] in set(names_in(ast.parse(file.read_text()))), f"{page.name}: {code}"
        elif found := re.match(rf"{rooms}", code):
            assert (REPOSITORY / found[0]).exists() or "*" in code, f"{page.name}: {code}"


SECTIONS = tuple(f"{name}." for name in Recipe.model_fields)
FILES = (".json", ".yaml", ".jsonl", ".html", ".png", ".txt", ".webp")


def has_value(value: str) -> bool:
    """Not one that stands for any: N, or three dots."""
    return not re.fullmatch(r"[A-Z]|.*\.\.\.", value)


@of_pages
def test_every_key_and_value_that_is_named_is_a_recipes(page):
    known = set(known_keys())
    for code in inline_code(page):
        words = re.findall(r"([a-z][\w.]*)=(\S*)", code) if re.fullmatch(r"([a-z][\w.]*=\S* ?)+", code) else []
        tree: dict = {}
        for key, value in words:
            if key not in known and not key.startswith(SECTIONS) and key not in Recipe.model_fields:
                continue
            assert key in known, f"{page.name}: {code}"
            if has_value(value):
                *sections, leaf = key.split(".")
                within = tree.setdefault(sections[0], {}) if sections else tree
                within[leaf] = yaml.safe_load(value)
                assert "ds_configs/" not in value or (REPOSITORY / value).is_file(), f"{page.name}: {code}"
        assert not tree or fits_a_recipe(tree), f"{page.name}: {code}: no shipped recipe takes it"
        if not words and code.startswith(SECTIONS) and not code.endswith(FILES) and re.fullmatch(r"[\w.]+", code):
            assert code in known or known & {key for key in known if key.startswith(f"{code}.")}, f"{page.name}: {code}"


@of_pages
def test_every_option_that_is_named_is_some_commands(page):
    options = {option for script in COMMANDS for action in parser_of(script)._actions for option in action.option_strings}
    options |= {"--no_ssh"}  # deepspeed's
    for code in inline_code(page):
        if option := re.match(r"--[\w-]+", code):
            assert option[0] in options, f"{page.name}: {code}"
