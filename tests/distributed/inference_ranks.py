"""What test_inference.py runs on 2 ranks: python -m tests.distributed.inference_ranks MODEL [PROMPT ...]

Videos that the ranks make together, by Ulysses and by ring, against those each makes alone; rank 0 prints the largest
difference of a pixel, in levels of 255, and that between two prompts, as JSON.
"""

import json
import sys

import torch

from dmd_ds.generation import VideoModel
from dmd_ds.parallel.attention import SequenceParallel
from dmd_ds.parallel.mesh import joined
from dmd_ds.recipe import Parallel
from tests.distributed.attention_ranks import lay


def main() -> None:
    path, *prompts = sys.argv[1:]
    with joined(Parallel(ulysses=2)) as world:
        alone = VideoModel(path, world.device)
        settings = alone.settings if alone.settings.few_step else alone.settings.changed(frames=5, height=32, width=48, steps=3)
        seeds = list(range(len(prompts)))
        expected = alone.videos(prompts, seeds, settings).int()
        found = {"prompts": int((expected[0] - expected[1]).abs().max())}
        for ulysses, ring in ((2, 1), (1, 2)):
            together = VideoModel(path, world.device, SequenceParallel(lay(world, ulysses, ring), torch.float32))
            difference = (together.videos(prompts, seeds, settings).int() - expected).abs().max()
            found[f"ulysses {ulysses} ring {ring}"] = max(world.all_gather_objects(int(difference)))
        if world.is_first:
            print(json.dumps(found))


if __name__ == "__main__":
    main()
