"""Fills the page: everything a browser needs, data, styles, scripts and videos, in one file."""

import dataclasses
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dmd_ds import __version__
from dmd_ds.checkpoint import write_whole
from dmd_ds.errors import UserError, read_text
from dmd_ds.recipe import PACKAGE, known_keys
from dmd_ds.report.panels import groups
from dmd_ds.report.runs import RunFolder, read_run
from dmd_ds.report.samples import Videos, gather

TEMPLATE = PACKAGE / "assets" / "report"
SCRIPTS = ("dom.js", "charts.js", "videos.js", "facts.js", "page.js")
MEGABYTES = 48  # of videos, in a page
ON_A_GPU = "Measured is the most that the allocator gave out on the first rank, in any step or look."
ON_THE_CPU = (
    "Without an accelerator the whole process is measured: what it grew by since before there was a model, what libraries and the "
    "allocator keep for themselves included. The plan counts tensors alone."
)
WITHOUT_VALIDATION = "The plan leaves out validation, whose autoencoder is not of Wan2.1's size."


def tiles(run: RunFolder) -> list[dict[str, Any]]:
    """What is asked first: how far, how fast, how good. `state`: whether the number is as it should be, where that is known."""
    found = [{"label": "Steps", "value": f"{run.step:,}", "note": f"of {run.recipe.max_steps:,}"}]
    seconds = [line["seconds"] for line in run.metrics]
    if seconds:
        found.append({"label": "Seconds a step", "value": f"{statistics.median(seconds):.3g}", "note": f"{duration(sum(seconds))} in all"})
    for what, label in (("frechet", "Fréchet distance"), ("drift", "Drift")):
        value = run.last(f"validation/{run.student}/{what}")
        if value is None:
            continue
        if what == "drift":
            band = run.recipe.validation.drift_band
            state = "good" if value <= band else "bad"
            found.append({"label": label, "value": f"{value:.0%}", "note": f"band {band:.0%}, {run.student} weights", "state": state})
        else:
            beside = [f"{name} {numbers[what]:.3g}" for name, numbers in run.kept.items() if what in numbers]
            found.append({"label": label, "value": f"{value:.3g}", "note": ", ".join(beside)})
    if (memory := run.last("memory_gb")) is not None:
        found.append({"label": "Peak memory", "value": f"{memory:.3g} GB", "note": "first rank, measured"})
    count, note = len(run.warnings), f"last at step {run.warnings[-1]['step']:,}" if run.warnings else ""
    return [*found, {"label": "Warnings", "value": str(count), "note": note, "state": "bad" if count else "good"}]


def duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours} h {rest // 60:02d} min" if hours else f"{rest // 60} min {rest % 60:02d} s"


def memory(run: RunFolder) -> dict[str, Any] | None:
    """The plan of the last start, in GB by cause, and what was measured; None for a run without either."""
    measured = run.last("memory_gb")
    if not run.starts or run.starts[-1]["planned"] is None or measured is None:
        return None
    first, plan = run.starts[-1]["ranks"][0], run.starts[-1]["planned"]
    on_gpu = first["device_memory_gb"] is not None
    is_whole = not run.recipe.validation.every or any(phase.startswith("validation") for phase in plan["phases"])
    gb = {name: size / 1e9 for name, size in plan["always"].items()}
    top = {name: size / 1e9 for name, size in plan["phases"][plan["peak_phase"]].items()}
    return {
        "always": gb,
        "peak": top,
        "phase": plan["peak_phase"],
        "measured": measured if on_gpu else measured - first["resident_gb"],
        "device": first["device_memory_gb"],
        "note": " ".join([ON_A_GPU if on_gpu else ON_THE_CPU, *([] if is_whole else [WITHOUT_VALIDATION])]),
    }


def facts(run: RunFolder) -> dict[str, list[list[str]]]:
    """Tables of names and values: what it runs on, and what with."""
    if not run.starts:
        return {}
    start = run.starts[-1]
    ranks, first = start["ranks"], start["ranks"][0]
    hosts = list(dict.fromkeys(rank["host"] for rank in ranks))
    device = first["device"] + (f", {first['device_memory_gb']:.0f} GB" if first["device_memory_gb"] else "")
    machine = [
        ["Ranks", f"{len(ranks)} = " + " x ".join(f"{name} {size}" for name, size in start["split"].items())],
        ["Device", device],
        ["Hosts", ", ".join(hosts)],
        ["Processor", f"{first['cpu']}, {first['cores']} cores, {first['host_memory_gb']:.0f} GB"],
        ["Started", ", ".join(f"{one['time']} at step {one['step']}" for one in run.starts[-3:])],
        ["Command", " ".join(start["command"])],
        *([line.partition(" ")[0].capitalize(), line.partition(" ")[2]] for line in start["summary"][:2]),
        ["Job", start["summary"][-1]],
    ]
    return {"Machine": machine, "Versions": [[name, version] for name, version in start["versions"].items()]}


def differences(runs: Sequence[RunFolder]) -> list[list[str]]:
    """The recipes' keys in which the runs differ: the key, and its value in each."""
    trees = [run.recipe.model_dump(mode="json") for run in runs]
    rows = []
    for key in known_keys():
        values = list(trees)
        for part in key.split("."):
            values = [value[part] for value in values]
        written = [json.dumps(value).strip('"') for value in values]
        if len(set(written)) > 1:
            rows.append([key, *written])
    return rows


def content(runs: Sequence[RunFolder], megabytes: float) -> dict[str, Any]:
    """All that the page's scripts read."""
    videos = Videos()
    samples = gather(runs, int(megabytes * 1e6), videos)
    return {
        "made": f"dmd_ds {__version__}, {time.strftime('%Y-%m-%d %H:%M')}",
        "runs": [
            {
                "name": run.name,
                "folder": str(run.folder),
                "student": run.student,
                "is_done": run.step >= run.recipe.max_steps,
                "tiles": tiles(run),
                "warnings": [[line["step"], line["warning"]] for line in run.warnings],
                "memory": memory(run),
                "facts": facts(run),
                "recipe": run.recipe_text,
            }
            for run in runs
        ],
        "groups": [dataclasses.asdict(group) for group in groups(runs)],
        "samples": samples and dataclasses.asdict(samples),
        "differences": differences(runs) if len(runs) > 1 else [],
        "videos": videos.content,
    }


def page(runs: Sequence[RunFolder], megabytes: float) -> str:
    """The whole page. No text of a run can end the script that holds it: `<` is written as an escape."""
    data = json.dumps(content(runs, megabytes), ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
    parts = {
        "{{title}}": escaped(" and ".join(run.name for run in runs)),
        "{{style}}": read_text(TEMPLATE / "style.css"),
        "{{script}}": "\n".join(read_text(TEMPLATE / name) for name in SCRIPTS),
        "{{data}}": data,
    }
    text = read_text(TEMPLATE / "page.html")
    for mark, part in parts.items():  # the data last: what it says is not looked through for marks
        before, found, after = text.partition(mark)
        assert found, f"{mark} is not in the template"
        text = before + part + after
    return text


def escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")


def write_page(folders: Sequence[Path], out: Path, megabytes: float = MEGABYTES, title: str | None = None) -> None:
    """`title`: of a run's page, in place of its folder's name. `UserError` for a folder that is no run's, or one that is named twice."""
    runs = [read_run(folder) for folder in folders]
    if len({run.folder.resolve() for run in runs}) < len(runs):
        raise UserError(f"{' '.join(map(str, folders))}: name each run once")
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        runs = [dataclasses.replace(run, name=f"{run.folder.resolve().parent.name}/{run.name}") for run in runs]
    if title is not None:
        runs = [dataclasses.replace(run, name=title) for run in runs]
    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, page(runs, megabytes))
