"""DMD2 in plain PyTorch, one process, written from the paper's formulas: what the engines are held against.

It shares with the project the model's class (diffusers'), peft, and the random numbers; no loss, sampler, schedule or step.
"""

import copy
import math

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.embeddings import TimestepEmbedding
from peft import LoraConfig, get_peft_model

from dmd_ds.data.latents import BatchOrder, LatentsDataset
from dmd_ds.randomness import Randomness
from dmd_ds.recipe import Recipe


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


def plain_dmd2(
    recipe: Recipe, global_batch_size: int, epsilon: float, embedding: dict[str, torch.Tensor] | None = None, one_pass: bool = False
) -> tuple[list[dict], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(metrics a step, the generator's trained weights, the adapter's weights).

    `embedding`: first weights of a guidance embedding; with `one_pass` the real score has its guidance from it alone.
    """
    generator = WanTransformer3DModel.from_pretrained(f"{recipe.model.path}/transformer").train()
    base = copy.deepcopy(generator)
    if embedding:
        give_guidance(generator, embedding, recipe.score.guidance)
        give_guidance(base, embedding, recipe.score.guidance)
    targets = r"blocks\.\d+\.(attn[12]\.(to_q|to_k|to_v|to_out\.0|add_k_proj|add_v_proj)|ffn\.net\.(0\.proj|2))"

    def adapted(model, section, seed):
        torch.manual_seed(seed)
        return get_peft_model(model, LoraConfig(r=section.lora_rank, lora_alpha=section.lora_alpha, target_modules=targets))

    score = adapted(base, recipe.fake_score, recipe.seed)
    adapter = [parameter for parameter in score.parameters() if parameter.requires_grad]
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
    # 4 steps at shift 5, stretched so that the last one starts at 0.625: t/1000 = 1, .9649, .8907, .625
    uniform = torch.linspace(1, 1 / 1000, 4, dtype=torch.float64)
    uniform[-1] = 5 * uniform[-1] / (1 + 4 * uniform[-1])  # the stock scheduler shifts its lowest level twice
    sigmas = 5 * torch.linspace(1, float(uniform[-1]), 4, dtype=torch.float64)
    sigmas = sigmas / (1 + 4 * sigmas / 5)
    sigmas = (1 - (1 - sigmas) * (1 - 0.625) / (1 - sigmas[-1])).float()

    def velocity(model, x, sigma, text, image):
        if image is None:
            return model(x, 1000 * sigma, text, return_dict=False)[0]
        channels, embeds = image
        return model(torch.cat([x, channels], dim=1), 1000 * sigma, text, embeds, return_dict=False)[0]

    def roll(text, image, shape, step, purpose, with_gradient):
        exit_step = draw.integer(f"{purpose}/exit_step", step, 4)
        x = draw.normal(f"{purpose}/rollout0", step, samples, shape)
        for k in range(exit_step + 1):
            sigma = sigmas[k].repeat(len(x))
            with torch.set_grad_enabled(with_gradient and k == exit_step):
                x0 = x - sigma.view(-1, 1, 1, 1, 1) * velocity(generator, x, sigma, text, image)
            if k < exit_step:
                noise = draw.normal(f"{purpose}/rollout{k + 1}", step, samples, shape)
                x = (1 - sigmas[k + 1]) * x0 + sigmas[k + 1] * noise
        return x0

    def noised(x0, step, purpose, shape):
        u = draw.uniform(f"{purpose}/score_sigma", step, samples)
        s = recipe.score.shift
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
        empty = pad([dataset.negative_embeds_LD] * len(indices))
        if step % recipe.fake_score.updates_per_generator_update == 0:
            x0 = roll(text, image, shape, step, "generator", with_gradient=True)
            with torch.no_grad():
                x, _, sigma, s5 = noised(x0, step, "generator", shape)
                fake = x - s5 * velocity(score, x, sigma, text, image)
                with score.disable_adapter():
                    conditional, unconditional = (velocity(score, x, sigma, words, image) for words in (text, empty))
                guidance = 1.0 if one_pass else recipe.score.guidance
                real = x - s5 * (unconditional + guidance * (conditional - unconditional))
                normaliser = (x0 - real).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
                target = x0 - (fake - real) / normaliser
            loss = 0.5 * ((x0 - target) ** 2).mean()
            optimizer_g.zero_grad()
            loss.backward()
            line["grad_norm/generator"] = float(torch.nn.utils.clip_grad_norm_(trained.values(), recipe.generator.max_grad_norm))
            optimizer_g.param_groups[0]["lr"] = recipe.generator.lr * (0.5 if step == 0 else 1.0)  # warm-up of 1 update
            optimizer_g.step()
            line["loss/dm"] = float(loss.detach())
        x0 = roll(text, image, shape, step, "fake_score", with_gradient=False)
        x, noise, sigma, _ = noised(x0, step, "fake_score", shape)
        loss = ((velocity(score, x, sigma, text, image) - (noise - x0)) ** 2).mean()
        optimizer_f.zero_grad()
        loss.backward()
        line["grad_norm/fake_score"] = float(torch.nn.utils.clip_grad_norm_(adapter, recipe.fake_score.max_grad_norm))
        optimizer_f.param_groups[0]["lr"] = recipe.fake_score.lr * min(1.0, (step + 1) / 3)  # warm-up of 2 updates
        optimizer_f.step()
        line["loss/fake_score"] = float(loss.detach())
        log.append(line)
    lora_weights = {name.removeprefix("base_model.model."): p for name, p in score.named_parameters() if p.requires_grad}
    return log, trained, lora_weights
