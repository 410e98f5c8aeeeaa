"""The planner's arithmetic against what it speaks of: the real modules' weights, hand-made numbers, the published sizes."""

import dataclasses
import itertools
import json

import pytest
import torch
from diffusers import WanTransformer3DModel

from dmd_ds.bench.sequence import Closed
from dmd_ds.errors import UserError
from dmd_ds.planner.choose import candidates, cheapest, plan
from dmd_ds.planner.cost import Machine, between_nodes, collectives, flops, seconds
from dmd_ds.planner.memory import memory
from dmd_ds.planner.sizes import PUBLISHED, TEXT_TOKENS, ModelSize, Precision, Setup, Video, Zero, published_size, setup_of
from dmd_ds.recipe import REPOSITORY, Gan, load_recipe
from dmd_ds.wan import denoiser
from tests.mini import TRANSFORMER

HD = Video(81, 720, 1280)
ZERO = Zero(prefetch=200_000_000, reduce_bucket=200_000_000)
IMAGE = {"in_channels": 12, "image_dim": 20, "added_kv_proj_dim": 24}
WHOLE = Setup(
    PUBLISHED["14b"], HD.latents(), gpus=8, ulysses=8, ema=True, gather="each", generator_zero=ZERO, fake_score_zero=ZERO, lora_rank=128
)  # fmt: skip


def offloaded(setup: Setup) -> Setup:
    zero = dataclasses.replace(ZERO, offload_optimizer=True)
    return dataclasses.replace(setup, generator_zero=zero, fake_score_zero=zero)


@pytest.mark.parametrize("config", [TRANSFORMER, TRANSFORMER | IMAGE], ids=["text", "image"])
def test_every_weight_of_the_real_model_is_counted(config):
    with torch.device("meta"):
        model = WanTransformer3DModel(**config)
    size = ModelSize.from_config(dict(model.config))
    assert sorted(size.weights()) == sorted(parameter.numel() for parameter in model.parameters())
    assert sorted(size.block_weights()) == sorted(parameter.numel() for parameter in model.blocks[0].parameters())


def test_every_weight_of_the_adapter_is_counted():
    model = denoiser.WanDenoiser(WanTransformer3DModel(**TRANSFORMER))
    model.add_adapter(4, 4.0)
    real = [parameter.numel() for parameter in model.parameters() if parameter.requires_grad]
    assert sorted(ModelSize.from_config(dict(model.transformer.config)).adapter(4)) == sorted(real)


def test_published_models_are_known_by_name_and_have_the_published_number_of_weights():
    assert sum(published_size("Wan2.1-T2V-14B-Diffusers").weights()) == pytest.approx(14.29e9, rel=1e-3)
    assert sum(published_size("t2v_1.3b_480p").weights()) == pytest.approx(1.419e9, rel=1e-3)
    assert published_size("t2v_1_3b_480p") == PUBLISHED["1.3b"]
    assert published_size("Wan2.1-I2V-14B-720P-Diffusers").in_channels == 36
    assert published_size("tiny") is None
    assert TEXT_TOKENS == denoiser.TEXT_TOKENS


def test_tokens_of_the_published_video_sizes():
    assert dataclasses.replace(WHOLE, latents=Video().latents()).tokens == 32_760
    assert WHOLE.tokens == 75_600 and WHOLE.rank_tokens == 9_450


@pytest.mark.parametrize("video", [Video(80, 480, 832), Video(81, 488, 832), Video(81, 480, 830)])
def test_a_video_that_does_not_divide_is_refused(video):
    with pytest.raises(UserError, match="--(frames|height|width)"):
        video.latents()


@pytest.mark.parametrize("change", [{"ulysses": 3}, {"gpus": 12}, {"ring": 2}])
def test_degrees_that_do_not_divide_are_refused(change):
    with pytest.raises(UserError, match="does not divide"):
        dataclasses.replace(WHOLE, **change)


# ---- memory -----------------------------------------------------------------------------------------------------------


def test_trained_weights_take_sixteen_bytes_each_in_bf16_and_twenty_in_float32():
    names = [f"generator: {name}" for name in ("weights", "fp32 master weights", "Adam moments", "gradients")]
    for precision, bytes_each in ((Precision(2, True), 16), (Precision(4, False), 20)):
        held = memory(dataclasses.replace(WHOLE, precision=precision)).always
        assert sum(held[name] for name in names) == pytest.approx(bytes_each * sum(WHOLE.model.weights()) / 8, rel=1e-5)


def test_14b_at_720p_with_everything_trained_takes_about_fifty_gigabytes_on_eight_gpus():
    assert 45e9 < memory(WHOLE).peak < 55e9
    assert 60e9 < memory(dataclasses.replace(WHOLE, gan=Gan(generator_weight=0.03))).peak < 68e9  # its samples are three in a batch


def test_14b_at_720p_fits_four_gpus_with_a_lora_generator_and_offload():
    lora = offloaded(dataclasses.replace(WHOLE, gpus=4, ulysses=4, ema=False, generator_lora_rank=128))
    assert memory(lora).peak < 60e9
    assert memory(dataclasses.replace(lora, generator_lora_rank=None, ulysses=1)).peak > memory(lora).peak


@pytest.mark.parametrize(
    "smaller",
    [
        {"checkpointing": True}, {"ulysses": 8}, {"gpus": 64}, {"generator_lora_rank": 64}, {"validation": False}, {"score_parts": 2},
        {"checkpointing": True, "activation_offload": True}, {"generator_zero": dataclasses.replace(ZERO, bf16_states=True)},
        {"fake_score_zero": dataclasses.replace(ZERO, offload_param=True)},
    ],
)  # fmt: skip
def test_what_is_meant_to_save_memory_never_costs_any(smaller):
    wide = dataclasses.replace(WHOLE, ulysses=4, checkpointing=False)
    before, after = memory(wide), memory(dataclasses.replace(wide, **smaller))
    assert all(after.of(phase) <= before.of(phase) * 1.001 for phase in after.phases)
    assert sum(after.of(phase) for phase in after.phases) < sum(before.of(phase) for phase in before.phases)


def test_offload_takes_optimiser_and_gradients_off_the_gpu():
    names = set(memory(offloaded(WHOLE)).always)
    assert not any(word in name for name in names for word in ("Adam", "master", ": gradients"))


def test_prefetch_holds_no_more_than_max_live_parameters_allow():
    def ahead(zero: Zero) -> float:
        return memory(dataclasses.replace(WHOLE, generator_zero=zero)).phases["generator: rollout without gradient"]["gathered ahead"]

    assert ahead(ZERO) == 2 * (ZERO.max_live + ZERO.prefetch)
    assert ahead(dataclasses.replace(ZERO, prefetch=0)) == 2 * sum(WHOLE.model.block_weights())


def test_weights_that_stay_whole_take_their_room_where_they_do():
    phases = {gather: memory(dataclasses.replace(WHOLE, gather=gather)).phases for gather in ("each", "rollout", "update")}
    whole = 2 * sum(numel for numel in WHOLE.model.weights() if numel > ZERO.persistence)
    for gather, of_backward in (("each", False), ("rollout", False), ("update", True)):
        held = {name for name, terms in phases[gather].items() if "weights held" in terms}
        assert ("generator: rollout without gradient" in held) == (gather != "each")
        assert ("generator: scores without gradient" in held) == any("fake score: backward" in name for name in held) == of_backward
    assert phases["rollout"]["fake score: rollout without gradient"]["weights held"] == whole


def test_auto_sizes_are_those_of_the_model():
    config = {"zero_optimization": {"stage": 3, "reduce_bucket_size": 7, "stage3_prefetch_bucket_size": "auto"}}
    zero = Zero.from_ds_config(config, PUBLISHED["14b"])
    assert (zero.reduce_bucket, zero.prefetch) == (7, sum(PUBLISHED["14b"].block_weights()))
    threshold = PUBLISHED["14b"].zero_sizes()["stage3_param_persistence_threshold"]
    assert 6 * 5120 <= threshold < 128 * 5120  # modulations stay whole, an adapter does not


def test_copies_inside_nodes_take_room_and_save_the_network():
    def inside(ranks: int) -> Setup:
        zero = dataclasses.replace(ZERO, inside=ranks)
        return dataclasses.replace(WHOLE, gpus=64, generator_zero=zero, fake_score_zero=zero)

    copies = {name: size for name, size in memory(inside(8)).always.items() if "inside" in name}
    assert copies["generator: copies inside nodes"] == pytest.approx(2 * sum(WHOLE.model.weights()) / 8, rel=1e-6)
    assert not any("inside" in name for name in memory(inside(1)).always)
    assert between_nodes(inside(8), Machine()) < between_nodes(inside(1), Machine()) / 5


# ---- cost -------------------------------------------------------------------------------------------------------------


def test_one_gpu_sends_nothing_and_one_node_sends_nothing_out():
    assert set(collectives(dataclasses.replace(WHOLE, gpus=1, ulysses=1)).values()) == {0}
    assert between_nodes(WHOLE, Machine()) == 0 < between_nodes(dataclasses.replace(WHOLE, gpus=16), Machine())


def test_attention_sends_what_the_bench_measures():
    # a fake-score step alone, no rollout before its exit: three forwards (one recomputed) and a backward of each block
    setup = dataclasses.replace(WHOLE, ulysses=2, ring=4, sampling_steps=1, generator_every=10**9, precision=Precision(4, False))
    closed, sent = Closed(75_600, 5120, ulysses=2, ring=4), collectives(setup)
    to_itself = 2  # the bench counts what is handed over, of which Ulysses' own half does not leave the rank
    total = 40 * (3 * closed.forward + closed.backward)
    assert sent["all-to-all of Ulysses"] * to_itself + sent["ring"] == pytest.approx(total, rel=1e-6)


def test_a_backward_costs_two_forwards_and_checkpointing_one_more():
    forward = WHOLE.model.forward_flops(75_600, 512) / 8
    setup = dataclasses.replace(WHOLE, sampling_steps=1, generator_every=1)
    # generator 4 and its rollout in the fake-score step 1, scores 3, fake score 3
    assert flops(setup) == pytest.approx(forward * (4 + 1 + 3 + 3))
    assert flops(dataclasses.replace(setup, checkpointing=False)) == pytest.approx(forward * (3 + 1 + 3 + 2))


def test_a_rollout_to_the_last_step_costs_all_steps_before_it():
    forward = WHOLE.model.forward_flops(75_600, 512) / 8
    drawn = dataclasses.replace(WHOLE, sampling_steps=5, generator_every=1)
    # 2 of the 4 steps before the last in the mean, in the generator's step and in the fake score's
    assert flops(dataclasses.replace(drawn, exits_last=True)) - flops(drawn) == pytest.approx(forward * 2 * (4 - 2))


def test_a_faster_machine_takes_less_time():
    slow = seconds(dataclasses.replace(WHOLE, gpus=64), Machine())
    assert seconds(dataclasses.replace(WHOLE, gpus=64), Machine(flops=2e15)).compute < slow.compute
    assert seconds(dataclasses.replace(WHOLE, gpus=64), Machine(network=10e9)).weights > slow.weights


def test_the_cheapest_settings_fit_and_nothing_that_fits_is_cheaper():
    machine = Machine(memory=60e9)
    found = cheapest(WHOLE, machine, whole_generator=False)
    fitting = [one for one in (plan(setup, machine) for setup in candidates(WHOLE, machine)) if one.memory.peak <= machine.usable]
    assert found in fitting and found.seconds_a_sample == min(one.seconds_a_sample for one in fitting)
    kept = [one.setup for one in fitting if not one.setup.generator_lora]
    assert cheapest(WHOLE, machine, whole_generator=True).setup in kept
    assert cheapest(WHOLE, Machine(memory=10e9), whole_generator=True) is None


def test_every_setting_is_said_as_the_recipe_takes_it():
    def setup_from(keys: list[str]) -> Setup:
        recipe = load_recipe("t2v_14b_720p", keys)
        configs = {name: json.loads((REPOSITORY / getattr(recipe, name).ds_config).read_text()) for name in ("generator", "fake_score")}
        return setup_of(recipe, PUBLISHED["14b"], HD, 8, configs)

    machine = Machine()
    tried = [one for one in candidates(setup_from([]), machine) if one.a_sample in (1, 8)]  # 5 splits
    assert len(tried) == len(set(tried)) == 5 * 3 * 3 * 3 * 2
    assert all(setup_from(plan(one, machine).keys()) == one for one in tried)


def test_what_lies_on_the_host_is_not_on_the_gpu_and_takes_time():
    for change in (
        {"activation_offload": True},
        {"generator_zero": dataclasses.replace(ZERO, offload_param=True)},
        {"fake_score_zero": dataclasses.replace(ZERO, offload_param=True)},
        {"generator_zero": dataclasses.replace(ZERO, offload_optimizer=True)},
    ):
        moved = dataclasses.replace(WHOLE, **change)
        before, after = memory(WHOLE), memory(moved)
        assert sum(map(after.of, after.phases)) < sum(map(before.of, before.phases))
        assert seconds(moved, Machine()).offload > seconds(WHOLE, Machine()).offload == 0


def test_bf16_states_take_eight_bytes_a_weight():
    held = memory(dataclasses.replace(WHOLE, generator_zero=dataclasses.replace(ZERO, bf16_states=True))).always
    of_generator = sum(size for name, size in held.items() if name.startswith("generator: "))
    assert of_generator == pytest.approx(8 * sum(WHOLE.model.weights()) / 8, rel=1e-5)


def test_more_memory_is_never_slower():
    found = [cheapest(WHOLE, Machine(memory=gigabytes * 1e9), whole_generator=True) for gigabytes in (45, 60, 80, 140)]
    times = [one.seconds_a_sample for one in found if one]
    assert len(times) >= 3 and all(late <= early for early, late in itertools.pairwise(times))
