"""What our model is shown of an image is what the stock pipeline shows its own."""

import numpy as np
import pytest
import torch
from diffusers import WanImageToVideoPipeline
from PIL import Image

from dmd_ds.wan.autoencoder import load_autoencoder
from dmd_ds.wan.image import image_condition, load_image_encoder, show_first_frame
from tests.mini import IMAGE_EMBEDS_SHAPE

FRAMES, HEIGHT, WIDTH = 9, 32, 48


@pytest.fixture
def picture():
    return np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)


def test_channels_and_embeds_are_the_stock_pipelines(mini_image_model, picture):
    pipeline = WanImageToVideoPipeline.from_pretrained(mini_image_model)
    image = Image.fromarray(picture)
    pixels = pipeline.video_processor.preprocess(image, height=HEIGHT, width=WIDTH)
    with torch.no_grad():
        _, channels = pipeline.prepare_latents(
            pixels, 2, 4, HEIGHT, WIDTH, FRAMES, torch.float32, torch.device("cpu"), latents=torch.zeros(2, 4, 3, 4, 6)
        )
        embeds = pipeline.encode_image(image)

    device = torch.device("cpu")
    frame = show_first_frame(load_image_encoder(mini_image_model, device), load_autoencoder(mini_image_model, device), picture, FRAMES)
    assert tuple(frame.latents.shape) == (4, 3, 4, 6) and tuple(frame.embeds.shape) == IMAGE_EMBEDS_SHAPE
    ours = image_condition([frame, frame], device)
    torch.testing.assert_close(ours.channels_BCTHW, channels, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.embeds_BLD, embeds.repeat(2, 1, 1), atol=1e-5, rtol=1e-5)
    assert ours.channels_BCTHW[:, :4].unique(dim=0).shape[0] == 1 and ours.channels_BCTHW[0, 4:].std() > 0.01
