"""The curves of a report: which numbers stand in which panel, thinned to what a page can show."""

import dataclasses
from collections.abc import Sequence

from dmd_ds.drift import LOOKS
from dmd_ds.monitor import OF_THE_MACHINE
from dmd_ds.report.runs import RunFolder
from dmd_ds.validation import EMA, TEACHER, TRAINED, UNDISTILLED

MOST_POINTS = 2000  # of a curve
TITLES = {
    "loss/dm": "Distribution matching, loss",
    "loss/fake_score": "Fake score, loss",
    "loss/gan_generator": "GAN, generator's loss",
    "loss/gan_discriminator": "GAN, discriminator's loss",
    "loss/r1": "GAN, R1 penalty",
    "loss/regression": "Regression, loss",
    "loss/cfg_distill": "Guidance distillation, loss",
    "loss/reward": "Rewards, loss",
    "reward/all": "All rewards, weighed",
    "reward/penalty": "Rewards, penalty",
    "grad_norm/generator": "Generator, gradient norm",
    "grad_norm/fake_score": "Fake score, gradient norm",
    "drift": "Drift: the largest deviation",
    "drift_saturation": "Saturation",
    "drift_contrast": "Contrast",
    "drift_motion": "Motion",
    "drift_latent_mean": "Latents' means",
    "drift_latent_std": "Latents' deviations",
    "frechet": "Fréchet distance",
    "both": "Colour, shape and motion right",
    "color": "Colour right",
    "shape": "Shape right",
    "motion": "Motion right",
    "speed": "Speed of motion",
    "sharpness": "Sharpness",
    "saturation": "Saturation",
    "seconds": "Seconds a step",
    "memory_gb": "Peak memory, GB",
}
FIRST = ("frechet", "both")  # of the quality panels
SHARES = ("both", "color", "shape", "motion")  # of the videos, 0 to 1


@dataclasses.dataclass(frozen=True)
class Series:
    """One curve. `color`: its place in the page's palette."""

    name: str
    color: int
    x: list[int]
    y: list[float | None]


@dataclasses.dataclass(frozen=True)
class Panel:
    """`band`: values that are as they should be; `levels`: by name, a value to compare with; `limits`: values that the axis holds in
    any case; `percent`: how values are written; `smooth`: whether they are noisy."""

    title: str
    series: list[Series]
    band: tuple[float, float] | None = None
    levels: dict[str, float] = dataclasses.field(default_factory=dict)
    limits: tuple[float, float] | None = None
    percent: bool = False
    smooth: bool = False


@dataclasses.dataclass(frozen=True)
class Group:
    title: str
    note: str
    panels: list[Panel]


def rounded(value: float) -> float:
    return float(f"{value:.5g}")


def thinned(column: dict[int, float | None], most: int = MOST_POINTS) -> tuple[list[int], list[float | None]]:
    """The curve in at most so many points: of each part of a longer one its least and its greatest, so that no spike is lost."""
    points = list(column.items())
    if len(points) > most:
        size = -(-len(points) // (most // 2))
        kept = []
        for start in range(0, len(points), size):
            part = points[start : start + size]
            known = [point for point in part if point[1] is not None] or part[:1]
            kept += sorted({min(known, key=lambda point: point[1] or 0), max(known, key=lambda point: point[1] or 0)})
        points = kept
    return [step for step, _ in points], [value if value is None else rounded(value) for _, value in points]


def names_of(runs: Sequence[RunFolder]) -> list[str]:
    """Of the logged numbers, in the order in which they were first met."""
    return list(dict.fromkeys(name for run in runs for line in run.metrics for name in line if name != "step"))


def panel(runs: Sequence[RunFolder], name: str) -> Panel:
    """Of a number that is not validation's: a curve a run."""
    series = [Series(run.name, color, *thinned(column)) for color, run in enumerate(runs) if (column := run.column(name))]
    return Panel(TITLES.get(name, name), series, smooth=name not in OF_THE_MACHINE)


def looked_at(runs: Sequence[RunFolder], what: str) -> Panel:
    """Of what validation measures: of one run the trained weights and their average, of several each one's student."""
    if len(runs) == 1:
        names = {"average": EMA, "trained weights": TRAINED}
        columns = {title: runs[0].column(f"validation/{weights}/{what}") for title, weights in names.items()}
    else:
        columns = {run.name: run.column(f"validation/{run.student}/{what}") for run in runs}
    series = [Series(title, color, *thinned(column)) for color, (title, column) in enumerate(columns.items()) if column]
    band, levels = None, {}
    kept = next((run.kept for run in runs if run.kept), {})
    if what.startswith("drift"):
        width = runs[0].recipe.validation.drift_band
        band = (-width if what.removeprefix("drift_") in LOOKS else 0.0, width)
    elif TEACHER in kept and what in kept[TEACHER]:
        levels = {"teacher": kept[TEACHER][what]}
    if UNDISTILLED in kept and what in kept[UNDISTILLED]:
        levels["undistilled"] = kept[UNDISTILLED][what]
    levels = {name: rounded(value) for name, value in levels.items()}
    limits = (0.0, 1.0) if what in SHARES else None
    return Panel(TITLES.get(what, what), series, band, levels, limits, percent=band is not None or what in SHARES)


def groups(runs: Sequence[RunFolder]) -> list[Group]:
    """All there is to draw; a group without a curve is left out."""
    names = names_of(runs)
    looked = list(dict.fromkeys(name.split("/", 2)[2] for name in names if name.startswith("validation/")))
    drifts = sorted((what for what in looked if what.startswith("drift")), key=lambda what: what != "drift")
    qualities = [what for what in FIRST if what in looked]
    qualities += [what for what in looked if not what.startswith("drift") and what not in FIRST]
    learning = [name for name in names if not name.startswith("validation/") and name not in OF_THE_MACHINE]
    found = [
        Group("Learning", "Loss and gradient norm of every step.", [panel(runs, name) for name in learning]),
        Group(
            "Drift",
            "How far the student's videos are from the teacher's of the same prompts and noise, as a share of the teacher's. "
            "What leaves the shaded band is warned of.",
            [looked_at(runs, what) for what in drifts],
        ),
        Group("Quality", "What the samples are worth, measured at every look.", [looked_at(runs, what) for what in qualities]),
        Group(
            "Time and memory",
            "Of the first rank; looks and saves are part of their steps.",
            [panel(runs, name) for name in OF_THE_MACHINE if name in names],
        ),
    ]
    return [group for group in found if any(one.series for one in group.panels)]
