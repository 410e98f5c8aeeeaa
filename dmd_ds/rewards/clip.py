"""What CLIP's relatives think of frames: an aesthetic predictor and HPSv2.1, both with weights by path.

Neither has been run here on its published weights, which this project does not ship: the arithmetic is tested on random ones.

Shape suffixes: B batch, T frames, N = B T pictures, H W picture height and width, D width of an embedding.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import nn

from dmd_ds.errors import UserError
from dmd_ds.wan.tensors import BROKEN_PICKLE

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of CLIP's pictures
PREDICTOR = "aesthetic.pth"


def pictures(frames_BT3HW: torch.Tensor, side: int, crops: bool) -> torch.Tensor:
    """All frames as CLIP takes them, `[N, 3, side, side]`, by bicubic scaling: the middle square, or the whole on black."""
    frames_N3HW = frames_BT3HW.flatten(0, 1).float()
    height, width = frames_N3HW.shape[2:]
    scale = side / (min if crops else max)(height, width)
    size = [max(1, round(height * scale)), max(1, round(width * scale))]
    scaled = F.interpolate(frames_N3HW, size, mode="bicubic", align_corners=False, antialias=True).clamp(0, 1)
    top, left = ((side - length) // 2 for length in size)  # below 0 where it is cut
    padded = F.pad(scaled, (left, side - size[1] - left, top, side - size[0] - top))
    mean, std = (torch.tensor(values, device=padded.device).view(1, 3, 1, 1) for values in (MEAN, STD))
    return (padded - mean) / std


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Of a `.pth`; nothing in it is run."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except BROKEN_PICKLE as error:
        raise UserError(f"{path}: not readable as weights: {error}") from error
    return found.get("state_dict", found)


class Aesthetic:
    """The LAION aesthetic predictor (Schuhmann 2022) in its improved form: five linear layers on CLIP ViT-L/14's picture embedding.

    `folder` holds the CLIP as transformers saves it (config.json, model.safetensors), and the layers' weights as aesthetic.pth.
    A score of 1 to 10 is divided by 10; the mean over a video's frames.
    """

    def __init__(self, folder: Path):
        from transformers import CLIPVisionModelWithProjection

        if not (folder / PREDICTOR).is_file():
            raise UserError(f"{folder}: {PREDICTOR}, the aesthetic predictor's weights, is missing from that folder")
        try:
            self.clip = CLIPVisionModelWithProjection.from_pretrained(folder, local_files_only=True, use_safetensors=True)
        except (OSError, ValueError, SafetensorError) as error:
            raise UserError(f"{folder}: not readable as CLIP: {error}") from error
        widths = [self.clip.config.projection_dim, 1024, 128, 64, 16, 1]
        numbers = (0, 2, 4, 6, 7)  # of the layers among the predictor's dropouts, which have no weights
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in zip(widths, widths[1:], strict=False))
        weights = read_weights(folder / PREDICTOR)
        names = {f"layers.{n}.{what}": f"{i}.{what}" for i, n in enumerate(numbers) for what in ("weight", "bias")}
        own = self.layers.state_dict()
        for theirs, ours in names.items():
            if theirs not in weights or weights[theirs].shape != own[ours].shape:
                raise UserError(f"{folder / PREDICTOR}: {theirs} of {list(own[ours].shape)} is expected for that CLIP")
        self.layers.load_state_dict({ours: weights[theirs] for theirs, ours in names.items()})
        for module in (self.clip, self.layers):
            module.eval().requires_grad_(False)

    def __call__(self, frames_BT3HW: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        for module in (self.clip, self.layers):
            module.to(frames_BT3HW.device)
        seen = pictures(frames_BT3HW, self.clip.config.image_size, crops=True)
        x_ND = F.normalize(self.clip(pixel_values=seen).image_embeds, dim=1)
        for layer in self.layers:  # the published predictor has no nonlinearity between them
            x_ND = layer(x_ND)
        return x_ND.view(len(frames_BT3HW), -1).mean(1) / 10


class HPSv21:
    """Human preference score v2.1 (Wu et al. 2023): CLIP ViT-H/14, tuned on people's choices; needs the package open_clip_torch.

    `file`: HPS_v2.1_compressed.pt, or the like. The cosine of frames and prompt, mean over a video's frames.
    """

    def __init__(self, file: Path):
        try:
            import open_clip
        except ImportError as error:
            raise UserError("HPSv2.1 needs open_clip, which is not installed: pip install open_clip_torch") from error
        weights = read_weights(file)
        self.model = open_clip.create_model("ViT-H-14").eval().requires_grad_(False)
        problem = self.model.load_state_dict(weights, strict=False)
        if problem.missing_keys:
            raise UserError(f"{file}: not the weights of HPSv2.1; {problem.missing_keys[0]} is missing")
        self.tokenizer = open_clip.get_tokenizer("ViT-H-14")

    def __call__(self, frames_BT3HW: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        self.model.to(frames_BT3HW.device)
        count = frames_BT3HW.shape[1]
        image_ND = F.normalize(self.model.encode_image(pictures(frames_BT3HW, 224, crops=False)), dim=1)
        text_BD = F.normalize(self.model.encode_text(self.tokenizer(prompts).to(frames_BT3HW.device)), dim=1)
        return (image_ND * text_BD.repeat_interleave(count, 0)).sum(1).view(-1, count).mean(1)
