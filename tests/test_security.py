"""What comes from elsewhere runs no code, leads out of no folder and steers no terminal; keys of the environment stay there."""

import ast
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dmd_ds.data.video import VideoSize, read_video, size_of_film
from dmd_ds.errors import UserError, one_line
from dmd_ds.generation import Settings
from dmd_ds.recipe import REPOSITORY, known_keys, load_recipe
from dmd_ds.vbench import file_stem, wanted
from dmd_ds.wan.tensors import stored_tensors
from dmd_ds.wan.text import load_tokenizer
from inference.generate import Job
from tests.data.test_video import film

SOURCES = [path for room in ("dmd_ds", "tools", "inference") for path in (REPOSITORY / room).rglob("*.py")]
READ_FROM_ENVIRONMENT = {
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS"),
    *("CROSS_RANK", "GROUP_RANK", "SLURM_NODEID", "LOCAL_WORLD_SIZE", "CUDA_VISIBLE_DEVICES"),
}
RUNS_CODE = {"eval", "exec", "compile", "os.system", "os.popen", "pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.loads"}
RUNS_CODE |= {"yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load", "shelve.open", "joblib.load", "importlib.import_module"}


def calls(source: str) -> list[tuple[str, dict[str, object]]]:
    """(dotted name, its arguments by name where they are plain) of every call."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            given = {word.arg: word.value.value for word in node.keywords if isinstance(word.value, ast.Constant)}
            found.append((ast.unparse(node.func), given))
    return found


def dangers(source: str) -> list[str]:
    """The calls that could run what they read."""
    return [
        name
        for name, given in calls(source)
        if name in RUNS_CODE
        or (name == "torch.load" and given.get("weights_only") is not True)
        or given.get("shell") is True
        or given.get("allow_pickle") is True
        or given.get("trust_remote_code") is True
        or (name.endswith("from_pretrained") and "Tokenizer" in name and given.get("trust_remote_code") is not False)
    ]


def test_nothing_that_is_read_is_run():
    assert len(SOURCES) > 40
    named_by_a_recipe = {"dmd_ds/rewards/__init__.py": ["importlib.import_module"]}  # whoever starts a run is trusted
    found = {str(path.relative_to(REPOSITORY)): dangers(path.read_text()) for path in SOURCES}
    assert {path: calls for path, calls in found.items() if calls} == named_by_a_recipe
    for line in ("torch.load(f)", "yaml.load(f)", "eval('1')", "run(c, shell=True)", "np.load(f, allow_pickle=True)", "pickle.load(f)"):
        assert dangers(line)  # the search finds what is there


def test_only_a_jobs_own_variables_are_read_from_the_environment():
    read = set()
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Subscript(value=value, slice=ast.Constant(value=name)) if ast.unparse(value) == "os.environ":
                    read.add(name)
                case ast.Call(func=func, args=[ast.Constant(value=name), *_]) if ast.unparse(func) in ("os.environ.get", "os.getenv"):
                    read.add(name)
    assert "RANK" in read and read <= READ_FROM_ENVIRONMENT
    assert not [key for key in known_keys() if any(word in key for word in ("token", "secret", "password", "api_key"))]


# ---- names made of prompts --------------------------------------------------------------------------------------------

PROMPTS = [
    "../../x", "/etc/x", "a\0b", "a" * 5000, "", ".", "..", "...", ".hidden", "ä" * 300, "\u202egpj.exe", "a\nb", "\x1b[2Jx", "con", "~",
    "-rf", "\\\\server\\x", "a" * 300 + "/x", "manifest.jsonl", "\U0001f600" * 100, "a/b", "a_b", "*", "$(touch x)", "`x`; rm -rf .",
]  # fmt: skip


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_video_is_called_by_harmless_letters_whatever_its_prompt(prompt, tmp_path):
    name = Job(prompt, 1).name(0, Settings(), "m", "")
    assert set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-.") and ".." not in name
    (tmp_path / f".{name.removesuffix('.mp4')}.tmp.mp4").touch()
    (tmp_path / name).touch()
    assert {path.name for path in tmp_path.iterdir()} == {name, f".{name.removesuffix('.mp4')}.tmp.mp4"}


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_video_for_vbench_stays_in_its_folder_in_sight(prompt, tmp_path):
    (video,) = wanted([prompt], 1, 0)
    assert Path(video.file).name == video.file and not video.file.startswith(".") and video.file.isprintable()
    (tmp_path / f".{video.file.removesuffix('.mp4')}.tmp.mp4").touch()
    (tmp_path / video.file).touch()
    assert len(list(tmp_path.iterdir())) == 2


def test_no_two_prompts_share_a_file():
    spoofed = [file_stem("a/b"), file_stem("." * 3), file_stem("a" * 5000)]  # prompts that read like another's name with its hash
    prompts = list(dict.fromkeys([*PROMPTS, *spoofed, "a" * 4999, "../x", "..x", "__x"]))
    assert len({file_stem(prompt) for prompt in prompts}) == len(prompts)
    assert len({Job(prompt, 1).name(0, Settings(), "m", "") for prompt in prompts}) == len(prompts)


# ---- names in files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["../secret.safetensors", "/tmp/secret.safetensors", "a/../../secret.safetensors", "..", "a\\b"])
def test_an_index_of_weights_names_files_of_its_own_folder(tmp_path, file):
    save_file({"a": torch.ones(1)}, tmp_path / "secret.safetensors")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": file}}))
    with pytest.raises(UserError, match="index.json: weight_map.a="):
        stored_tensors(folder)


@pytest.mark.parametrize("text", ["ffconcat version 1.0\nfile other.mp4\n", "#EXTM3U\n#EXTINF:1,\nother.mp4\n#EXT-X-ENDLIST\n"])
def test_a_film_that_only_names_others_is_none(tmp_path, text):
    (tmp_path / "other.mp4").write_bytes(film("bikes.mp4").read_bytes())
    (tmp_path / "list.mp4").write_text(text)
    assert len(read_video(tmp_path / "other.mp4", 5, 32, 32, 8)) == 5
    with pytest.raises(UserError, match="list.mp4: not readable as a video"):
        read_video(tmp_path / "list.mp4", *VideoSize(5, 32, 32), 8)
    with pytest.raises(UserError, match="list.mp4: not readable as a video"):
        size_of_film(tmp_path / "list.mp4", 8)


def test_a_tokenizer_that_brings_code_along_does_not_run_it(tmp_path):
    (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Mine:\n    pass\n")
    config = {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Mine", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="not readable as a tokenizer"):
        load_tokenizer(tmp_path)
    assert not (tmp_path / "ran").exists()


# ---- messages ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["a\nb", "a\x1b[2J\x07b", "a\ud800b", "\u202eb", "x" * 10**6, "\n" * 5000])
def test_a_message_is_one_line_that_a_terminal_may_be_shown(text):
    for error in (UserError(text), UserError(f"file: {text}")):
        assert str(error).isprintable() and len(str(error)) < 1100 and str(error).encode()
    assert one_line("plain: ä 3 × 4") == "plain: ä 3 × 4"


def test_aliases_that_unfold_to_gigabytes_are_one_short_line(tmp_path):
    names = "abcdefghi"
    lines = ["a: &a [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]" for old, new in zip(names, names[1:], strict=False)]
    (tmp_path / "bomb.yaml").write_text("\n".join(lines) + "\nmodel: *i\n")
    with pytest.raises(UserError, match="bomb.yaml: ") as error:
        load_recipe(str(tmp_path / "bomb.yaml"))
    assert len(str(error.value)) < 1100
