"""A latents dataset reads back what was written, and its order is a function of the step."""

import json

import pytest
import torch

from dmd_ds.data.latents import BatchOrder, FirstFrame, LatentsDataset, LatentsWriter, SizedOrder, pad_embeds
from dmd_ds.data.shards import read_places
from dmd_ds.errors import UserError
from dmd_ds.randomness import Randomness
from tests.mini import IMAGE_EMBEDS_SHAPE, TEXT_WIDTH, make_dataset

SHAPES = ((4, 2, 4, 4), (4, 1, 4, 8))


@pytest.fixture
def folder(tmp_path):
    return make_dataset(tmp_path / "data", samples=7, shapes=SHAPES)


def test_samples_come_back_over_shards(folder):
    dataset = LatentsDataset(str(folder))
    assert len(dataset) == 7 and len(list(folder.glob("*.safetensors"))) == 4  # 3 shards and the negative prompt
    assert [dataset[i].caption for i in range(7)] == [f"sample {i}" for i in range(7)]
    assert [tuple(dataset[i].latents.shape) for i in range(2)] == list(SHAPES)
    assert not torch.equal(dataset[0].latents, dataset[2].latents)
    assert dataset.most_prompt_tokens == 6 and dataset.video == {"frames": 5, "height": 32, "width": 32, "fps": 8}


def test_an_epoch_sees_every_sample_in_batches_of_one_shape(folder):
    dataset = LatentsDataset(str(folder))
    order = BatchOrder(dataset.buckets(), 2, Randomness(0))
    assert order.steps_an_epoch == 4  # four of one shape, three of the other, the last filled up
    seen = set()
    for step in range(4):
        shape, indices = order(step)
        assert len(indices) == 2 and {tuple(dataset[i].latents.shape) for i in indices} == {shape}
        seen |= set(indices)
    assert seen == set(range(7))


def test_the_order_is_a_function_of_the_step_alone(folder):
    buckets = LatentsDataset(str(folder)).buckets()
    straight = [BatchOrder(buckets, 2, Randomness(0))(step) for step in range(12)]
    one = BatchOrder(buckets, 2, Randomness(0))
    assert [one(step) for step in reversed(range(12))] == straight[::-1]
    assert straight[:4] != straight[4:8]


def test_a_batch_larger_than_a_bucket_repeats_samples():
    shape, indices = BatchOrder({(1,): [0, 1]}, 5, Randomness(0))(0)
    assert shape == (1,) and len(indices) == 5 and set(indices) == {0, 1}


def test_padding_is_zeros_behind_the_text():
    padded = pad_embeds([torch.ones(2, TEXT_WIDTH), torch.ones(3, TEXT_WIDTH)], 8)
    assert padded.shape == (2, 8, TEXT_WIDTH) and padded.sum((1, 2)).tolist() == [2 * TEXT_WIDTH, 3 * TEXT_WIDTH]


def test_a_missing_dataset_is_named():
    with pytest.raises(UserError, match=r"data.path=nowhere: no such folder"):
        LatentsDataset("nowhere")


def test_a_dataset_without_its_index_is_unfinished(folder):
    (folder / "index.json").unlink()
    with pytest.raises(UserError, match="no index.json"):
        LatentsDataset(str(folder))


@pytest.mark.parametrize(
    "kept, message",
    [
        (-1, r"sample 2: prompt_embeds is not whole: the file has 2823 bytes, its header says 2824"),
        (1000, r"sample 0: prompt_embeds is not whole: the file has 1000 bytes, its header says 2824"),
        (200, r"200 bytes, which end within its header of 448"),
        (3, r"3 bytes, which end within its header"),
    ],
)
def test_a_shard_that_is_cut_short_is_named_when_the_dataset_is_opened(folder, kept, message):
    shard = folder / "shard-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:kept])
    with pytest.raises(UserError, match=f"shard-00001.safetensors: {message}"):
        LatentsDataset(str(folder))


@pytest.mark.parametrize("name", ["latents", "prompt_embeds"])
def test_a_flipped_byte_is_named_with_file_and_sample_when_the_sample_is_read(folder, name):
    shard = folder / "shard-00001.safetensors"
    _, begin = read_places(shard)
    first, _ = read_places(shard)[0][f"1.{name}"].data_offsets
    data = bytearray(shard.read_bytes())
    data[begin + first + 5] ^= 1
    shard.write_bytes(data)
    dataset = LatentsDataset(str(folder))
    assert dataset[3].caption == "sample 3" and dataset[5].caption == "sample 5"
    expected = dataset.about[4]["crc32"][name]
    with pytest.raises(UserError, match=f"shard-00001.safetensors: sample 1: {name} is damaged: .* CRC-32 .*, {expected:08x} were written"):
        dataset[4]


def test_a_flipped_byte_of_the_negative_prompt_is_named(folder):
    file = folder / "negative.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x55")
    with pytest.raises(UserError, match="negative.safetensors: negative_embeds is damaged"):
        LatentsDataset(str(folder))


def test_a_flipped_byte_of_a_first_frame_is_named(tmp_path):
    folder = make_dataset(tmp_path, image_embeds_shape=IMAGE_EMBEDS_SHAPE)
    shard = folder / "shard-00000.safetensors"
    places, begin = read_places(shard)
    data = bytearray(shard.read_bytes())
    data[begin + places["2.image_embeds"].data_offsets[0]] ^= 128
    shard.write_bytes(data)
    with pytest.raises(UserError, match="shard-00000.safetensors: sample 2: image_embeds is damaged"):
        LatentsDataset(str(folder)).first_frame(2)


def test_a_dataset_without_checksums_is_to_be_encoded_again(folder):
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps({**index, "format": "dmd_ds latents 1"}))
    with pytest.raises(UserError, match="index.json: format 'dmd_ds latents 1' has no checksums, .*: encode the clips again"):
        LatentsDataset(str(folder))


@pytest.mark.parametrize("name", ["../other", "/etc/passwd", "..", "a/b", "a\\b", ""])
def test_no_shard_lies_outside_the_folder(folder, name):
    index = json.loads((folder / "index.json").read_text())
    index["shards"][0]["name"] = name
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="index.json: shards.0.name="):
        LatentsDataset(str(folder))


def test_a_sample_that_is_not_as_its_line_says_is_named(folder):
    file = folder / "shard-00000.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    lines[1]["latents_shape"] = [4, 2, 4, 4]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(UserError, match=r"shard-00000.safetensors: sample 1: latents is F32 \[4, 1, 4, 8\], the .jsonl .* \[4, 2, 4, 4\]"):
        LatentsDataset(str(folder))


def test_metadata_that_lacks_a_sample_is_named(folder):
    lines = (folder / "shard-00000.jsonl").read_text().splitlines()
    (folder / "shard-00000.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    with pytest.raises(UserError, match=r"shard-00000.jsonl: 2 samples, the index says 3"):
        LatentsDataset(str(folder))


def test_a_dataset_of_another_format_is_refused(folder):
    (folder / "index.json").write_text(json.dumps({"format": "dmd_ds latents 9"}))
    with pytest.raises(UserError, match="dmd_ds latents 9"):
        LatentsDataset(str(folder))


def test_first_frames_come_back_and_the_dataset_says_that_it_has_them(tmp_path, folder):
    written = [FirstFrame(torch.randn(*SHAPES[0]), torch.randn(*IMAGE_EMBEDS_SHAPE)) for _ in range(3)]
    writer = LatentsWriter(tmp_path / "images", fps=8, negative_embeds_LD=torch.zeros(1, TEXT_WIDTH), samples_a_shard=2)
    for frame in written:
        size = {"frames": 5, "height": 32, "width": 32}
        writer.add(torch.zeros(*SHAPES[0]), torch.zeros(2, TEXT_WIDTH), frame, caption="", source="", **size)
    writer.close()
    dataset = LatentsDataset(str(tmp_path / "images"))
    assert dataset.image_embeds_shape == IMAGE_EMBEDS_SHAPE and LatentsDataset(str(folder)).image_embeds_shape is None
    for index, frame in enumerate(written):
        assert torch.equal(dataset.first_frame(index).latents, frame.latents)
        assert torch.equal(dataset.first_frame(index).embeds, frame.embeds)


def test_sizes_of_the_recipe_are_mixed_over_all_samples_one_a_step():
    order = SizedOrder(list(SHAPES), samples=6, global_batch_size=2, randomness=Randomness(0))
    steps = [order(step) for step in range(60)]
    assert {shape for shape, _ in steps} == set(SHAPES)
    assert 15 < sum(shape == SHAPES[0] for shape, _ in steps) < 45
    assert sorted(index for _, indices in steps[:3] for index in indices) == list(range(6))  # an epoch is one of samples
    assert order(7) == SizedOrder(list(SHAPES), 6, 2, Randomness(0))(7)
