"""Updates that were left out because a loss or a gradient is not finite: counted, and the end of a run where they go on.

DeepSpeed leaves an update out, on all ranks alike, when the norm of all gradients together is not finite.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors.torch import save_file

from dmd_ds.distill.batch import Batch
from dmd_ds.errors import RunError


class SkippedUpdates:
    """`run`: the folder that gets the batch which a run ends with."""

    def __init__(self, run: Path, most: int, rank: int):
        self.run, self.most, self.rank = run, most, rank
        self.in_a_row = 0

    def look(self, step: int, numbers: Mapping[str, float], batches: Sequence[Batch], captions: Sequence[Sequence[str]]) -> str | None:
        """What there is to say of the step's numbers, the same on all ranks; `RunError` when it has been too often."""
        bad = [name for name, number in numbers.items() if not math.isfinite(number)]
        if not bad:
            self.in_a_row = 0
            return None
        self.in_a_row += 1
        if self.in_a_row > self.most:
            folder = self.keep(step, batches, captions)
            raise RunError(
                f"step {step}: {', '.join(bad)} not finite, {self.in_a_row} updates in a row were left out, more than "
                f"max_skipped_updates={self.most}; the last batch lies in {folder}, the newest checkpoint is as it was"
            )
        return f"{', '.join(bad)} not finite; the update was left out, {self.in_a_row} in a row"

    def keep(self, step: int, batches: Sequence[Batch], captions: Sequence[Sequence[str]]) -> Path:
        """This rank's part of the batch: its tensors by backward pass, its samples and their captions."""
        folder = self.run / "bad_batches" / f"step_{step:06d}"
        folder.mkdir(parents=True, exist_ok=True)
        tensors, about = {}, []
        for number, (batch, texts) in enumerate(zip(batches, captions, strict=True)):
            tensors[f"{number}/prompt_embeds"] = batch.prompt_embeds_BLD.cpu()
            if batch.latents_BCTHW is not None:
                tensors[f"{number}/latents"] = batch.latents_BCTHW.cpu()
            about.append({"places": batch.samples, "captions": list(texts)})
        save_file(tensors, folder / f"rank_{self.rank:05d}.safetensors")
        (folder / f"rank_{self.rank:05d}.json").write_text(json.dumps(about, indent=1) + "\n")
        return folder
