#!/usr/bin/env python3
"""Turns an original Wan2.1 folder into a diffusers one, or back; which of the two it is, its content tells.

    python tools/convert_wan.py Wan2.1-T2V-14B Wan2.1-T2V-14B-Diffusers
    python tools/convert_wan.py student Wan2.1-student          # a diffusers folder, or its transformer/ alone
    python tools/convert_wan.py CFG_DISTILLED OUT --fold-guidance 5

The denoiser is converted, a tensor at a time and in its own types: config.json and diffusion_pytorch_model*.safetensors on
the original's side, transformer/ on diffusers'. --fold-guidance makes a stock Wan2.1 of a guidance-embedded one.
"""

import json
from pathlib import Path

import torch

from dmd_ds.commands import command_parser
from dmd_ds.errors import UserError, one_line_errors, read_json
from dmd_ds.export import whole_folder
from dmd_ds.wan import original
from dmd_ds.wan.guidance import FOLDED_INTO, add_guidance_embedding, folded_bias, has_guidance_embedding
from dmd_ds.wan.original import GUIDANCE
from dmd_ds.wan.original_parts import read_transformer
from dmd_ds.wan.tensors import Spec, Stored, check_tensors, save_weights
from dmd_ds.wan.weights import diffusers_tensors, empty_transformer


def find_transformer(folder: Path) -> Path | None:
    """The diffusers transformer's folder within this one or itself, None in an original folder."""
    for candidate in (folder / "transformer", folder):
        if (candidate / "config.json").is_file() and read_json(candidate / "config.json").get("_class_name") == "WanTransformer3DModel":
            return candidate
    return None


def check_whole(folder: Path, config: dict, stored: dict[str, Stored]) -> None:
    """`UserError` unless these are the tensors that a model of the configuration has, with a guidance embedding or without."""
    with torch.device("meta"):
        transformer = empty_transformer(config)
        if has_guidance_embedding(stored):
            add_guidance_embedding(transformer)
    check_tensors(folder, {name: tuple(parameter.shape) for name, parameter in transformer.named_parameters()}, stored)


def fold(stored: dict[str, Stored], guidance: float, folder: Path):
    """(the tensors that stay, a function that reads them with the guidance in them)."""
    if not has_guidance_embedding(stored):
        raise UserError(f"{folder}: has no guidance embedding to fold; leave --fold-guidance out")
    bias = folded_bias(lambda name: stored[name].read(), guidance)
    staying = {name: tensor for name, tensor in stored.items() if not name.startswith(GUIDANCE)}
    return staying, lambda name: bias if name == FOLDED_INTO else staying[name].read()


def convert(source: Path, out: Path, guidance: float | None = None) -> Path:
    """Writes the folder and returns it; it has its final name only when it is whole."""
    if not source.is_dir():
        raise UserError(f"{source}: no such folder")
    transformer = find_transformer(source)
    if transformer:
        config, stored = read_json(transformer / "config.json"), diffusers_tensors(transformer)
    else:
        config, stored = read_transformer(source)
    check_whole(source, config, stored)

    def read(name: str) -> torch.Tensor:
        return stored[name].read()

    staying = stored
    if guidance is not None:
        staying, read = fold(stored, guidance, source)
    specs = {name: Spec(tensor.shape, tensor.dtype) for name, tensor in staying.items()}

    with whole_folder(out) as folder:
        if transformer:
            write(folder, original.original_config(config), {original.to_original(name): name for name in specs}, specs, read)
        else:
            (folder / "transformer").mkdir()
            write(folder / "transformer", config, {name: name for name in specs}, specs, read)
    return out


def write(folder: Path, config: dict, names: dict[str, str], specs: dict[str, Spec], read) -> None:
    """config.json and the weights; `names` gives diffusers' name for the one a tensor is written under."""
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_weights(folder, {new: specs[name] for new, name in names.items()}, lambda new: read(names[new]))


def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument("source", type=Path, metavar="SRC", help="the folder to convert, of either kind")
    parser.add_argument("out", type=Path, metavar="DST", help="the folder that is made")
    parser.add_argument("--fold-guidance", type=float, metavar="W", help="the guidance that a guidance-embedded model is fixed to")
    a = parser.parse_args()
    with one_line_errors():
        print(convert(a.source, a.out, a.fold_guidance))


if __name__ == "__main__":
    main()
