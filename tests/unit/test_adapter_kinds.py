"""Kinds of adapters: which layer gets which, what is refused, that a fresh one changes nothing, what a file holds."""

import math
from dataclasses import replace

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from dreambooth_ms.adapters.formulas import Update
from dreambooth_ms.adapters.layer_updates import LayerUpdate, layer_updates
from dreambooth_ms.adapters.lora import initialise_lora
from dreambooth_ms.adapters.precision import compute_in
from dreambooth_ms.cli import training_needs
from dreambooth_ms.config.load import load
from dreambooth_ms.config.train import MethodConfig, TrainConfig
from dreambooth_ms.errors import ConfigError
from dreambooth_ms.models.parameter_shapes import text_shapes, unet_shapes
from dreambooth_ms.models.parameters import PublicParameter, initialise, public_parameters
from dreambooth_ms.models.specs import CLIP_L_TEXT, SD_15_UNET, SD_21_UNET, SDXL_UNET
from dreambooth_ms.ops import Conv2d, Dense
from dreambooth_ms.runtime.device import Formulation
from dreambooth_ms.training.checkpoint import open_checkpoint, restore, save_checkpoint
from dreambooth_ms.training.memory import estimate
from dreambooth_ms.training.methods import METHODS, Trainable, choose_optimiser
from dreambooth_ms.weights.bundle import CLIP_TARGETS, open_bundle
from tests.parity.reference import normal, relative_error
from tests.tiny_model import write_random_model
from tools.formulation import use_formulation

KINDS = {
    "lora": LayerUpdate("lora", 4, 2.0),
    "PiSSA": LayerUpdate("lora", 4, 2.0, is_principal=True),
    "LoCon with a middle factor": LayerUpdate("locon", 4, 2.0, has_middle=True),
    "DoRA": LayerUpdate("dora", 4, 2.0),
    "LoHa": LayerUpdate("loha", 4, 2.0),
    "LoKr": LayerUpdate("lokr", 2, 1.0, -1),
    "LoKr with a factor": LayerUpdate("lokr", 2, 1.0, 4),
    "LoKr with a whole factor": LayerUpdate("lokr", 100, 1.0, 4),
    "OFT": LayerUpdate("oft", 4, 2.0, 8),
}
BASES = {"linear": lambda: Dense(24, 36), "convolution": lambda: Conv2d(24, 36, 3, 2, (0, 1, 0, 1))}
CASES = [
    pytest.param(KINDS[kind], make, id=f"{kind}, {base}")
    for kind in KINDS
    for base, make in BASES.items()
    if base not in {"LoCon with a middle factor": "linear", "PiSSA": "convolution", "OFT": "convolution"}.get(kind, "")
]


def adapted(update, make, formulation=Formulation.CPU):
    """A base, its input and its answer, and the fresh layer that stands in for it."""
    with use_formulation(formulation):
        base = make()
        initialise(base, 0)
        of_image = (2, 8, 6, 24) if formulation is Formulation.CPU else (2, 24, 8, 6)
        x = Tensor(normal(*((5, 24) if isinstance(base, Dense) else of_image)))
        answer = base(x).asnumpy()
        layer = update.layer(base, None)
        initialise_lora({"layer": layer}, 3)
    return base, x, answer, layer


def disturb(layer, size=0.2):
    for seed, part in enumerate(layer.parts.values()):
        part.write(part.read() + size * normal(*part.shape, seed=seed))


@pytest.mark.usefixtures("pynative")
@pytest.mark.parametrize(("update", "make"), CASES)
class TestALayer:
    @pytest.mark.parametrize("formulation", list(Formulation), ids=lambda one: one.value)
    def test_changes_no_bit_while_it_is_fresh_and_then_what_its_file_says(self, update, make, formulation):
        base, x, answer, layer = adapted(update, make, formulation)
        shape = public_parameters(base)["weight"].shape
        assert update.numbers(shape) == sum(math.prod(part.shape) for part in layer.parts.values())
        with use_formulation(formulation):
            assert layer(x).asnumpy().tobytes() == answer.tobytes()
            disturb(layer)
            scale = layer.lora_scale.asnumpy().copy()
            layer.lora_scale.set_data(Tensor(scale * 0))
            assert layer(x).asnumpy().tobytes() == answer.tobytes()
            layer.lora_scale.set_data(Tensor(scale))
            changed = layer(x).asnumpy()
            assert relative_error(changed, answer) > 1e-2
            weight = PublicParameter(base.weight, getattr(base, "stored_layouts", {}).get("weight"))
            delta = Update(layer.tensors()).delta(weight.read())
            squares = float(layer.squared_change().asnumpy())
            weight.write(weight.read() + delta)
            assert relative_error(base(x).asnumpy(), changed) < 1e-5
        # PiSSA's is the difference of two products that are nearly the same.
        assert squares == pytest.approx((delta.astype(np.float64) ** 2).sum(), rel=1e-5)

    def test_computes_in_half_precision(self, update, make):
        _, x, _, layer = adapted(update, make)
        for own in (layer.weight, layer.bias):
            own.requires_grad = False
        disturb(layer, 0.05)
        expected = layer(x).asnumpy()
        compute_in(layer, ms.float16)
        assert layer.weight.dtype == ms.float16
        y = layer(x.astype(ms.float16))
        assert y.dtype == ms.float16
        assert relative_error(y.asnumpy().astype(np.float32), expected) < 5e-3


def test_pissa_begins_with_the_largest_singular_values():
    """So that what is left of the weight is all that LoRA's own start leaves out, and no smaller rank fits better."""
    base, _, _, layer = adapted(KINDS["PiSSA"], BASES["linear"])
    down, up = layer.factors()
    values = np.linalg.svd(base.weight.asnumpy(), compute_uv=False)
    rest = base.weight.asnumpy() - 0.5 * up @ down
    assert np.linalg.svd(rest, compute_uv=False)[: len(values) - 4] == pytest.approx(values[4:], rel=1e-4)
    tensors = layer.tensors()
    assert (tensors["lora_A.weight"].shape, float(tensors["alpha"])) == ((8, 24), 4.0)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return open_bundle(write_random_model(tmp_path_factory.mktemp("base")))


def updates(unet=SD_15_UNET, text=False, **settings):
    config = MethodConfig(**settings)
    texts = {"text_encoder": (text_shapes(CLIP_L_TEXT), CLIP_TARGETS)} if text else {}
    return layer_updates(config, {"unet": (unet_shapes(unet), config.targets), **texts}, unet)


class TestWhichLayers:
    def test_of_attention_unless_convolutions_are_asked_for(self):
        plain, locon = updates()["unet"], updates(adapter="locon")["unet"]
        assert len(plain) == 128 and plain.keys() < locon.keys()
        assert {name.rpartition(".")[2] for name in locon} == {
            *("0", "to_k", "to_q", "to_v", "conv", "conv1", "conv2", "conv_shortcut", "proj_in", "proj_out")
        }
        assert updates(conv_rank=2)["unet"].keys() == locon.keys()
        assert updates(adapter="locon", lora_target_modules=["to_q"])["unet"].keys() < plain.keys()

    def test_kernels_have_a_rank_and_an_alpha_of_their_own(self):
        own = updates(adapter="locon", rank=8, lora_alpha=2, conv_rank=4, conv_alpha=1, use_tucker=True)["unet"]
        found = {name: (one.rank, one.alpha, one.has_middle) for name, one in own.items()}
        assert found["down_blocks.0.resnets.0.conv1"] == found["down_blocks.0.downsamplers.0.conv"] == (4, 1.0, True)
        assert found["down_blocks.0.attentions.0.proj_in"] == (8, 2.0, False)
        assert found["down_blocks.1.resnets.0.conv_shortcut"] == (8, 2.0, False)

    def test_the_text_encoder_gets_the_same_kind(self):
        both = updates(text=True, adapter="loha", rank=3, alpha_pattern='{"q_proj": 1.5}')
        assert {one.kind for own in both.values() for one in own.values()} == {"loha"}
        assert {name.endswith("q_proj") for name, one in both["text_encoder"].items() if one.alpha == 1.5} == {True}

    def test_a_pattern_names_the_ends_of_names_and_its_first_that_fits_counts(self):
        own = updates(rank=4, rank_pattern='{"attn2.to_k": 16, "to_k": 8, "to_v": 0}')["unet"]
        ranks = {name.partition("transformer_blocks.0.")[2]: (one.rank, one.alpha) for name, one in own.items()}
        assert ranks == {
            **{"attn2.to_k": (16, 16.0), "attn1.to_k": (8, 8.0)},
            **dict.fromkeys(("attn1.to_q", "attn2.to_q", "attn1.to_out.0", "attn2.to_out.0"), (4, 4.0)),
        }

    def test_rank_stabilised_updates_are_scaled_by_the_root(self):
        assert {one.alpha for one in updates(rank=16, lora_alpha=2, use_rslora=True)["unet"].values()} == {8.0}

    @pytest.mark.parametrize("spec", [SD_15_UNET, SD_21_UNET], ids=["SD 1.5", "SD 2.1"])
    def test_a_list_is_of_kohyas_25_blocks(self, spec):
        own = updates(spec, adapter="locon", rank=50, conv_rank=60, rank_pattern=",".join(map(str, range(25))))["unet"]
        assert own["down_blocks.0.attentions.0.proj_in"].rank == 1
        assert own["down_blocks.2.attentions.1.transformer_blocks.0.attn1.to_q"].rank == 8
        assert own["down_blocks.3.resnets.0.conv1"].rank == 60
        assert own["down_blocks.1.resnets.0.conv_shortcut"].rank == 4
        assert own["mid_block.attentions.0.proj_in"].rank == 12
        assert own["up_blocks.0.resnets.0.conv_shortcut"].rank == 13
        assert own["up_blocks.3.attentions.2.transformer_blocks.0.attn2.to_v"].rank == 24

    def test_a_list_of_sdxl_has_23(self):
        own = updates(SDXL_UNET, rank=50, rank_pattern=str(list(range(23))), alpha_pattern="[" + "2," * 22 + "2]")[
            "unet"
        ]
        assert own["down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"].rank == 5
        assert own["down_blocks.2.attentions.1.transformer_blocks.9.attn1.to_q"].rank == 9
        assert own["mid_block.attentions.0.transformer_blocks.0.attn1.to_q"].rank == 11
        assert own["up_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"].rank == 13
        assert own["up_blocks.1.attentions.2.transformer_blocks.1.attn2.to_v"].rank == 18
        assert {one.alpha for one in own.values()} == {2.0}

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"rank_pattern": "4,4"}, "--rank_pattern: this base has 25 blocks, by kohya's count, got 2 numbers"),
            ({"rank_pattern": '{"to_x": 4}'}, "--rank_pattern: no layer that is adapted is named to_x"),
            ({"rank_pattern": ",".join("0" * 25)}, "--rank_pattern: all are 0"),
            ({"rank_pattern": '{"to_q": 321}'}, "--rank_pattern: expected 1 to 320, the size of the smallest"),
            ({"rank": 321}, "--rank: expected 1 to 320, the size of the smallest adapted layer, got 321"),
            ({"conv_rank": 321}, "--conv_rank: expected 1 to 320"),
            ({"adapter": "oft", "oft_block_size": 48}, "--oft_block_size 48: .* has 320 columns, which that does not"),
            (
                {"adapter": "oft", "lora_target_modules": ["conv1"]},
                "--oft_block_size 32: .*conv1 has a kernel; choose other layers",
            ),
            (
                {"init_lora_weights": "pissa", "lora_target_modules": ["proj_in"]},
                "pissa: is for linear layers; .*proj_in is a convolution",
            ),
        ],
        ids=str,
    )
    def test_what_cannot_be_is_one_line(self, settings, message):
        with pytest.raises(ConfigError, match=message) as caught:
            updates(**settings)
        assert "\n" not in str(caught.value)

    def test_lokr_has_no_largest_rank(self):
        assert {one.rank for one in updates(adapter="lokr", rank=10000)["unet"].values()} == {10000}


NEEDED = ["--pretrained_model_name_or_path", "m", "--instance_data_dir", "d", "--instance_prompt", "p"]


class TestFlags:
    @pytest.mark.parametrize(
        ("flags", "expected"),
        [
            (["--algo", "LoHa", "--conv_dim", "4", "--conv_alpha", "1"], ("loha", 4, 1, None)),
            (["--use_dora"], ("dora", None, None, None)),
            (["--block_dims", "1,2,3"], ("lora", None, None, "1,2,3")),
        ],
        ids=str,
    )
    def test_other_programs_names_are_understood(self, flags, expected):
        config = load(TrainConfig, [*NEEDED, *flags], lambda note: None).method
        assert (config.adapter, config.conv_rank, config.conv_alpha, config.rank_pattern) == expected

    @pytest.mark.parametrize("text", ["{", "[1, ", '{"a": "b"}', "1,x", "-1", "NaN", "{}", "true", "[[1]]"])
    def test_what_is_no_pattern_is_refused(self, text):
        with pytest.raises(ConfigError, match=r"--rank_pattern: expected \{"):
            load(TrainConfig, [*NEEDED, "--rank_pattern", text])

    @pytest.mark.parametrize(
        ("flags", "note"),
        [
            (["--adapter", "loha", "--lora_dropout", "0.1"], "--lora_dropout has no effect with --adapter loha"),
            (["--adapter", "oft", "--rank", "8"], "--rank has no effect with --adapter oft"),
            (["--method", "full", "--adapter", "dora"], "--adapter has no effect with --method full"),
            (["--adapter", "loha", "--loraplus_lr_ratio", "4"], "--loraplus_lr_ratio has no effect without --adapter"),
            (["--use_tucker"], "--use_tucker has no effect without --adapter locon"),
        ],
        ids=str,
    )
    def test_what_has_no_effect_is_told(self, flags, note):
        told = []
        load(TrainConfig, [*NEEDED, *flags], told.append)
        assert any(line.startswith(note) for line in told), told

    def test_lora_plus_is_a_rate_of_b(self):
        config = load(
            TrainConfig, [*NEEDED, "--loraplus_lr_ratio", "16", "--train_text_encoder", "--text_encoder_lr", "5e-5"]
        )
        names = ("to_q.lora_A.weight", "to_q.lora_B.weight", "to_k.change.lora_B.weight", "to_k.change.dora_scale")
        parameters = [ms.Parameter(Tensor(np.zeros((2, 2), np.float32)), name=name) for name in names]
        kinds = ("unet", "unet", "unet", "unet")
        optimiser = choose_optimiser(config, list(map(Trainable, parameters, kinds)))
        assert optimiser.rate_factors == (1, 16, 16, 1)
        optimiser = choose_optimiser(config, [Trainable(parameters[1], "text_encoder")])
        assert optimiser.rate_factors == pytest.approx([1.6])


RUNS = {
    "lora": {},
    "pissa": {"init_lora_weights": "pissa"},
    "locon": {"adapter": "locon", "use_tucker": True},
    "dora": {"adapter": "dora", "train_text_encoder": True},
    "loha": {"adapter": "loha", "train_text_encoder": True, "rank_pattern": '{"to_k": 2}'},
    "lokr": {"adapter": "lokr", "rank": 1},
    "oft": {"adapter": "oft", "oft_block_size": 4},
}


@pytest.mark.usefixtures("pynative")
@pytest.mark.parametrize("name", RUNS)
class TestALearner:
    def test_goes_on_from_a_checkpoint_with_every_bit(self, name, bundle, tmp_path):
        config = MethodConfig(method="lora", **{"rank": 4, **RUNS[name]})

        def learner(seed):
            texts = bundle.load_text_encoders() if config.train_text_encoder else None
            unet = bundle.denoiser.load()
            return METHODS["lora"](config, bundle, unet, texts, seed), unet

        def state(own):
            return [*own.parameters, *own.kept]

        inputs = Tensor(normal(1, 4, 8, 8)), Tensor(np.float32([7])), Tensor(normal(1, 5, 24))
        first, unet = learner(0)
        for seed, own in enumerate(first.parameters):
            own.set_data(Tensor(own.asnumpy() + 0.1 * normal(*own.shape, seed=seed)))
        expected = unet(*inputs).asnumpy()
        folder = save_checkpoint(tmp_path, 1, state(first), "", lambda folder, step: None)
        # Another start, which the checkpoint takes the place of.
        again, unet = learner(1)
        for own in again.kept:
            own.set_data(Tensor(own.asnumpy() * 0))
        restore(open_checkpoint(folder), state(again))
        assert unet(*inputs).asnumpy().tobytes() == expected.tobytes()

    def test_is_counted_exactly(self, name, bundle):
        flags = [word for field, value in RUNS[name].items() for word in (f"--{field}", str(value))]
        config = load(TrainConfig, [*NEEDED, *flags], lambda note: None)
        texts = bundle.load_text_encoders() if config.method.train_text_encoder else None
        own = METHODS["lora"](config.method, bundle, bundle.denoiser.load(), texts, 0)
        work = training_needs._workload(config, bundle, 1)
        assert work.numbers[1] == sum(parameter.size for parameter in own.parameters)


def test_computed_weights_take_memory(bundle):
    of_sd = replace(bundle, denoiser=replace(bundle.denoiser, spec=SD_15_UNET))
    plain, loha = (
        estimate(training_needs._workload(load(TrainConfig, [*NEEDED, "--adapter", kind]), of_sd, 1)).parts[
            "activations"
        ]
        for kind in ("lora", "loha")
    )
    adapted_numbers = sum(math.prod(unet_shapes(SD_15_UNET)[f"{name}.weight"]) for name in updates()["unet"])
    assert loha - plain >= 4 * adapted_numbers
