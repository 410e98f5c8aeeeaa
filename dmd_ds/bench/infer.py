"""The student's 4 steps against the teacher's 50 with guidance: seconds of denoising, of an evaluation, and of a whole video.

Denoising is measured on random weights of a size where compute dominates, whole videos (text, denoising, VAE) on the tiny Wan2.1
that ships. Ways take turns in one process, so what slows the machine slows all of them.
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from deepspeed.accelerator import get_accelerator
from diffusers import UniPCMultistepScheduler

from dmd_ds.bench.ranks import run_ranks
from dmd_ds.bench.world import World, written
from dmd_ds.generation import VideoModel, inference_dtype
from dmd_ds.parallel.attention import SequenceParallel
from dmd_ds.parallel.mesh import joined
from dmd_ds.recipe import Parallel, Sampling
from dmd_ds.sampler import Velocity, few_step_schedule, few_step_x0, guided, scheduler_sample
from dmd_ds.wan.denoiser import WanDenoiser
from dmd_ds.wan.text import padded_tokens
from dmd_ds.wan.weights import whole_transformer

STEPS, TEACHER_STEPS, GUIDANCE = 4, 50, 5.0
Seconds = dict[str, list[float]]


def timed(function: Callable[[], object]) -> float:
    get_accelerator().synchronize()
    began = time.perf_counter()
    function()
    get_accelerator().synchronize()
    return time.perf_counter() - began


def in_turns(ways: dict[str, Callable[[], object]], repeats: int) -> Seconds:
    for function in ways.values():
        function()  # to warm up, and to compile
    found: Seconds = {name: [] for name in ways}
    for number in range(repeats):
        names = list(ways) if number % 2 else list(ways)[::-1]
        for name in names:
            found[name].append(timed(ways[name]))
    return found


@torch.no_grad()
def denoising(world: World, folder: str, parallel: Parallel, batch: int, compiled: bool, teacher: bool, repeats: int) -> Seconds:
    with joined(parallel) as mesh:
        dtype = inference_dtype(mesh.device)
        transformer = whole_transformer(Path(folder) / "model", dtype)
        if compiled:
            transformer.blocks = torch.nn.ModuleList(torch.compile(block) for block in transformer.blocks)
        model = WanDenoiser(transformer, SequenceParallel(mesh, dtype)).to(mesh.device).eval()
        text = torch.randn(2, batch, padded_tokens(world.text, dtype), world.model.text_dim, device=mesh.device)
        noise = torch.randn(batch, *world.latents_shape, device=mesh.device)

        def velocity(which: int) -> Velocity:
            return lambda x, sigma_B: model(x, sigma_B, text[which])

        schedule = few_step_schedule(Sampling(steps=STEPS))
        unipc = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0)
        two = guided(velocity(0), velocity(1), GUIDANCE)
        ways = {"student": lambda: few_step_x0(velocity(0), lambda k: torch.randn_like(noise), schedule, STEPS - 1)}
        if teacher:
            ways["teacher"] = lambda: scheduler_sample(two, unipc, TEACHER_STEPS, noise)
        return in_turns(ways, repeats)


def whole_videos(batch: int, repeats: int) -> Seconds:
    with joined(Parallel()) as mesh:
        model = VideoModel("tiny-wan", mesh.device)
        prompts, seeds = ["a red circle moving sideways"] * batch, list(range(batch))
        teacher = model.settings.changed(guidance=2.5)
        student = model.settings.changed(steps=STEPS, guidance=1.0, few_step=Sampling(steps=STEPS).model_dump())
        ways = {"student": lambda: model.videos(prompts, seeds, student), "teacher": lambda: model.videos(prompts, seeds, teacher)}
        return in_turns(ways, repeats)


def on_rank(what: str, world: dict, ulysses: int = 1, **arguments) -> Seconds:
    if what == "videos":
        return whole_videos(**arguments)
    return denoising(World(**world), parallel=Parallel(ulysses=ulysses), **arguments)


def measure(world: World, repeats: int) -> list[dict]:
    rows = []
    with written(world) as folder:
        base = {"folder": folder, "repeats": repeats, "batch": 1, "compiled": False, "teacher": False, "ulysses": 1}
        for name, changes in (
            ("denoising", {"teacher": True}),
            ("denoising, batch of 4 prompts", {"batch": 4}),
            ("denoising, compiled blocks", {"compiled": True}),
            ("denoising, 2 ranks a sample", {"ulysses": 2}),
        ):
            how = base | changes
            found = run_ranks("infer", how["ulysses"], what="denoising", world=world.__dict__, **how)
            rows.append({"name": name, "batch": how["batch"], "seconds": found})
    found = run_ranks("infer", 1, what="videos", world=world.__dict__, batch=1, repeats=repeats)
    return [*rows, {"name": "a whole video of the tiny Wan2.1", "batch": 1, "seconds": found}]


def table(rows: list[dict]) -> str:
    lines = ["| | student, s a video | an evaluation | teacher, s a video | an evaluation | teacher / student |", "|---" * 6 + "|"]
    for row in rows:
        cells = [row["name"]]
        for name, evaluations in (("student", STEPS), ("teacher", 2 * TEACHER_STEPS)):
            if name not in row["seconds"]:
                cells += ["-", "-"]
                continue
            a_video = statistics.median(row["seconds"][name]) / row["batch"]
            cells += [f"{a_video:.3f}", f"{a_video / evaluations:.4f}"]
        both = row["seconds"]
        ratios = [t / s for t, s in zip(both["teacher"], both["student"], strict=True)] if "teacher" in both else []
        cells.append(f"{statistics.median(ratios):.1f}" if ratios else "-")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
