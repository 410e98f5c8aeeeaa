#!/usr/bin/env python3
"""Makes the tiny Wan2.1 that ships in dmd_ds/assets/tiny-wan: a complete diffusers WanPipeline, trained on moving shapes.

    python tools/make_tiny_wan.py vae         the autoencoder, about 20 minutes on 2 cores
    python tools/make_tiny_wan.py decoder     its decoder once more, on clips of full length: about 5 minutes
    python tools/make_tiny_wan.py denoiser    text encoder and denoiser, about 40 minutes
    python tools/make_tiny_wan.py card        judges it, keeps the reference, writes the model card: about 10 minutes

Every stage is seeded and leaves its result in the work folder (--work, default outputs/tiny-wan), from which the next goes
on. When its scores please, the folder's `pipeline/` becomes dmd_ds/assets/tiny-wan and its `latents/` dmd_ds/assets/tiny-latents.
"""

import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from dmd_ds import flow
from dmd_ds.commands import command_parser
from dmd_ds.data import moving_shapes
from dmd_ds.data.latents import LatentsWriter, pad_embeds
from dmd_ds.evaluation import caption_list, evaluate
from dmd_ds.generation import Settings, VideoModel, write_settings
from dmd_ds.wan.autoencoder import decode, encode, load_autoencoder
from dmd_ds.wan.denoiser import WanDenoiser
from dmd_ds.wan.text import encode_prompts, padded_tokens

VAE_CONFIG = {
    "base_dim": 16,
    "z_dim": 16,
    "dim_mult": [1, 1, 2, 2],
    "num_res_blocks": 1,
    "temperal_downsample": [False, True, True],
}
VAE_PHASES = [  # steps, batch, frames, crop: small pieces first, they teach most of the layers at a fraction of the cost
    (500, 32, 1, 32),
    (700, 16, 5, 32),
    (300, 12, 9, 32),
    (70, 4, 17, 64),
]


def clips_NTHW3(rng: np.random.Generator, captions: list, a_caption: int) -> np.ndarray:
    return np.stack([moving_shapes.draw(caption, rng) for caption in captions for _ in range(a_caption)])


def as_pixels(clips_NTHW3: np.ndarray) -> torch.Tensor:
    """uint8 `[N, T, H, W, 3]` as `[N, 3, T, H, W]` in [-1, 1]."""
    return torch.from_numpy(clips_NTHW3).permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def pieces_BCTHW(rng: np.random.Generator, pool_NTHW3: np.ndarray, batch: int, frames: int, crop: int) -> torch.Tensor:
    """Random pieces of random clips, each with some of the shape in one of its frames, `[B, 3, frames, crop, crop]`."""
    pieces = []
    for clip in pool_NTHW3[rng.integers(len(pool_NTHW3), size=batch)]:
        clip = clip[rng.integers(len(clip) - frames + 1) :][:frames]
        lit = np.argwhere((clip[rng.integers(frames)] > 128).any(-1))
        corner = (lit[rng.integers(len(lit))] - rng.integers(crop, size=2)).clip(0, clip.shape[1] - crop)
        pieces.append(clip[:, corner[0] : corner[0] + crop, corner[1] : corner[1] + crop])
    return as_pixels(np.stack(pieces))


class Muon:
    """torch's Muon on convolution kernels, taken as matrices [out, in x kernel], and AdamW on the rest.

    With AdamW alone this autoencoder gains 4 dB in the time in which it gains 9 so (measured on its first 200 steps).
    """

    def __init__(self, module: torch.nn.Module, lr: float, adamw_lr: float):
        self.kernels = [p for p in module.parameters() if p.ndim >= 4 and p.shape[0] > 3 and p[0].numel() > 1]
        for kernel in self.kernels:  # channels last: it halves the time of the convolutions and makes the matrix a view
            last = torch.channels_last_3d if kernel.ndim == 5 else torch.channels_last
            kernel.data = kernel.data.contiguous(memory_format=last)
        self.matrices = [torch.nn.Parameter(self._matrix(kernel.data)) for kernel in self.kernels]
        taken = {id(kernel) for kernel in self.kernels}
        self.optimizers = [
            torch.optim.Muon(self.matrices, lr=lr, weight_decay=0.0),
            torch.optim.AdamW([p for p in module.parameters() if id(p) not in taken], lr=adamw_lr, weight_decay=0.0),
        ]
        self.rates = [lr, adamw_lr]

    @staticmethod
    def _matrix(kernel: torch.Tensor) -> torch.Tensor:
        return kernel.movedim(1, -1).reshape(len(kernel), -1)

    def step(self, share_of_lr: float) -> None:
        for kernel, matrix in zip(self.kernels, self.matrices, strict=True):
            matrix.grad = None if kernel.grad is None else self._matrix(kernel.grad)
            kernel.grad = None
        for optimizer, rate in zip(self.optimizers, self.rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * share_of_lr
            optimizer.step()
            optimizer.zero_grad()


def train_vae(work: Path, seed: int) -> None:
    """Squared error, through latents with a little noise and a weight on their size in place of a KL (with the posterior's
    own noise nothing was learned for hundreds of steps)."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    pool_NTHW3 = clips_NTHW3(rng, moving_shapes.CAPTIONS, 20)
    vae = AutoencoderKLWan(**VAE_CONFIG)
    optimizer = Muon(vae, lr=0.015, adamw_lr=1e-3)
    total = sum(steps for steps, *_ in VAE_PHASES)
    step, began = 0, time.time()
    for steps, batch, frames, crop in VAE_PHASES:
        for _ in range(steps):
            x = pieces_BCTHW(rng, pool_NTHW3, batch, frames, crop)
            latents = vae.encode(x).latent_dist.mode()
            rebuilt = vae.decode(latents + 0.03 * torch.randn_like(latents)).sample
            error = F.mse_loss(rebuilt, x)
            (error + 1e-5 * latents.square().mean()).backward()
            optimizer.step(min(1.0, (step + 1) / 30, (total - step) / (0.6 * total)))
            if step % 20 == 0:
                psnr = -10 * np.log10(error.item() / 4)
                print(f"vae {step}/{total} psnr {psnr:.2f} latents {latents.std().item():.2f} {time.time() - began:.0f} s", flush=True)
            step += 1

    with torch.no_grad():  # latents of zero mean and unit variance a channel are what the denoiser sees
        latents = torch.cat([vae.encode(as_pixels(part)).latent_dist.mode() for part in np.split(pool_NTHW3[::5], 27)])
    vae.register_to_config(latents_mean=latents.mean((0, 2, 3, 4)).tolist(), latents_std=latents.std((0, 2, 3, 4)).tolist())
    vae.save_pretrained(work / "pipeline" / "vae")
    (work / "bank.pt").unlink(missing_ok=True)  # latents of an older autoencoder


def train_decoder(work: Path, seed: int) -> None:
    """The decoder alone, on clips of full length, which it has hardly seen: the last frames lose their tint. The latents
    stay as they are."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed + 2)
    pool_NTHW3 = clips_NTHW3(rng, moving_shapes.CAPTIONS, 10)
    vae = AutoencoderKLWan.from_pretrained(work / "pipeline" / "vae")
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)
    optimizer, steps, began = Muon(vae, lr=0.005, adamw_lr=4e-4), 300, time.time()
    for step in range(steps):
        x = pieces_BCTHW(rng, pool_NTHW3, batch=8, frames=moving_shapes.FRAMES, crop=32)
        with torch.no_grad():
            latents = vae.encode(x).latent_dist.mode()
        error = F.mse_loss(vae.decode(latents + 0.03 * torch.randn_like(latents)).sample, x)
        error.backward()
        optimizer.step(min(1.0, (step + 1) / 10, (steps - step) / (0.7 * steps)))
        if step % 20 == 0:
            print(f"decoder {step}/{steps} psnr {-10 * np.log10(error.item() / 4):.2f} {time.time() - began:.0f} s", flush=True)
    vae.save_pretrained(work / "pipeline" / "vae")


# ---- the text encoder and the denoiser --------------------------------------------------------------------------------

DENOISER_CONFIG = {
    "num_attention_heads": 4,
    "attention_head_dim": 32,
    "ffn_dim": 384,
    "num_layers": 4,
    "text_dim": 64,
    "freq_dim": 64,
}
TRAINING_SHIFT = 3.0
DENOISER_STEPS, DENOISER_BATCH = 5500, 48
CAPTION_DROPOUT = 0.1  # the share of samples that learn the unconditional prediction guidance needs


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A word a token, and </s> at the end as UMT5's tokenizer has it."""
    words = sorted({word for caption in moving_shapes.CAPTIONS for word in str(caption).split()})
    vocabulary = {word: number for number, word in enumerate(["<pad>", "</s>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512)


def make_text_encoder(vocabulary_size: int) -> UMT5EncoderModel:
    config = UMT5Config(
        vocab_size=vocabulary_size, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, dropout_rate=0.0,
        pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return UMT5EncoderModel(config)


def encode_bank(vae: AutoencoderKLWan, rng: np.random.Generator, captions: list, a_caption: int) -> torch.Tensor:
    """Latents of fresh clips, `[caption, clip, C, T, H, W]`."""
    return torch.stack([encode(vae, as_pixels(clips_NTHW3(rng, [caption], a_caption))) for caption in captions])


def train_denoiser(work: Path, seed: int) -> None:
    """Flow matching on latents of the captions that are not held back, text encoder and denoiser together; the weights
    that are kept are an exponential moving average."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed + 1)
    vae = load_autoencoder(work / "pipeline", torch.device("cpu"))
    learned = [caption for caption in moving_shapes.CAPTIONS if caption not in moving_shapes.HELD_BACK]
    bank_file = work / "bank.pt"
    if not bank_file.is_file():
        torch.save(encode_bank(vae, rng, learned, 96), bank_file)
    bank = torch.load(bank_file, weights_only=True)

    tokenizer = make_tokenizer()
    modules = torch.nn.ModuleDict(
        {
            "text": make_text_encoder(len(tokenizer)),
            "denoiser": WanDenoiser(WanTransformer3DModel(**DENOISER_CONFIG)),
        }
    )
    for block in modules["denoiser"].transformer.blocks:
        block.compile()  # a third less time a step
    tokens = tokenizer([str(caption) for caption in learned] + [""], padding="longest", return_tensors="pt")
    lengths = tokens.attention_mask.sum(1).tolist()
    hidden = [p for name, p in modules["denoiser"].named_parameters() if p.ndim == 2 and ".blocks." in name]
    taken = {id(parameter) for parameter in hidden}
    optimizers = [
        torch.optim.Muon(hidden, lr=0.01, weight_decay=0.0),
        torch.optim.AdamW([p for p in modules.parameters() if id(p) not in taken], lr=1e-3, weight_decay=0.0),
    ]
    average = torch.optim.swa_utils.AveragedModel(modules, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.998))
    rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    steps, losses, began = DENOISER_STEPS, [], time.time()
    for step in range(steps):
        which = torch.from_numpy(rng.integers(len(learned), size=DENOISER_BATCH))
        x0 = bank[which, torch.from_numpy(rng.integers(bank.shape[1], size=DENOISER_BATCH))]
        which[torch.from_numpy(rng.random(DENOISER_BATCH) < CAPTION_DROPOUT)] = len(learned)
        embeds = modules["text"](tokens.input_ids, tokens.attention_mask).last_hidden_state
        embeds = pad_embeds([row[:length] for row, length in zip(embeds, lengths, strict=True)], padded_tokens(max(lengths), torch.float32))
        sigma = flow.shift_sigma(torch.rand(DENOISER_BATCH), TRAINING_SHIFT)
        noise = torch.randn_like(x0)
        velocity = modules["denoiser"](flow.add_noise(x0, noise, sigma), sigma, embeds[which])
        loss = F.mse_loss(velocity, noise - x0)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
        for optimizer, rate in zip(optimizers, rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * min(1.0, (step + 1) / 100, (steps - step) / (0.5 * steps))
            optimizer.step()
            optimizer.zero_grad()
        average.update_parameters(modules)
        losses.append(loss.item())
        if step % 100 == 99:
            print(f"denoiser {step + 1}/{steps} loss {np.mean(losses[-100:]):.4f} {time.time() - began:.0f} s", flush=True)
        if step % 1000 == 999 or step + 1 == steps:
            save_pipeline(work / "pipeline", vae, tokenizer, average.module)


def save_pipeline(folder: Path, vae: AutoencoderKLWan, tokenizer: PreTrainedTokenizerFast, modules: torch.nn.ModuleDict) -> None:
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=TRAINING_SHIFT)
    denoiser = modules["denoiser"].transformer
    pipeline = WanPipeline(tokenizer=tokenizer, text_encoder=modules["text"], vae=vae, transformer=denoiser, scheduler=scheduler)
    pipeline.save_pretrained(folder)


# ---- what it is worth ------------------------------------------------------------------------------------------------

GUIDANCE = 2.5
REFERENCE_SEED, JUDGED_SEED = 1_000_000, 2_000_000
A_CAPTION = 6  # videos of each caption in the kept reference


def write_card(work: Path, seed: int) -> None:
    """Judges the pipeline on held-back captions and seeds, keeps the reference for the Fréchet distance and the latents
    that the recipe `tiny` trains on, and writes the model card from what was measured."""
    folder = work / "pipeline"
    size = {"frames": moving_shapes.FRAMES, "height": moving_shapes.HEIGHT, "width": moving_shapes.WIDTH, "fps": moving_shapes.FPS}
    write_settings(folder, Settings(steps=50, guidance=GUIDANCE, **size))
    model = VideoModel(str(folder), torch.device("cpu"))

    reference = evaluate(model, caption_list(A_CAPTION * len(moving_shapes.CAPTIONS)), REFERENCE_SEED, model.settings)
    features_NF = np.stack([moving_shapes.features(video) for video in reference.videos])
    save_file({"features": features_NF.astype(np.float32)}, folder / "reference.safetensors")

    rng = np.random.default_rng(seed + 3)
    all_captions = list(moving_shapes.CAPTIONS)
    real = clips_NTHW3(rng, all_captions, 2)
    rebuilt = decode(model.vae, encode(model.vae, as_pixels(real))).numpy()
    doubled = [str(caption) for caption in all_captions for _ in range(2)]
    held_back = [str(moving_shapes.HELD_BACK[i % len(moving_shapes.HELD_BACK)]) for i in range(108)]
    rows = {
        "drawn clips": moving_shapes.score(list(map(moving_shapes.judge, real)), doubled),
        "drawn clips through the VAE": moving_shapes.score(list(map(moving_shapes.judge, rebuilt)), doubled),
        "50 steps, all captions": evaluate(model, caption_list(108), JUDGED_SEED, model.settings, features_NF).numbers,
        "50 steps, held-back captions": evaluate(model, held_back, JUDGED_SEED, model.settings).numbers,
    }
    sizes = {name: directory_size(folder / name) for name in ("transformer", "vae", "text_encoder")}
    (folder / "README.md").write_text(card(model, rows, sizes))

    writer = LatentsWriter(work / "latents", moving_shapes.FPS, encode_prompts(model.text, [""])[0].half())
    for caption, clip in zip(all_captions, real[::2], strict=True):
        embeds = encode_prompts(model.text, [str(caption)])[0].half()
        about = {"source": "moving_shapes", **{key: size[key] for key in ("frames", "height", "width")}}
        writer.add(encode(model.vae, as_pixels(clip[None]))[0].half(), embeds, caption=str(caption), **about)
    writer.close()


def directory_size(folder: Path) -> float:
    """MB."""
    return sum(path.stat().st_size for path in folder.iterdir()) / 1e6


def card(model: VideoModel, rows: dict[str, dict[str, float]], sizes: dict[str, float]) -> str:
    columns = ("color", "shape", "motion", "both", "speed", "sharpness", "saturation", "frechet")
    lines = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name, numbers in rows.items():
        cells = [f"{numbers[column]:.3f}" if column in numbers else "" for column in columns]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    table = "\n".join(lines)
    parameters = sum(parameter.numel() for parameter in model.denoiser.parameters())
    return f"""---
library_name: diffusers
pipeline_tag: text-to-video
---
# tiny-wan: a Wan2.1 of {parameters / 1e6:.1f} M parameters that draws moving shapes

A complete diffusers `WanPipeline` with Wan2.1's architecture in every part, small enough to train and distil on a CPU. It makes
17 frames of 64x64 at 8 fps of one shape: `a {{color}} {{shape}} {{motion}}` with {", ".join(moving_shapes.COLORS)} /
{", ".join(moving_shapes.SHAPES)} / {", ".join(moving_shapes.MOTIONS)}. Use {model.settings.steps} steps and guidance {GUIDANCE}.

Made by `tools/make_tiny_wan.py` (stages vae, decoder, denoiser, card; seed 0) on clips that `dmd_ds/data/moving_shapes.py` draws;
nothing else went in. Sizes in MB: {", ".join(f"{name} {size:.1f}" for name, size in sizes.items())}.

Measured by `python tools/make_tiny_wan.py card`: shares of 108 videos whose colour, shape, motion, colour and motion are as
asked for, and means of speed (picture sides a frame, of those asked to move), sharpness and saturation; 50 steps with guidance.
The captions in the last row, {len(moving_shapes.HELD_BACK)} of {len(moving_shapes.CAPTIONS)}, were held back from training.

{table}

`frechet` is to `reference.safetensors`, the features of {A_CAPTION * len(moving_shapes.CAPTIONS)} videos of other seeds.
Licence: that of the project.
"""


STAGES = {"vae": train_vae, "decoder": train_decoder, "denoiser": train_denoiser, "card": write_card}


def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument("stage", choices=STAGES, help="what is made, in this order")
    parser.add_argument("--work", type=Path, default=Path("outputs/tiny-wan"), help="folder of the results (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of every draw (default: %(default)s)")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    STAGES[arguments.stage](arguments.work, arguments.seed)


if __name__ == "__main__":
    main()
