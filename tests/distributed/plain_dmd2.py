"""DMD2 in plain PyTorch, one process, written from the paper's formulas: what the engines are held against.

It shares with the project the model's class (diffusers'), peft, the GAN head's class, and the random numbers; no loss, sampler,
schedule or step.
"""

import copy
import math

import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from diffusers.models.embeddings import TimestepEmbedding
from peft import LoraConfig, get_peft_model

from dmd_ds.data.latents import BatchOrder, LatentsDataset
from dmd_ds.randomness import Randomness
from dmd_ds.recipe import Recipe, Sampling
from dmd_ds.wan.denoiser import WHOLE_SEQUENCE
from dmd_ds.wan.discriminator import HEADS


def pad(embeds: list[torch.Tensor]) -> torch.Tensor:
    out = torch.zeros(len(embeds), 512, embeds[0].shape[1])
    for row, embed in zip(out, embeds, strict=True):
        row[: len(embed)] = embed
    return out


def see(dataset: LatentsDataset, indices: list[int]) -> tuple[torch.Tensor, torch.Tensor] | None:
    """What the model is shown of the first frames: channels beside the noised latents, and CLIP's tokens."""
    if dataset.image_embeds_shape is None:
        return None
    frames = [dataset.first_frame(i) for i in indices]
    latents = torch.stack([frame.latents for frame in frames])
    batch, _, length, height, width = latents.shape
    given = torch.zeros(batch, 4 * length, height, width)  # of each latent frame's four, which are given
    given[:, :4] = 1
    mask = given.unflatten(1, (length, 4)).transpose(1, 2)
    return torch.cat([mask, latents], dim=1), torch.stack([frame.embeds for frame in frames])


def give_guidance(transformer: WanTransformer3DModel, weights: dict[str, torch.Tensor], guidance: float) -> None:
    """A guidance embedding of these weights, as a term beside what the time embedding gives."""
    embedder, config = transformer.condition_embedder, transformer.config
    embedder.guidance_embedder = TimestepEmbedding(config.freq_dim, config.num_attention_heads * config.attention_head_dim)
    transformer.load_state_dict(weights, strict=False)
    half = config.freq_dim // 2
    angles = 1000 * guidance * torch.exp(-math.log(10000) * torch.arange(half) / half)
    waves = torch.cat([angles.cos(), angles.sin()])
    embedder.time_embedder.register_forward_hook(lambda module, inputs, out: out + embedder.guidance_embedder(waves.expand(len(out), -1)))


def noise_levels(sampling: Sampling) -> tuple[torch.Tensor, torch.Tensor]:
    """Those of the steps and a 0 behind them, and what the model is told of them: t / 1000."""
    if sampling.timesteps:
        levels = told = torch.tensor(sampling.timesteps, dtype=torch.float64) / 1000
    elif sampling.grid == "wan":
        # t/1000 = .99986, .96535, .91284, .82329, .63607 at 5 steps and shift 7, told as 999, 965, 912, 823, 636
        even = 0.999 * (1 - torch.arange(sampling.steps, dtype=torch.float64) / sampling.steps)
        levels = 1 / (1 + (1 / even - 1) / sampling.shift)
        told = (1000 * levels).floor() / 1000
    else:
        # 4 steps at shift 5, stretched so that the last one starts at 0.625: t/1000 = 1, .9649, .8907, .625
        uniform = torch.linspace(1, 1 / 1000, 4, dtype=torch.float64)
        uniform[-1] = 5 * uniform[-1] / (1 + 4 * uniform[-1])  # the stock scheduler shifts its lowest level twice
        levels = 5 * torch.linspace(1, float(uniform[-1]), 4, dtype=torch.float64)
        levels = levels / (1 + 4 * levels / 5)
        levels = told = 1 - (1 - levels) * (1 - 0.625) / (1 - levels[-1])
    return torch.cat([levels, torch.zeros(1)]).float(), told.float()


class PlainEMA:
    """An average of a model's weights whose decay grows as (1 + n) / (10 + n)."""

    def __init__(self, decay: float):
        self.decay, self.updates, self.weights = decay, 0, {}

    def update(self, model: torch.nn.Module) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for name, weight in model.named_parameters():
            self.weights[name] = decay * self.weights[name] + (1 - decay) * weight.detach()


def plain_dmd2(
    recipe: Recipe,
    global_batch_size: int,
    epsilon: float,
    embedding: dict[str, torch.Tensor] | None = None,
    one_pass: bool = False,
    ema: PlainEMA | None = None,
) -> tuple[list[dict], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(metrics a step, the generator's trained weights, the weights of the adapter and of the GAN head).

    `embedding`: first weights of a guidance embedding; with `one_pass` the real score has its guidance from it alone.
    `ema`: follows the generator.
    """
    generator = WanTransformer3DModel.from_pretrained(f"{recipe.model.path}/transformer").train()
    base = copy.deepcopy(generator)
    if ema:
        ema.weights = {name: weight.detach().clone() for name, weight in generator.named_parameters()}
    if embedding:
        give_guidance(generator, embedding, recipe.score.guidance)
        give_guidance(base, embedding, recipe.score.guidance)
    gan, head, tapped = recipe.gan, torch.nn.Module(), {}
    if gan.generator_weight:
        torch.manual_seed(recipe.seed)
        config = base.config
        head = HEADS[gan.head](len(gan.blocks), config.num_attention_heads * config.attention_head_dim, gan.width)
        for number in gan.blocks:
            base.blocks[number].register_forward_hook(lambda module, inputs, out, number=number: tapped.__setitem__(number, out))
    targets = r"blocks\.\d+\.(attn[12]\.(to_q|to_k|to_v|to_out\.0|add_k_proj|add_v_proj)|ffn\.net\.(0\.proj|2))"

    def adapted(model, section, seed):
        torch.manual_seed(seed)
        return get_peft_model(model, LoraConfig(r=section.lora_rank, lora_alpha=section.lora_alpha, target_modules=targets))

    score = adapted(base, recipe.fake_score, recipe.seed)
    adapter = [parameter for parameter in [*score.parameters(), *head.parameters()] if parameter.requires_grad]
    if recipe.generator.lora_rank:
        adapted(generator, recipe.generator, recipe.seed + 1)  # in place
        if embedding and not one_pass:
            generator.condition_embedder.guidance_embedder.requires_grad_(True)
    trained = {name: parameter for name, parameter in generator.named_parameters() if parameter.requires_grad}

    def adamw(parameters, section):
        return torch.optim.AdamW(parameters, lr=section.lr, betas=section.betas, eps=epsilon, weight_decay=section.weight_decay)

    optimizer_g, optimizer_f = adamw(trained.values(), recipe.generator), adamw(adapter, recipe.fake_score)
    dataset = LatentsDataset(recipe.data.path)
    draw = Randomness(recipe.seed)
    order = BatchOrder(dataset.buckets(), global_batch_size, draw)
    samples = list(range(global_batch_size))
    sigmas, told = noise_levels(recipe.sampling)
    last_step = len(told) - 1

    def velocity(model, x, sigma, text, image):
        if image is None:
            return model(x, 1000 * sigma, text, return_dict=False)[0]
        channels, embeds = image
        return model(torch.cat([x, channels], dim=1), 1000 * sigma, text, embeds, return_dict=False)[0]

    def judge(x, sigma, text, image):
        velocity(score, x, sigma, text, image)
        return head([tapped[number] for number in sorted(gan.blocks)], WHOLE_SEQUENCE, tapped[gan.blocks[0]].shape[1])

    def for_gan(step, purpose, shape):
        sigma = gan.sigma_min + (gan.sigma_max - gan.sigma_min) * draw.uniform(f"{purpose}/gan_sigma", step, samples)
        return sigma, sigma.view(-1, 1, 1, 1, 1), draw.normal(f"{purpose}/gan_noise", step, samples, shape)

    def roll(text, image, shape, step, purpose, with_gradient):
        exit_step = last_step if recipe.rollout.exit == "last" else draw.integer(f"{purpose}/exit_step", step, last_step + 1)
        if recipe.rollout.input == "data":
            sigma = sigmas[exit_step]
            x = (1 - sigma) * latents + sigma * draw.normal(f"{purpose}/rollout{exit_step}", step, samples, shape)
            with torch.set_grad_enabled(with_gradient):
                x0 = x - sigma * velocity(generator, x, told[exit_step].repeat(len(x)), text, image)
            return x0, float(sigmas[exit_step + 1])
        x = draw.normal(f"{purpose}/rollout0", step, samples, shape)
        for k in range(exit_step + 1):
            with torch.set_grad_enabled(with_gradient and k == exit_step):
                x0 = x - sigmas[k] * velocity(generator, x, told[k].repeat(len(x)), text, image)
            if k < exit_step:
                if recipe.sampling.solver == "sde":
                    noise = draw.normal(f"{purpose}/rollout{k + 1}", step, samples, shape)
                else:  # that of which x is made, with x0
                    noise = (x - (1 - sigmas[k]) * x0) / sigmas[k]
                x = (1 - sigmas[k + 1]) * x0 + sigmas[k + 1] * noise
        return x0, float(sigmas[exit_step + 1])

    def noised(x0, next_sigma, step, purpose, shape):
        u = draw.uniform(f"{purpose}/score_sigma", step, samples)
        s = recipe.score.shift
        if recipe.score.above_exit:  # evenly from the u that the shift makes next_sigma of
            least = next_sigma / (s - (s - 1) * next_sigma)
            u = least + (1 - least) * u
        sigma = (s * u / (1 + (s - 1) * u)).clamp(recipe.score.sigma_min, recipe.score.sigma_max)
        noise = draw.normal(f"{purpose}/score_noise", step, samples, shape)
        s5 = sigma.view(-1, 1, 1, 1, 1)
        return (1 - s5) * x0 + s5 * noise, noise, sigma, s5

    log = []
    for step in range(recipe.max_steps):
        line = {}
        shape, indices = order(step)
        text = pad([dataset.prompt_embeds(i) for i in indices])
        image = see(dataset, indices)
        latents = torch.stack([dataset[i].latents for i in indices])
        empty = pad([dataset.negative_embeds_LD] * len(indices))
        if step < recipe.regression.steps:
            exit_step = draw.integer("regression/exit_step", step, last_step + 1)
            even = [1 - i / recipe.regression.teacher_steps for i in range(recipe.regression.teacher_steps)]
            moved = [recipe.score.shift * u / (1 + (recipe.score.shift - 1) * u) for u in even]
            path = sorted({*sigmas.tolist(), *(level for level in moved if level < float(sigmas[0]))}, reverse=True)
            x, slopes = draw.normal("regression/noise", step, samples, shape), []
            with torch.no_grad(), score.disable_adapter():
                for number, (level, following) in enumerate(zip(path, path[1:], strict=False)):
                    if level == float(sigmas[exit_step]):
                        at_exit = x
                    level_B = torch.full((len(x),), level)
                    conditional, unconditional = (velocity(score, x, level_B, words, image) for words in (text, empty))
                    slopes.append(unconditional + recipe.score.guidance * (conditional - unconditional))
                    if number:  # the velocity is taken to go on as it went from the level before to this one
                        middle = (following - level) / 2 / (level - path[number - 1])
                        x = x + (following - level) * (slopes[-1] + middle * (slopes[-1] - slopes[-2]))
                    else:
                        x = x + (following - level) * slopes[-1]
            x0 = at_exit - sigmas[exit_step] * velocity(generator, at_exit, told[exit_step].repeat(len(x)), text, image)
            loss = ((x0 - x) ** 2).mean()
            optimizer_g.zero_grad()
            loss.backward()
            line["loss/regression"] = float(loss.detach())
            line["grad_norm/generator"] = float(torch.nn.utils.clip_grad_norm_(generator.parameters(), recipe.generator.max_grad_norm))
            optimizer_g.param_groups[0]["lr"] = (recipe.regression.lr or recipe.generator.lr) * (0.5 if step == 0 else 1.0)
            optimizer_g.step()
            log.append(line)
            continue
        if (step - recipe.regression.steps) % recipe.fake_score.updates_per_generator_update == 0:
            x0, next_sigma = roll(text, image, shape, step, "generator", with_gradient=True)
            with torch.no_grad():
                x, _, sigma, s5 = noised(x0, next_sigma, step, "generator", shape)
                fake = x - s5 * velocity(score, x, sigma, text, image)
                with score.disable_adapter():
                    conditional, unconditional = (velocity(score, x, sigma, words, image) for words in (text, empty))
                guided = (s5 <= recipe.score.guidance_below).float()
                guidance = 1.0 if one_pass else 1.0 + guided * (recipe.score.guidance - 1.0)
                real = x - s5 * (unconditional + guidance * (conditional - unconditional))
                normaliser = (x0 - real).abs().mean(dim=(1, 2, 3, 4), keepdim=True) if recipe.score.normaliser else 1
                target = x0 - (fake - real) / normaliser
            loss = 0.5 * ((x0 - target) ** 2).mean()
            line["loss/dm"] = float(loss.detach())
            if gan.generator_weight:
                sigma, s5, noise = for_gan(step, "generator", shape)
                gan_loss = F.softplus(-judge((1 - s5) * x0 + s5 * noise, sigma, text, image)).mean()
                loss = loss + gan.generator_weight * gan_loss
                line["loss/gan_generator"] = float(gan_loss.detach())
            optimizer_g.zero_grad()
            loss.backward()
            line["grad_norm/generator"] = float(torch.nn.utils.clip_grad_norm_(trained.values(), recipe.generator.max_grad_norm))
            optimizer_g.param_groups[0]["lr"] = recipe.generator.lr * (0.5 if step == 0 else 1.0)  # warm-up of 1 update
            optimizer_g.step()
            if ema:
                ema.update(generator)
        x0, next_sigma = roll(text, image, shape, step, "fake_score", with_gradient=False)
        x, noise, sigma, _ = noised(x0, next_sigma, step, "fake_score", shape)
        loss = ((velocity(score, x, sigma, text, image) - (noise - x0)) ** 2).mean()
        line["loss/fake_score"] = float(loss.detach())
        if gan.generator_weight:
            sigma, s5, noise = for_gan(step, "fake_score", shape)
            marks_fake = judge((1 - s5) * x0 + s5 * noise, sigma, text, image)
            marks_real = judge((1 - s5) * latents + s5 * noise, sigma, text, image)
            disturbed = latents + gan.r1_strength * draw.normal("fake_score/r1", step, samples, shape)
            marks_disturbed = judge((1 - s5) * disturbed + s5 * noise, sigma, text, image)
            gan_loss = F.softplus(marks_fake).mean() + F.softplus(-marks_real).mean()
            r1 = ((marks_real - marks_disturbed) / gan.r1_strength).pow(2).mean()
            loss = loss + gan.discriminator_weight * gan_loss + gan.r1_weight * r1
            line |= {"loss/gan_discriminator": float(gan_loss.detach()), "loss/r1": float(r1.detach())}
        optimizer_f.zero_grad()
        loss.backward()
        line["grad_norm/fake_score"] = float(torch.nn.utils.clip_grad_norm_(adapter, recipe.fake_score.max_grad_norm))
        optimizer_f.param_groups[0]["lr"] = recipe.fake_score.lr * min(1.0, (step - recipe.regression.steps + 1) / 3)  # warm-up: 2
        optimizer_f.step()
        log.append(line)
    lora_weights = {name.removeprefix("base_model.model."): p for name, p in score.named_parameters() if p.requires_grad}
    return log, trained, lora_weights | {f"head.{name}": p for name, p in head.named_parameters()}
