"""The stages around DMD2 in plain PyTorch, one process, written from their formulas: what the engines are held against.

As plain_dmd2.py it shares with the project the model's class (diffusers'), peft and the random numbers; no loss, sampler, level
or step.
"""

import copy
import math
from collections.abc import Callable

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.models.embeddings import TimestepEmbedding
from peft import LoraConfig, get_peft_model

from dmd_ds.data.latents import BatchOrder, LatentsDataset
from dmd_ds.randomness import Randomness
from dmd_ds.recipe import Recipe
from tests.distributed.plain_dmd2 import noise_levels, pad

TARGETS = r"blocks\.\d+\.(attn[12]\.(to_q|to_k|to_v|to_out\.0)|ffn\.net\.(0\.proj|2))"


def redness(frames: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    """A reward: how red, and more so for longer prompts."""
    weights = torch.tensor([1.0 + len(prompt) / 10 for prompt in prompts])
    return weights * (frames[:, :, 0] - frames[:, :, 1:].mean(2)).mean((1, 2, 3))


def steadiness(frames: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    return -(frames[:, 1:] - frames[:, :-1]).square().mean((1, 2, 3, 4))


class Plain:
    """A run of one stage: its model, its frozen teacher, and what a step sees."""

    def __init__(self, recipe: Recipe, global_batch_size: int):
        self.recipe = recipe
        self.student = WanTransformer3DModel.from_pretrained(f"{recipe.model.path}/transformer").train()
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.dataset = LatentsDataset(recipe.data.path)
        self.draw = Randomness(recipe.seed)
        self.order = BatchOrder(self.dataset.buckets(), global_batch_size, self.draw)
        self.samples = list(range(global_batch_size))
        self.asked = None  # the guidance that the student's embedding is told
        self.sigmas, self.told = noise_levels(recipe.sampling)

    def embed_guidance(self, weights: dict[str, torch.Tensor]) -> None:
        """As a term beside what the time embedding gives."""
        config, embedder = self.student.config, self.student.condition_embedder
        embedder.guidance_embedder = TimestepEmbedding(config.freq_dim, config.num_attention_heads * config.attention_head_dim)
        self.student.load_state_dict(weights, strict=False)
        half = config.freq_dim // 2
        rates = torch.exp(-math.log(10000) * torch.arange(half) / half)

        def add(module, inputs, out):
            angles = 1000 * self.asked[:, None] * rates
            return out + embedder.guidance_embedder(torch.cat([angles.cos(), angles.sin()], 1))

        embedder.time_embedder.register_forward_hook(add)

    def look(self, step: int) -> None:
        self.shape, indices = self.order(step)
        self.text = pad([self.dataset.prompt_embeds(i) for i in indices])
        self.empty = pad([self.dataset.negative_embeds_LD] * len(indices))
        self.latents = torch.stack([self.dataset[i].latents for i in indices])
        self.prompts = [self.dataset[i].caption for i in indices]

    def velocity(self, x, sigma: float, model=None):
        model = self.student if model is None else model
        return model(x, torch.full((len(x),), 1000 * sigma), self.text, return_dict=False)[0]

    @torch.no_grad()
    def guided(self, x, sigma_B, guidance_B):
        conditional, unconditional = (self.teacher(x, 1000 * sigma_B, text, return_dict=False)[0] for text in (self.text, self.empty))
        return unconditional + guidance_B.view(-1, 1, 1, 1, 1) * (conditional - unconditional)

    def along(self, x, levels: list[float], guidance_B):
        """The guided teacher's path over these levels, by Adams and Bashforth's method of two steps: where it is at each."""
        found, slopes = [x], []
        for number, (level, following) in enumerate(zip(levels, levels[1:], strict=False)):
            slopes.append(self.guided(x, torch.full((len(x),), level), guidance_B))
            slope = slopes[-1]
            if number:
                slope = slope + (following - level) / 2 / (level - levels[number - 1]) * (slopes[-1] - slopes[-2])
            x = x + (following - level) * slope
            found.append(x)
        return found

    def even(self, steps: int) -> list[float]:
        s = self.recipe.score.shift
        return [s * u / (1 + (s - 1) * u) for u in (1 - i / steps for i in range(steps + 1))]


def plain_stage(recipe: Recipe, global_batch_size: int, epsilon: float, embedding: dict[str, torch.Tensor] | None = None):
    """(metrics a step, the generator's trained weights)."""
    run = Plain(recipe, global_batch_size)
    section = recipe.generator
    if embedding:
        run.embed_guidance(embedding)
    if section.lora_rank:
        torch.manual_seed(recipe.seed + 1)
        get_peft_model(run.student, LoraConfig(r=section.lora_rank, lora_alpha=section.lora_alpha, target_modules=TARGETS))  # in place
        if embedding:
            run.student.condition_embedder.guidance_embedder.requires_grad_(True)
    trained = {name: parameter for name, parameter in run.student.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.AdamW(
        trained.values(), lr=section.lr, betas=section.betas, eps=epsilon, weight_decay=section.weight_decay
    )
    loss_of: Callable = {"cfg_distill": cfg_distill, "regression": regression, "reward": Rewarding(run) if recipe.reward.rewards else None}[
        recipe.stage
    ]
    log = []
    for step in range(recipe.max_steps):
        run.look(step)
        loss, line = loss_of(run, step)
        optimizer.zero_grad()
        loss.backward()
        line["grad_norm/generator"] = float(torch.nn.utils.clip_grad_norm_(trained.values(), section.max_grad_norm))
        falling = (recipe.max_steps - step) / (section.cooldown_steps + 1)
        optimizer.param_groups[0]["lr"] = section.lr * min(0.5 if step == 0 else 1.0, falling)  # warm-up of 1 update
        optimizer.step()
        log.append(line)
    return log, trained


def cfg_distill(run: Plain, step: int):
    """mean (sqrt((v - v*)^2 + c^2) - c), v* = u + w (c - u)."""
    recipe, settings = run.recipe, run.recipe.cfg_distill
    run.asked = settings.guidance_min + (settings.guidance_max - settings.guidance_min) * run.draw.uniform(
        "cfg_distill/guidance", step, run.samples
    )
    s, data = recipe.score.shift, settings.input == "data"
    u = run.draw.uniform("cfg_distill/sigma", step, run.samples if data else [0])
    sigma = (s * u / (1 + (s - 1) * u)).clamp(recipe.score.sigma_min, recipe.score.sigma_max)
    noise = run.draw.normal("cfg_distill/noise", step, run.samples, run.shape)
    if data:
        s5 = sigma.view(-1, 1, 1, 1, 1)
        x = (1 - s5) * run.latents + s5 * noise
    else:
        levels = [level for level in run.even(settings.teacher_steps) if level > float(sigma)] + [float(sigma)]
        x, sigma = run.along(noise, levels, run.asked)[-1], sigma.repeat(len(noise))
    target = run.guided(x, sigma, run.asked)
    velocity = run.student(x, 1000 * sigma, run.text, return_dict=False)[0]
    loss = (torch.sqrt((velocity - target) ** 2 + settings.huber_c**2) - settings.huber_c).mean()
    return loss, {"loss/cfg_distill": float(loss.detach())}


def regression(run: Plain, step: int):
    """mean |x0 - target|^2."""
    settings = run.recipe.regression
    guidance = torch.full((len(run.samples),), run.recipe.score.guidance)
    noise = run.draw.normal("regression/noise", step, run.samples, run.shape)
    if settings.target == "consistency":
        levels = run.even(settings.teacher_steps)
        number = run.draw.integer("regression/point", step, settings.teacher_steps)
        told = sigma = levels[number]
        x, following = (1 - sigma) * run.latents + sigma * noise, levels[number + 1]
        further = x + (following - sigma) * run.guided(x, torch.full((len(x),), sigma), guidance)
        with torch.no_grad():
            target = further - following * run.velocity(further, following)
    else:
        exit_step = run.draw.integer("regression/exit_step", step, len(run.told))
        sigma, told = float(run.sigmas[exit_step]), float(run.told[exit_step])
        own = run.sigmas.tolist()
        if settings.target == "end":
            levels = sorted({*own, *(level for level in run.even(settings.teacher_steps) if level < own[0])}, reverse=True)
            path = run.along(noise, levels, guidance)
            x, target = path[levels.index(sigma)], path[-1]
        else:  # Euler's steps to and through the halves
            x = noise
            for number in range(exit_step + 1):
                at = x
                middle = (own[number] + own[number + 1]) / 2
                for level, following in ((own[number], middle), (middle, own[number + 1])):
                    x = x + (following - level) * run.guided(x, torch.full((len(x),), level), guidance)
            # x = at + (next - sigma) v and x0 = at - sigma v
            x, target = at, at - sigma * (x - at) / (own[exit_step + 1] - sigma)
    loss = ((x - sigma * run.velocity(x, told) - target) ** 2).mean()
    return loss, {"loss/regression": float(loss.detach())}


class Rewarding:
    """penalty mean |v - v_start|^2 - sum of weight x reward."""

    def __init__(self, run: Plain):
        self.vae = AutoencoderKLWan.from_pretrained(f"{run.recipe.model.path}/vae").requires_grad_(False)

    def __call__(self, run: Plain, step: int):
        settings, count = run.recipe.reward, len(run.told)
        x, differences = run.draw.normal("reward/rollout0", step, run.samples, run.shape), []
        for k in range(count):
            with torch.set_grad_enabled(k >= count - settings.steps):
                v = run.velocity(x, float(run.told[k]))
                x0 = x - run.sigmas[k] * v
            if k >= count - settings.steps:
                with torch.no_grad():
                    start = run.velocity(x, float(run.told[k]), run.teacher)
                differences.append(((v - start) ** 2).mean())
            if k < count - 1:
                noise = run.draw.normal(f"reward/rollout{k + 1}", step, run.samples, run.shape)
                x = (1 - run.sigmas[k + 1]) * x0 + run.sigmas[k + 1] * noise
        frames = (self.vae.decode(x0).sample.transpose(1, 2) + 1) / 2  # the mini VAE's latents are of mean 0 and deviation 1
        if settings.frames != "all":
            frames = frames[:, settings.frames]
        scores = {name: globals()[name.split(":")[1]](frames, run.prompts).mean() for name in settings.rewards}
        reward = sum(term.weight * scores[name] for name, term in settings.rewards.items())
        penalty = sum(differences) / len(differences)
        loss = settings.penalty * penalty - reward
        line = {"loss/reward": loss, "reward/all": reward, "reward/penalty": penalty} | {f"reward/{name}": s for name, s in scores.items()}
        return loss, {name: float(value.detach()) for name, value in line.items()}
