"""An adapter: what it costs, that it changes nothing until it is trained, what is dropped, and how several add up."""

from types import SimpleNamespace

import numpy as np
import pytest
from mindspore import Tensor, nn, ops

from dreambooth_ms.adapters.adapter import Adapter, side_by_side
from dreambooth_ms.adapters.attach import attach
from dreambooth_ms.adapters.lora import (
    DropoutState,
    LoraConv2d,
    LoraDense,
    LoraLayer,
    adaptable_layers,
    initialise_lora,
    inject_lora,
    lora_trainables,
)
from dreambooth_ms.errors import ConfigError, WeightError
from dreambooth_ms.models.parameters import initialise, public_parameters
from dreambooth_ms.models.specs import SD_15_UNET, SD_21_UNET
from dreambooth_ms.models.unet import UNet2DConditionModel
from dreambooth_ms.ops import Conv2d, Dense, conv, linear
from dreambooth_ms.ops.layout import from_public_layout, to_public_layout
from dreambooth_ms.ops.linear import empty_parameter
from dreambooth_ms.runtime.device import Formulation
from dreambooth_ms.sampling.schedulers import Denoiser
from dreambooth_ms.weights.bundle import load_strict
from tests.parity.reference import normal, relative_error
from tests.tiny_model import UNET
from tests.whole_loras import lora_update
from tools.formulation import use_formulation

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

    As in a run that first samples its class pictures, the network has been compiled before the adapter is added.
    """
    unet = UNet2DConditionModel(UNET)
    initialise(unet, 0)
    text, guidance = Tensor(normal(2, 5, 24)), Tensor(np.float32(1))
    inputs = Tensor(normal(2, 4, 8, 8)), Tensor(np.array([7, 900], np.float32)), guidance, text
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
            set_scale(layer, scale)
        scaled.append(adapted(*inputs).asnumpy())
    return SimpleNamespace(base=base, fresh=fresh, full=full, off=scaled[0], full_again=scaled[1])


@pytest.fixture(scope="module")
def started():
    """An adapter as a training with seed 3 starts from it."""
    layers = inject_lora(UNet2DConditionModel(UNET), 8, 8.0, TARGETS)
    initialise_lora(layers, seed=3)
    return layers


def set_scale(layer, multiplier):
    """0 is the base layer, 1 is as trained."""
    layer.lora_scale.set_data(Tensor(np.float32(multiplier * layer.alpha / layer.rank)))


class OneLayer(nn.Cell):
    def __init__(self):
        super().__init__()
        self.layer = Dense(6, 5)

    def construct(self, x):
        return self.layer(x)


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
        set_scale(layer, -0.5)
        assert relative_error(layer(Tensor(x)), before - 0.75 * x @ factor_a.T @ factor_b.T) < 1e-6

    @pytest.mark.parametrize("formulation", list(Formulation), ids=lambda formulation: formulation.value)
    @pytest.mark.parametrize(
        "form", [{"kernel_size": 1}, {"stride": 2, "padding": (0, 1, 0, 1)}, {"has_bias": False}], ids=str
    )
    def test_a_convolution_adds_the_one_with_alpha_over_rank_times_b_a(self, formulation, form):
        with use_formulation(formulation):
            base, folded = Conv2d(6, 5, **form), Conv2d(6, 5, **form)
            initialise(base, 0)
            layer = LoraConv2d(base, rank=2, alpha=3.0)
        factors = [normal(*factor.shape, seed=i) for i, factor in enumerate(layer.factors())]
        layer.set_factors(*factors)
        values = {name: parameter.read() for name, parameter in public_parameters(base).items()}
        for scale in (1.0, -0.5):
            set_scale(layer, scale)
            update = lora_update(*factors, alpha=3.0).delta(values["weight"])
            load_strict(folded, values | {"weight": values["weight"] + np.float32(scale) * update}, "folded")
            with use_formulation(formulation):
                x = from_public_layout(Tensor(normal(2, 6, 8, 10)))
                here, there = (to_public_layout(cell(x)) for cell in (layer, folded))
            # Float32 sums of some sixty products in another order.
            assert relative_error(here, there.asnumpy()) < 1e-6

    def test_a_network_that_was_compiled_without_it_is_compiled_again(self):
        network, x = OneLayer(), Tensor(normal(2, 6))
        initialise(network, 0)
        before = network(x).asnumpy()
        random_factors(inject_lora(network, 2, 4.0, ["layer"]))
        assert relative_error(network(x), before) > 0.1

    def test_factors_of_another_layer_are_refused(self):
        layer = LoraDense(Dense(6, 5), rank=2, alpha=2.0)
        with pytest.raises(WeightError, match=r"the adapter does not fit the base: \(2, 7\) for \(2, 6\)"):
            layer.set_factors(normal(2, 7), normal(5, 2))


def bits_of_a(layers):
    return {name: layer.lora_A.weight.asnumpy().tobytes() for name, layer in layers.items()}


class TestItsStart:
    def test_b_is_zero_and_a_is_normal_with_deviation_one_over_the_rank(self, started):
        updates = [lora_update(*layer.factors()) for layer in started.values()]
        assert not any(own.up.any() for own in updates)
        draws = np.concatenate([own.down.ravel() for own in updates])
        # Five standard deviations of the estimates from this many draws.
        assert abs(draws.mean()) < 5 / 8 / np.sqrt(draws.size)
        assert abs(draws.std() * 8 - 1) < 5 / np.sqrt(2 * draws.size)

    def test_layers_of_the_same_name_in_another_network_start_from_other_draws(self, started):
        starts = bits_of_a(started)
        initialise_lora(started, seed=3, prefix="text_encoder_2.")
        others = bits_of_a(started)
        initialise_lora(started, seed=3)
        assert all(others[name] != start for name, start in starts.items())

    def test_every_layer_starts_from_draws_of_its_own_which_the_seed_decides(self, started):
        starts = bits_of_a(started)
        assert len(set(starts.values())) == len(starts)
        initialise_lora(started, seed=4)
        assert not set(bits_of_a(started).values()) & set(starts.values())
        initialise_lora(started, seed=3)
        assert bits_of_a(started) == starts


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

    @pytest.mark.parametrize("target", ["to_x", "o_q", "to_out", "norm1"])
    def test_a_target_that_names_no_layer_is_answered_with_the_choices(self, target):
        choices = (
            "conv, conv1, conv2, conv_in, conv_out, conv_shortcut, linear_1, linear_2, net.2, proj, proj_in, proj_out, "
            "time_emb_proj, to_k, to_out.0, to_q, to_v"
        )
        unet = UNet2DConditionModel(UNET)
        with pytest.raises(ConfigError) as caught:
            inject_lora(unet, 4, 4.0, ["to_q", target])
        assert str(caught.value) == f"--lora_target_modules: no layer is named {target}; there are {choices}"
        assert not any(isinstance(cell, LoraLayer) for cell in unet.cells())

    def test_a_rank_larger_than_a_layer_is_answered_with_the_range(self):
        inject_lora(UNet2DConditionModel(UNET), 16, 16.0, TARGETS)
        with pytest.raises(
            ConfigError, match="--rank: expected 1 to 16, the size of the smallest adapted layer, got 17"
        ):
            inject_lora(UNet2DConditionModel(UNET), 17, 17.0, TARGETS)

    def test_a_layer_that_was_adapted_already_is_not_taken_for_a_plain_one(self):
        unet = UNet2DConditionModel(UNET)
        layers = inject_lora(unet, 4, 4.0, TARGETS)
        assert not layers.keys() & adaptable_layers(unet).keys()


@pytest.mark.parametrize(("spec", "weights"), [(SD_15_UNET, 797_184), (SD_21_UNET, 829_952)], ids=["SD 1.5", "SD 2.1"])
def test_rank_four_on_a_published_unet_trains_the_published_number_of_weights(spec, weights, monkeypatch):
    """The base's own matrices are replaced by single numbers, because 860 million weights would take 3.5 GB."""
    for module in (linear, conv):
        monkeypatch.setattr(module, "empty_parameter", lambda shape: empty_parameter(()))
    trainables = lora_trainables(inject_lora(UNet2DConditionModel(spec), 4, 4.0, TARGETS))
    assert len(trainables) == 256
    assert sum(parameter.size for parameter in trainables) == weights


RATE = 0.25


class TwoLayers(nn.Cell):
    """Two layers of the same size with adapters, each applied to the inputs itself."""

    def __init__(self):
        super().__init__()
        self.first, self.second = Dense(64, 64), Dense(64, 64)
        self.state = DropoutState(RATE, seed=5)
        layers = inject_lora(self, 64, 64.0, ["first", "second"], self.state)
        for layer in layers.values():
            layer.set_factors(np.eye(64), np.eye(64))

    def construct(self, x):
        return self.first(x), self.second(x)


class InputGradient(nn.Cell):
    def __init__(self, network):
        super().__init__(auto_prefix=False)
        self.differentiate = ops.grad(network)

    def construct(self, x):
        return self.differentiate(x)


@pytest.fixture(scope="module")
def network():
    return TwoLayers()


@pytest.fixture(scope="module")
def drawn(network):
    """For batch 7: what each layer lets through of ones, (400, 64)."""
    network.state.begin_batch(7)
    return tuple(y.asnumpy() for y in network(Tensor(np.ones((400, 64), np.float32))))


class TestDropout:
    """The base layers are zero and the adapters the identity, so what comes out is what the dropout lets through."""

    def let_through(self, network, number):
        network.state.begin_batch(number)
        return network(Tensor(np.ones((400, 64), np.float32)))[0].asnumpy()

    def test_the_given_share_is_dropped_and_the_mean_is_kept(self, drawn):
        for kept in drawn:
            assert set(np.unique(kept)) == {0, np.float32(1 / (1 - RATE))}
            # Five standard deviations of the share of 25,600 draws.
            assert abs((kept == 0).mean() - RATE) < 5 * np.sqrt(RATE * (1 - RATE) / kept.size)

    def test_rows_and_columns_lose_their_share_each(self, drawn):
        """A hash of poor quality would drop in stripes."""
        dropped = drawn[0] == 0
        for axis in (0, 1):
            deviation = np.sqrt(RATE * (1 - RATE) / dropped.shape[axis])
            assert np.abs(dropped.mean(axis) - RATE).max() < 5 * deviation
        neighbours = np.corrcoef(dropped[:, 1:].ravel(), dropped[:, :-1].ravel())[0, 1]
        assert abs(neighbours) < 5 / np.sqrt(dropped.size)

    def test_the_same_batch_draws_the_same_and_the_next_another(self, network, drawn):
        following = self.let_through(network, 8)
        assert np.array_equal(self.let_through(network, 7), drawn[0])
        # Independent draws differ at 2 r (1 - r) of the places.
        assert (following != drawn[0]).mean() == pytest.approx(2 * RATE * (1 - RATE), abs=0.02)
        assert len(network.compile_cache) == 1

    def test_layers_draw_for_themselves(self, drawn):
        assert (drawn[0] != drawn[1]).mean() == pytest.approx(2 * RATE * (1 - RATE), abs=0.02)

    def test_another_seed_draws_another(self, network, drawn):
        other = DropoutState(RATE, seed=6)
        other.begin_batch(7)
        network.state.begin_batch(7)
        assert int(other.draw.asnumpy()) != int(network.state.draw.asnumpy())

    def test_off_it_is_the_identity_and_afterwards_it_drops_as_before(self, network, drawn):
        x = normal(400, 64)
        with network.state.off():
            assert np.array_equal(network(Tensor(x))[0].asnumpy(), x)
        assert np.array_equal(self.let_through(network, 7), drawn[0])

    def test_the_gradient_passes_where_the_input_does(self, network, drawn):
        network.state.begin_batch(7)
        gradient = InputGradient(network.first)(Tensor(normal(400, 64))).asnumpy()
        assert np.array_equal(gradient, drawn[0])


def adapter(rank, alpha, seed, layers=("a", "b")):
    """Updates of layers from 6 to 5 channels."""
    return {
        name: lora_update(normal(rank, 6, seed=seed + i), normal(5, rank, seed=seed + i), alpha)
        for i, name in enumerate(sorted(layers))
    }


def update(own):
    """What an update adds to a layer's weight, (5, 6)."""
    return own.scale * own.up.astype(np.float64) @ own.down


SEVERAL = {
    "alike": (adapter(4, 4.0, seed=0), adapter(4, 4.0, seed=10)),
    "other ranks and alphas": (adapter(4, 1.0, seed=0), adapter(2, 6.0, seed=10)),
    "three": (adapter(2, 3.0, seed=0), adapter(1, 1.0, seed=10), adapter(3, 2.0, seed=20)),
    "other layers": (adapter(4, 1.0, seed=0, layers="ab"), adapter(2, 6.0, seed=10, layers="bc")),
    "one alone": (adapter(4, 8.0, seed=0),),
}
ZERO = np.zeros((5, 6), np.float32)


@pytest.mark.parametrize("adapters", SEVERAL.values(), ids=SEVERAL)
class TestTheSumOfSeveral:
    def test_its_update_is_the_sum_of_their_updates(self, adapters):
        for name in {name for own in adapters for name in own}:
            updates = [own[name] for own in adapters if name in own]
            total = side_by_side(updates)
            rank = sum(own.rank for own in updates)
            assert (total.down.shape, total.up.shape) == ((rank, 6), (5, rank))
            # One rounding of float32 where the scale goes into A.
            assert relative_error(update(total), sum(map(update, updates))) < 1e-6
            assert relative_error(total.delta(ZERO), sum(own.delta(ZERO) for own in updates)) < 1e-6

    def test_attached_to_layers_it_has_a_scale_for_each(self, adapters):
        """And at 0 the output is the base's, to the bit."""
        network, x = ThreeLayers(), Tensor(normal(2, 6))
        initialise(network, 0)
        before = [y.asnumpy() for y in network(x)]
        attached = attach({"unet": network}, [Adapter({"unet": own, "text_encoder": {}}) for own in adapters])
        for scales in ([1.0] * 3, [-0.5, 2.0, 0.25], [0.0] * 3):
            attached.set_scales(scales[: len(adapters)])
            for name, base, now in zip("abc", before, network(x), strict=True):
                held = [(scale, own[name]) for scale, own in zip(scales, adapters, strict=False) if name in own]
                delta = sum((scale * own.delta(ZERO) for scale, own in held), ZERO)
                assert relative_error(now, base + x.asnumpy() @ delta.T) < 1e-5
                assert any(scales) or now.asnumpy().tobytes() == base.tobytes()
        assert len(network.compile_cache) == 1


class ThreeLayers(nn.Cell):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = Dense(6, 5), Dense(6, 5), Dense(6, 5)

    def construct(self, x):
        return self.a(x), self.b(x), self.c(x)


class Twice:
    """An update of another kind: the layer's weight once more."""

    parameters, is_lora = ("weight",), False

    def delta(self, value, parameter):
        return value


def test_updates_of_any_kind_go_into_the_weight_beside_loras_on_the_same_layer():
    network, x = OneLayer(), Tensor(normal(2, 6))
    initialise(network, 0)
    weight, before = network.layer.weight.asnumpy().copy(), network(x).asnumpy()
    lora = lora_update(normal(2, 6), normal(5, 2))
    attached = attach({"unet": network}, [Adapter({"unet": {"layer": own}}) for own in (Twice(), lora)])
    attached.set_scales([0.5, 2.0])
    assert relative_error(network.layer.weight, 1.5 * weight + 2 * lora.delta(ZERO)) < 1e-6
    attached.set_scales([0.0])
    assert network.layer.weight.asnumpy().tobytes() == weight.tobytes()
    assert network(x).asnumpy().tobytes() == before.tobytes()


@pytest.mark.parametrize(
    ("layer", "width", "said"),
    [
        ("nowhere", 6, r"the adapter has 1 layers that the unet has not \(nowhere\)"),
        ("layer", 7, r"the adapter does not fit the base: \(2, 7\) for \(2, 6\)"),
    ],
)
def test_what_does_not_fit_a_network_is_refused(layer, width, said):
    own = {layer: lora_update(normal(2, width), normal(5, 2))}
    with pytest.raises(WeightError, match=said):
        attach({"unet": OneLayer()}, [Adapter({"unet": own})])
