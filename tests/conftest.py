import contextlib
import resource
from pathlib import Path

import pytest

from tests.distributed.launch import train
from tests.mini import make_image_pipeline, make_pipeline, make_recipe


@pytest.fixture(scope="session")
def mini_model(tmp_path_factory):
    """A diffusers folder of the mini Wan; read only."""
    return make_pipeline(tmp_path_factory.mktemp("mini") / "model")


@pytest.fixture(scope="session")
def run(tmp_path_factory) -> Path:
    """Two steps of the mini recipe on two ranks, with an average of the weights; its base model is `model` beside it. Read only."""
    changes = {"data": {"batch_size": 1}, "generator": {"ema_decay": 0.5}, "validation": {"every": 2, "prompts": 3}}
    recipe = make_recipe(tmp_path_factory.mktemp("export"), max_steps=2, **changes)
    train(recipe, ranks=2)
    return Path(recipe.output_dir)


@pytest.fixture
def full_disk():
    """While it is entered no file grows beyond so many bytes: the kernel refuses what is more, as it does on a full disk."""

    @contextlib.contextmanager
    def filled(largest: int = 50_000):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return filled


@pytest.fixture(scope="session")
def mini_image_model(tmp_path_factory):
    """A diffusers folder of the mini image-to-video Wan; read only."""
    return make_image_pipeline(tmp_path_factory.mktemp("mini_image") / "model")
