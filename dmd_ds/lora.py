"""A trained generator as a LoRA file for diffusers' `load_lora_weights` and ComfyUI.

Exactly, where it was trained as one; else the nearest of a rank to what training changed. A folder with a model card, like
every other export.
"""

import dataclasses
import math
from pathlib import Path

import torch

from dmd_ds.export import ADAPTED, Student, model_card, whole_folder
from dmd_ds.wan.guidance import FOLDED_INTO, has_guidance_embedding
from dmd_ds.wan.original import to_original
from dmd_ds.wan.tensors import Spec, write_safetensors

EXACT_SVD = 2048  # matrices with a side up to this are decomposed exactly, larger ones at random (Halko et al. 2011)


@dataclasses.dataclass(frozen=True)
class LoraError:
    """What a LoRA leaves of the difference to the base: shares of its norm, 0 is nothing."""

    matrices: float  # of the adapted matrices, for want of rank
    rest: float  # of all weights, because a LoRA does not reach them


def low_rank(delta_OI: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(A `[r, in]`, B `[out, r]`), the best B A of this rank for a matrix `[out, in]`."""
    if min(delta_OI.shape) <= EXACT_SVD:
        U, S, Vh = torch.linalg.svd(delta_OI, full_matrices=False)
    else:
        U, S, V = torch.svd_lowrank(delta_OI, q=rank + 16, niter=6)
        Vh = V.T
    root = S[:rank].sqrt()
    return root[:, None] * Vh[:rank], U[:, :rank] * root


def to_lora(student: Student, out: Path, rank: int = 64) -> LoraError:
    """The difference to the base as a LoRA for diffusers' `load_lora_weights` and ComfyUI, by singular values.

    Guidance embeddings are folded, the student's and the base's.
    """
    student = student.folded()
    tensors: dict[str, torch.Tensor] = {}
    of_matrices = missed = unreached = 0.0
    for name, spec in student.specs.items():
        delta = student.read(name) - student.read_base(name)
        if not ADAPTED.fullmatch(name):
            unreached += float(delta.square().sum())
            continue
        module, _, kind = to_original(name).rpartition(".")
        key = f"diffusion_model.{module}"
        if kind == "bias":
            tensors[f"{key}.diff_b"] = delta.to(spec.dtype)
            continue
        A, B = low_rank(delta, rank)
        of_matrices += float(delta.square().sum())
        missed += float((delta - B @ A).square().sum())
        tensors[f"{key}.lora_A.weight"] = A.to(spec.dtype).contiguous()
        tensors[f"{key}.lora_B.weight"] = B.to(spec.dtype).contiguous()
        tensors[f"{key}.alpha"] = torch.tensor(float(len(A)))
    error = LoraError(math.sqrt(missed / of_matrices), math.sqrt(unreached / (of_matrices + unreached)))
    left = (
        f"It leaves {error.matrices:.1%} of the norm of what training changed in the matrices; "
        f"{error.rest:.1%} of all that changed lies outside."
    )
    write_lora(student, out, rank, tensors, left)
    return error


def write_lora(student: Student, out: Path, rank: int, tensors: dict[str, torch.Tensor], left: str) -> None:
    """The folder of a LoRA; `left` says what it leaves of the student."""
    use = (
        f"A LoRA of rank {rank} on {student.recipe.model.path}{folded_base(student)}: `pipeline.load_lora_weights(FOLDER)`, or put it "
        f"into ComfyUI/models/loras.\n{left}"
    )
    with whole_folder(out) as folder:
        specs = {name: Spec(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
        write_safetensors(folder / f"{out.name}.safetensors", specs, iter(tensors.values()))
        (folder / "README.md").write_text(model_card(student, use))


def folded_base(student: Student) -> str:
    """For a LoRA's model card: what is to be done to a guidance-embedded base first."""
    if student.guidance is None or not has_guidance_embedding(student.base_tensors):
        return ""
    return f", made stock by `tools/convert_wan.py --fold-guidance {student.guidance}`"


def to_own_lora(student: Student, out: Path) -> None:
    """The adapter of a generator that was trained as LoRA, exactly, for diffusers' `load_lora_weights` and ComfyUI.

    What a fresh guidance embedding adds to the time embedding's bias goes along. diffusers takes it beside an adapter, here of
    zeros, and without an alpha, and when every other layer has a bias too.
    """
    student = student.folded()
    rank, alpha = student.recipe.generator.lora_rank, student.lora_scale * student.recipe.generator.lora_alpha
    constant = student.read(FOLDED_INTO) - student.read_base(FOLDED_INTO)
    tensors: dict[str, torch.Tensor] = {}
    for name in student.adapted:
        key = f"diffusion_model.{to_original(name).removesuffix('.weight')}"
        A, B = student.read_adapter(name)
        tensors |= {f"{key}.lora_A.weight": A, f"{key}.lora_B.weight": B, f"{key}.alpha": torch.tensor(alpha)}
        if constant.any():
            tensors[f"{key}.diff_b"] = torch.zeros(len(B))
    if constant.any():
        key = f"diffusion_model.{to_original(FOLDED_INTO).removesuffix('.bias')}"
        zeros = {f"{key}.lora_A.weight": torch.zeros(rank, len(constant)), f"{key}.lora_B.weight": torch.zeros(len(constant), rank)}
        tensors |= {**zeros, f"{key}.diff_b": constant}
    write_lora(student, out, rank, tensors, "It is the trained adapter itself: nothing is left out.")
