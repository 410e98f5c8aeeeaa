import pytest

from tests.mini import make_image_pipeline, make_pipeline


@pytest.fixture(scope="session")
def mini_model(tmp_path_factory):
    """A diffusers folder of the mini Wan; read only."""
    return make_pipeline(tmp_path_factory.mktemp("mini") / "model")


@pytest.fixture(scope="session")
def mini_image_model(tmp_path_factory):
    """A diffusers folder of the mini image-to-video Wan; read only."""
    return make_image_pipeline(tmp_path_factory.mktemp("mini_image") / "model")
