"""An adapter: what it costs, that it changes nothing until it is trained, and how several become one."""

from types import SimpleNamespace

import numpy as np
import pytest
from mindspore import Tensor

from dreambooth_ms.adapters.lora import (
    LoraDense,
    initialise_lora,
    inject_lora,
    lora_tensors,
    lora_trainables,
)
from dreambooth_ms.cli.assemble import _sum_of
from dreambooth_ms.errors import ConfigError, WeightError
from dreambooth_ms.models.specs import SD_15_UNET, SD_21_UNET
from dreambooth_ms.models.unet import UNet2DConditionModel
from dreambooth_ms.ops import Dense, conv, linear
from dreambooth_ms.ops.linear import empty_parameter
from dreambooth_ms.sampling.denoiser import Denoiser
from dreambooth_ms.weights.initialise import initialise
from dreambooth_ms.weights.lora_file import LoraFile
from dreambooth_ms.weights.parameters import public_parameters
from tests.parity.reference import normal, relative_error
from tests.tiny_model import UNET

TARGETS = ["to_k", "to_q", "to_v", "to_out.0"]
LAYERS_OF_TINY_UNET = 4 * 2 * 4
"""Four transformers (one down, one in the middle, two up), each with two attentions of four layers."""


def random_factors(layers, seed=0):
    for i, layer in enumerate(layers.values()):
        layer.set_factors(
            normal(*layer.lora_A.weight.shape, seed=2 * i + seed),
            normal(*layer.lora_B.weight.shape, seed=2 * i + 1 + seed),
        )


@pytest.fixture(scope="module")
def outputs():
    """What a UNet says without an adapter, and then with one in four states.

    As in a run that first draws its class pictures, the network has been compiled before the adapter is added.
    """
    unet = UNet2DConditionModel(UNET)
    initialise(unet, 0)
    text = Tensor(normal(2, 5, 24))
    inputs = Tensor(normal(2, 4, 8, 8)), Tensor(np.array([7, 900], np.float32)), text, text, Tensor(np.float32(1))
    base = Denoiser(unet, guided=False)(*inputs).asnumpy()
    layers = inject_lora(unet, 2, 4.0, TARGETS)
    initialise_lora(layers, seed=3)
    adapted = Denoiser(unet, guided=False)
    fresh = adapted(*inputs).asnumpy()
    random_factors(layers)
    full = adapted(*inputs).asnumpy()
    scaled = []
    for scale in (0.0, 1.0):
        for layer in layers.values():
            layer.set_scale(scale)
        scaled.append(adapted(*inputs).asnumpy())
    return SimpleNamespace(base=base, fresh=fresh, full=full, off=scaled[0], full_again=scaled[1])


@pytest.fixture(scope="module")
def started():
    """An adapter as a training with seed 3 starts from it."""
    layers = inject_lora(UNet2DConditionModel(UNET), 8, 8.0, TARGETS)
    initialise_lora(layers, seed=3)
    return layers


class TestItsEffect:
    def test_one_that_was_just_added_changes_no_bit(self, outputs):
        assert outputs.fresh.tobytes() == outputs.base.tobytes()

    def test_at_scale_zero_a_trained_one_changes_no_bit(self, outputs):
        assert outputs.off.tobytes() == outputs.base.tobytes()

    def test_at_scale_one_it_changes_the_output_and_comes_back_to_the_bit(self, outputs):
        assert relative_error(outputs.full, outputs.base) > 0.1
        assert outputs.full_again.tobytes() == outputs.full.tobytes()

    @pytest.mark.parametrize("has_bias", [True, False])
    def test_a_layer_adds_alpha_over_rank_times_b_a(self, has_bias):
        base = Dense(6, 5, has_bias=has_bias)
        initialise(base, 0)
        x = normal(2, 3, 6)
        before = base(Tensor(x)).asnumpy()
        layer = LoraDense(base, rank=2, alpha=3.0)
        factor_a, factor_b = normal(2, 6), normal(5, 2)
        layer.set_factors(factor_a, factor_b)
        # Float32 sums of six products.
        assert relative_error(layer(Tensor(x)), before + 1.5 * x @ factor_a.T @ factor_b.T) < 1e-6
        layer.set_scale(-0.5)
        assert relative_error(layer(Tensor(x)), before - 0.75 * x @ factor_a.T @ factor_b.T) < 1e-6

    def test_factors_of_another_layer_are_refused(self):
        layer = LoraDense(Dense(6, 5), rank=2, alpha=2.0)
        with pytest.raises(WeightError, match=r"the adapter does not fit the base: \(2, 7\) for \(2, 6\)"):
            layer.set_factors(normal(2, 7), normal(5, 2))


class TestItsStart:
    def test_b_is_zero_and_a_is_normal_with_deviation_one_over_the_rank(self, started):
        assert all(not b.any() for _, _, b in lora_tensors(started))
        draws = np.concatenate([a.ravel() for _, a, _ in lora_tensors(started)])
        # Five standard deviations of the estimates from this many draws.
        assert abs(draws.mean()) < 5 / 8 / np.sqrt(draws.size)
        assert abs(draws.std() * 8 - 1) < 5 / np.sqrt(2 * draws.size)

    def test_every_layer_starts_from_draws_of_its_own_which_the_seed_decides(self, started):
        starts = {name: a.tobytes() for name, a, _ in lora_tensors(started)}
        assert len(set(starts.values())) == len(starts)
        initialise_lora(started, seed=4)
        assert not {a.tobytes() for _, a, _ in lora_tensors(started)} & set(starts.values())
        initialise_lora(started, seed=3)
        assert {name: a.tobytes() for name, a, _ in lora_tensors(started)} == starts


class TestItsPlaces:
    def test_every_attention_layer_gets_one_and_nothing_else(self):
        unet = UNet2DConditionModel(UNET)
        attention = [name for name, cell in unet.cells_and_names() if type(cell) is Dense and ".attn" in name]
        layers = inject_lora(unet, 4, 4.0, TARGETS)
        assert list(layers) == attention
        assert len(layers) == LAYERS_OF_TINY_UNET
        assert {name for name, cell in unet.cells_and_names() if type(cell) is LoraDense} == set(attention)

    def test_the_base_keeps_its_names_and_values_and_only_the_factors_are_new(self):
        unet = UNet2DConditionModel(UNET)
        initialise(unet, 0)
        before = {name: parameter.read() for name, parameter in public_parameters(unet).items()}
        layers = inject_lora(unet, 4, 4.0, TARGETS)
        after = public_parameters(unet)
        assert all(np.array_equal(after[name].read(), value) for name, value in before.items())
        new = {f"{name}.{part}" for name in layers for part in ("lora_A.weight", "lora_B.weight", "lora_scale")}
        assert after.keys() == before.keys() | new

    def test_every_parameter_has_a_name_of_its_own(self):
        unet = UNet2DConditionModel(UNET)
        layers = inject_lora(unet, 4, 4.0, TARGETS)
        names = [parameter.name for parameter in unet.get_parameters()]
        assert len(names) == len(set(names))
        assert {parameter.name for parameter in lora_trainables(layers)} == {
            f"{name}.{part}.weight" for name in layers for part in ("lora_A", "lora_B")
        }

    def test_only_the_factors_can_be_trained(self):
        unet = UNet2DConditionModel(UNET)
        layers = inject_lora(unet, 4, 4.0, TARGETS)
        assert {p.name for p in unet.trainable_params()} == {p.name for p in lora_trainables(layers)}

    @pytest.mark.parametrize("target", ["attn2.to_k", "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"])
    def test_a_target_is_the_end_of_a_name_between_dots(self, target):
        layers = inject_lora(UNet2DConditionModel(UNET), 4, 4.0, [target])
        assert all(name.endswith(".attn2.to_k") for name in layers)
        assert len(layers) == (4 if target == "attn2.to_k" else 1)

    def test_a_layer_may_be_named_twice(self):
        assert len(inject_lora(UNet2DConditionModel(UNET), 4, 4.0, ["to_k", "attn1.to_k"])) == 8

    @pytest.mark.parametrize("target", ["to_x", "o_q", "to_out", "conv_in"])
    def test_a_target_that_names_no_linear_layer_is_answered_with_the_choices(self, target):
        choices = "linear_1, linear_2, net.2, proj, time_emb_proj, to_k, to_out.0, to_q, to_v"
        unet = UNet2DConditionModel(UNET)
        with pytest.raises(ConfigError) as caught:
            inject_lora(unet, 4, 4.0, ["to_q", target])
        assert str(caught.value) == f"--lora_target_modules: no linear layer is named {target}; there are {choices}"
        assert not any(isinstance(cell, LoraDense) for cell in unet.cells())

    def test_a_rank_larger_than_a_layer_is_answered_with_the_range(self):
        unet = UNet2DConditionModel(UNET)
        with pytest.raises(
            ConfigError, match="--rank: expected 1 to 16, the size of the smallest adapted layer, got 17"
        ):
            inject_lora(unet, 17, 17.0, TARGETS)
        assert inject_lora(unet, 16, 16.0, TARGETS)


@pytest.mark.parametrize(("spec", "weights"), [(SD_15_UNET, 797_184), (SD_21_UNET, 829_952)], ids=["SD 1.5", "SD 2.1"])
def test_rank_four_on_a_published_unet_trains_the_published_number_of_weights(spec, weights, monkeypatch):
    """The base's own matrices are replaced by single numbers, because 860 million weights would take 3.5 GB."""
    for module in (linear, conv):
        monkeypatch.setattr(module, "empty_parameter", lambda shape: empty_parameter(()))
    trainables = lora_trainables(inject_lora(UNet2DConditionModel(spec), 4, 4.0, TARGETS))
    assert len(trainables) == 256
    assert sum(parameter.size for parameter in trainables) == weights


def adapter(rank, alpha, seed, layers=("a", "b")):
    """An adapter of layers from 6 to 5 channels."""
    factors = {
        name: (normal(rank, 6, seed=seed + i), normal(5, rank, seed=seed + i)) for i, name in enumerate(sorted(layers))
    }
    return LoraFile(factors, rank, alpha, alpha_is_stated=True)


def update(adapter, name):
    """What an adapter adds to a layer's weight, (5, 6)."""
    factor_a, factor_b = adapter.factors.get(name, (np.zeros((1, 6)), np.zeros((5, 1))))
    return adapter.alpha / adapter.rank * factor_b.astype(np.float64) @ factor_a


class TestTheSumOfSeveral:
    @pytest.mark.parametrize(
        "adapters",
        [
            (adapter(4, 4.0, seed=0), adapter(4, 4.0, seed=10)),
            (adapter(4, 1.0, seed=0), adapter(2, 6.0, seed=10)),
            (adapter(2, 3.0, seed=0), adapter(1, 1.0, seed=10), adapter(3, 2.0, seed=20)),
            (adapter(4, 1.0, seed=0, layers="ab"), adapter(2, 6.0, seed=10, layers="bc")),
            (adapter(4, 8.0, seed=0),),
        ],
        ids=["alike", "other ranks and alphas", "three", "other layers", "one alone"],
    )
    def test_its_update_is_the_sum_of_their_updates(self, adapters):
        total = _sum_of(adapters)
        assert total.factors.keys() == {name for adapter in adapters for name in adapter.factors}
        for name, (factor_a, factor_b) in total.factors.items():
            assert factor_a.shape == (total.rank, 6)
            assert factor_b.shape == (5, total.rank)
            # One rounding of float32 where the scale goes into A.
            assert relative_error(update(total, name), sum(update(adapter, name) for adapter in adapters)) < 1e-6
