"""What can be sampled: a pipeline folder, or a run's checkpoint as it lies there, without an export."""

import dataclasses
import json
from pathlib import Path

import torch

from dmd_ds import checkpoint
from dmd_ds.errors import UserError
from dmd_ds.export import Student, find_student
from dmd_ds.generation import Settings, VideoModel, fingerprint, read_settings
from dmd_ds.wan.denoiser import WHOLE_SEQUENCE, WholeSequence
from dmd_ds.wan.guidance import add_guidance_embedding
from dmd_ds.wan.weights import find_model


@dataclasses.dataclass(frozen=True)
class Source:
    """`folder` is a pipeline's, or that of a checkpoint's base; `student` that of a checkpoint, None for a pipeline.

    `mark` tells one set of weights from another at the same place.
    """

    name: str
    folder: Path
    settings: Settings
    mark: str
    student: Student | None

    def load(self, device: torch.device, sequence: WholeSequence = WHOLE_SEQUENCE) -> VideoModel:
        """A student is its base with other weights."""
        model = VideoModel(str(self.folder), device, sequence)
        if self.student is None:
            return model
        if self.student.takes_guidance and not model.takes_guidance:
            embedder = add_guidance_embedding(model.denoiser.transformer).condition_embedder.guidance_embedder
            embedder.to(device, model.dtype).requires_grad_(False)
        for name, parameter in model.denoiser.transformer.named_parameters():
            parameter.data.copy_(self.student.read(name))
        return model


def is_checkpoint(path: Path) -> bool:
    return path.is_file() or (path / checkpoint.STATE).is_file() or (path / "checkpoints").is_dir()


def find_source(name: str, weights: str | None = None, lora_scale: float | None = None) -> Source:
    """A pipeline's folder or name, a run, one of its checkpoints, or checkpoints/best; `weights` as for `find_student`.

    `lora_scale`: how much of the adapter of one that was trained as LoRA.
    """
    if not is_checkpoint(Path(name)):
        if lora_scale is not None:
            raise UserError(f"--lora-scale {lora_scale}: {name} is no checkpoint; its adapter was merged when it was exported")
        if weights is not None:
            raise UserError(f"--weights {weights}: {name} is no checkpoint; what it holds was chosen when it was exported")
        folder = find_model(name)
        return Source(name, folder, read_settings(folder), fingerprint(folder), None)
    student = find_student(Path(name), weights=weights)
    if lora_scale is not None:
        student = student.scaled(lora_scale)
    file = checkpoint.find(Path(name)) / checkpoint.STATE
    mark = json.dumps([str(file.resolve()), file.stat().st_mtime_ns, weights, lora_scale])
    return Source(name, student.base, student.settings, mark, student)
