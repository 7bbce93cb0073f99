"""LoRAs of every format and family go there and back, and what they adapt is known from names and shapes."""

import re

import numpy as np
import pytest

from dreambooth_ms.adapters.adapter import Adapter, folded
from dreambooth_ms.adapters.file import open_adapter
from dreambooth_ms.adapters.formulas import Update
from dreambooth_ms.adapters.writing import file_tensors
from dreambooth_ms.errors import WeightError
from dreambooth_ms.formats.files.open import write_tensors
from dreambooth_ms.formats.naming.formats import Format, naming_of
from dreambooth_ms.formats.naming.lora_formats import (
    ALPHA,
    DOWN,
    UP,
    LoraFormat,
    lora_format,
    lora_layers,
    lora_slots,
    read_plan,
    recognise_lora,
    write_plan,
)
from dreambooth_ms.formats.naming.recognise import other_kind
from dreambooth_ms.models.parameter_shapes import model_shapes
from dreambooth_ms.models.specs import PUBLISHED_MODELS, SD_15, SD_21, SDXL_BASE
from tests.parity.reference import normal
from tests.small_specs import PUBLISHED, SMALL
from tests.stored_tensors import written_shapes
from tests.whole_loras import factor_shapes, lora_update

FORMATS = list(LoraFormat)
LIBRARIES = {
    LoraFormat.DIFFUSERS_PEFT: LoraFormat.DIFFUSERS,
    LoraFormat.DIFFUSERS_PROCESSORS: LoraFormat.DIFFUSERS,
    LoraFormat.KOHYA_DIFFUSERS: LoraFormat.KOHYA,
}
"""The formats that are read as another of their library."""
TEXT = ("text_encoder", "text_encoder_2")
Q = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_q"
K = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"


def parts_of(form, model):
    """For each file that a LoRA of all parts makes, its parts: PEFT makes one per part."""
    parts = ("unet", *(part for part in TEXT if getattr(model, part)))
    return [(part,) for part in parts] if form is LoraFormat.PEFT else [parts]


def adaptable(form, model, parts):
    slots = lora_slots(form, lora_layers(model, parts), model)
    return [layer for layer in lora_layers(model, parts) if f"{layer}.{UP}" in slots]


def factor_shapes_of(model):
    """The shapes of all factors of rank 1, by their public names."""
    shapes = {}
    for layer, weight in lora_layers(model).items():
        down, up = factor_shapes(weight, 1)
        shapes |= {f"{layer}.{DOWN}": down, f"{layer}.{UP}": up, f"{layer}.{ALPHA}": ()}
    return shapes


def random_factors(model, layers, rank=2, alpha=None, dtype=np.float32):
    weights = lora_layers(model)
    factors = {}
    for seed, layer in enumerate(layers):
        down, up = factor_shapes(weights[layer], rank)
        factors[layer] = lora_update(
            normal(*down, seed=2 * seed).astype(dtype), normal(*up, seed=2 * seed + 1).astype(dtype), alpha
        )
    return factors


def read_back(form, model, file, parts=None):
    plan = read_plan(form, model, {name: tensor.shape for name, tensor in file.items()}, parts)
    assert plan.report.fits, plan.report.summary()
    return {layer: Update(own) for layer, own in plan.read(file.__getitem__).items()}


def named(form, model, factors):
    """The tensors of a file."""
    return file_tensors(Adapter.of(factors), form, model)


def update(layer):
    """alpha / r * B A, as a matrix."""
    rank = layer.rank
    return (layer.alpha or rank) / rank * layer.up.reshape(-1, rank) @ layer.down.reshape(rank, -1)


def notes(stored, folder):
    """What is said of a file with such names and shapes."""
    write_tensors(folder / "x.safetensors", {name: np.zeros(shape, np.float32) for name, shape in stored.items()})
    return open_adapter(folder / "x.safetensors").notes


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.value)
@pytest.mark.parametrize("family", PUBLISHED)
class TestNames:
    def test_every_layer_has_a_name_of_its_own_and_comes_back_from_it(self, family, form):
        model = PUBLISHED[family]
        for parts in parts_of(form, model):
            layers = adaptable(form, model, parts)
            written = write_plan(form, model, dict.fromkeys(layers, (DOWN, UP, ALPHA)))
            common = [assembly.pieces[0] for assembly in written.tensors.values() if assembly.shared]
            assert not common or form is LoraFormat.MINDONE
            assert all(".self_attn.q_proj." in piece for piece in common)
            stored = written_shapes(written, factor_shapes_of(model))
            plan = read_plan(form, model, stored, parts)
            assert plan.report.fits
            assert list(plan.layers) == layers
            assert lora_format(stored) is LIBRARIES.get(form, form)

    def test_a_lora_of_attention_is_recognised(self, family, form):
        model = PUBLISHED[family]
        layers = [layer for layer in adaptable(form, model, ("unet",)) if ".attn" in layer]
        stored = written_shapes(
            write_plan(form, model, dict.fromkeys(layers, (DOWN, UP, ALPHA))), factor_shapes_of(model)
        )
        plan = recognise_lora(stored, "a file")
        assert plan.models == (model,)
        assert list(plan.layers) == layers
        assert {stored[slots[DOWN].name][0] for slots in plan.layers.values()} == {1}


@pytest.mark.parametrize("dtype", [np.float32, np.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.value)
@pytest.mark.parametrize("family", SMALL)
def test_factors_come_back_bit_by_bit(family, form, dtype):
    """mindone's SD format keeps q, k and v of the text tower as one layer: there the updates come back."""
    model = SMALL[family]
    for parts in parts_of(form, model):
        factors = random_factors(model, adaptable(form, model, parts), alpha=2.0, dtype=dtype)
        found = read_back(form, model, named(form, model, factors), parts)
        assert list(found) == list(factors)
        for name, layer in found.items():
            if layer.rank == factors[name].rank:
                assert layer.down.tobytes() == factors[name].down.tobytes(), name
                assert layer.up.tobytes() == factors[name].up.tobytes(), name
            else:
                assert form is LoraFormat.MINDONE
                assert "self_attn" in name
                assert np.allclose(update(layer), update(factors[name]), rtol=1e-3 if dtype == np.float16 else 1e-6)


class TestAlpha:
    def test_kohyas_files_hold_it(self):
        model, form = SMALL["sd15"], LoraFormat.KOHYA
        file = named(form, model, random_factors(model, [Q, K], alpha=0.5))
        assert file["lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_q.alpha"] == 0.5
        assert {layer.alpha for layer in read_back(form, model, file).values()} == {0.5}
        silent = named(form, model, random_factors(model, [Q, K]))
        assert {layer.alpha for layer in read_back(form, model, silent).values()} == {2}

    @pytest.mark.parametrize("form", [LoraFormat.DIFFUSERS, LoraFormat.PEFT], ids=lambda form: form.value)
    def test_diffusers_and_peft_keep_it_elsewhere(self, form):
        model = SMALL["sd15"]
        file = named(form, model, random_factors(model, [Q], alpha=0.5))
        assert len(file) == 2
        assert read_back(form, model, file, ("unet",))[Q].alpha is None

    def test_for_mindone_it_goes_into_b(self):
        model, form = SMALL["sdxl"], LoraFormat.MINDONE
        factors = random_factors(model, [Q], rank=3, alpha=0.5)
        found = read_back(form, model, named(form, model, factors))[Q]
        assert found.alpha is None
        assert np.array_equal(found.down, factors[Q].down)
        assert np.allclose(update(found), update(factors[Q]), rtol=1e-6)
        assert not np.allclose(found.up, factors[Q].up)

    def test_a_scale_of_one_changes_no_bit(self):
        layer = random_factors(SMALL["sdxl"], [Q], rank=3, alpha=3.0)[Q]
        assert folded(layer).up is layer.up
        assert folded(lora_update(layer.down, layer.up)).alpha == 3.0

    def test_without_it_the_rank_is_assumed_aloud(self, tmp_path):
        model = SD_15
        file = shapes_of(LoraFormat.DIFFUSERS, model, [Q, K], rank=4)
        assert notes(file, tmp_path) == ["no alpha in the file for 2 of 2 layers: it is taken as the rank (4)."]
        with_one = file | {f"{Q}.alpha": ()}
        assert recognise_lora(with_one, "a file").layers[Q][ALPHA].name == f"{Q}.alpha"
        assert notes(with_one, tmp_path)[0].startswith("no alpha in the file for 1 of 2 layers")
        assert notes(shapes_of(LoraFormat.KOHYA, model, [Q, K]), tmp_path) == []

    def test_in_mindones_sd_files_the_scale_is_known(self, tmp_path):
        file = shapes_of(LoraFormat.MINDONE, SD_15, [Q])
        assert "scale of 1" in notes(file, tmp_path)[0]
        xl = "unet.down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_q"
        assert "taken as the rank" in notes(shapes_of(LoraFormat.MINDONE, SDXL_BASE, [xl]), tmp_path)[0]


def shapes_of(form, model, layers, rank=1):
    """Names and shapes of a file that adapts some layers."""
    weights, slots = lora_layers(model), lora_slots(form, layers, model)
    file = {}
    for layer in layers:
        shapes = (*factor_shapes(weights[layer], rank), ())
        for factor, shape in zip(("lora_A.weight", "lora_B.weight", "alpha"), shapes, strict=True):
            slot = slots.get(f"{layer}.{factor}")
            if slot:
                file[slot.name] = slot.stored_shape(shape)
    return file


TEXT_Q = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
CLIP_L = ("clip_l", "text_encoders.clip_l.transformer", "cond_stage_model.transformer")
LDM_Q = "input_blocks.4.1.transformer_blocks.0.attn2.to_q"
KOHYA_Q = Q.removeprefix("unet.").replace(".", "_")
LATE_TEXT_Q = "encoder.layers.0.self_attn.q_proj"
SPELLINGS = [
    # What OneTrainer, ComfyUI and LyCORIS write.
    *(("sd15", Q, f"{prefix}{Q.removeprefix('unet.')}.lora_down.weight") for prefix in ("unet.", "diffusion_model.")),
    *(("sdxl", Q, f"{prefix}{LDM_Q}.lora_down.weight") for prefix in ("unet.", "diffusion_model.")),
    *(("sd15", Q, f"{prefix}diffusion_model.{LDM_Q}.lora_down.weight") for prefix in ("", "model.")),
    *(("sd15", TEXT_Q, f"{prefix}.{TEXT_Q.partition('.')[2]}.lora_down.weight") for prefix in CLIP_L),
    ("sd15", Q, f"lycoris_{KOHYA_Q}.lora_down.weight"),
    # What networks were wrapped in.
    ("sd15", Q, f"unet.base_model.model.{Q.removeprefix('unet.')}.lora_A.weight"),
    ("sd15", Q, f"base_model.model.{Q}.lora_A.weight"),
    ("sd15", Q, f"unet._orig_mod.{Q.removeprefix('unet.')}.lora_A.weight"),
    ("sd15", Q, f"module.{Q}.lora.down.weight"),
    ("sd15", Q, f"unet.module._orig_mod.{Q.removeprefix('unet.')}.lora.down.weight"),
    ("sd15", Q, f"lora_unet__orig_mod_{KOHYA_Q}.lora_down.weight"),
    ("sd15", Q, f"{Q}.lora_A_1.default_0.weight"),
    ("sd15", Q, f"{Q}.lora_A"),
    # transformers 5 has no text_model in its text encoders.
    ("sd15", TEXT_Q, f"text_encoder.{LATE_TEXT_Q}.lora_A.weight"),
    ("sd15", TEXT_Q, f"text_encoder.{LATE_TEXT_Q}.lora_linear_layer.down.weight"),
    ("sd15", TEXT_Q, f"base_model.model.{LATE_TEXT_Q}.lora_A.default.weight"),
    ("sd15", TEXT_Q, f"lora_te_{LATE_TEXT_Q.replace('.', '_')}.lora_down.weight"),
    ("sdxl", TEXT_Q, f"lora_te1_{LATE_TEXT_Q.replace('.', '_')}.lora_down.weight"),
    ("sdxl", TEXT_Q.replace("encoder.", "encoder_2.", 1), f"text_encoder_2.{LATE_TEXT_Q}.lora_A.weight"),
    ("sd15", Q, f"{Q}.lora.down.weight"),
    ("sd15", Q, f"{Q}.lora_A.weight"),
    ("sd15", Q, f"{Q}.lora_A.default.weight"),
    ("sd15", Q, "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.processor.to_q_lora.down.weight"),
    ("sd15", Q, "down_blocks.1.attentions.0.transformer_blocks.0.attn2.processor.to_q_lora.down.weight"),
    (
        "sd15",
        Q.replace("to_q", "to_out.0"),
        "down_blocks.1.attentions.0.transformer_blocks.0.attn2.processor.to_out_lora.down.weight",
    ),
    ("sd15", TEXT_Q, f"{TEXT_Q}.lora_linear_layer.down.weight"),
    ("sd15", TEXT_Q, "text_encoder.text_model.encoder.layers.0.self_attn.to_q_lora.down.weight"),
    ("sd15", Q, f"base_model.model.{Q.removeprefix('unet.')}.lora_A.weight"),
    ("sd15", Q, f"base_model.model.{Q.removeprefix('unet.')}.lora_A.default.weight"),
    ("sd15", Q, "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_q.lora_down.weight"),
    ("sd15", TEXT_Q, "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight"),
    ("sd15", TEXT_Q, "lora_te1_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight"),
    ("sdxl", Q, "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_q.lora_down.weight"),
    ("sdxl", Q, "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_q.lora_down.weight"),
    ("sdxl", TEXT_Q, "lora_te1_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight"),
    (
        "sdxl",
        "text_encoder_2.text_model.encoder.layers.31.mlp.fc1",
        "lora_te2_text_model_encoder_layers_31_mlp_fc1.lora_down.weight",
    ),
    ("sdxl", "unet.down_blocks.1.resnets.0.conv1", "lora_unet_input_blocks_4_0_in_layers_2.lora_down.weight"),
    ("sdxl", Q, "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_q.lora_A.weight"),
    ("sdxl", TEXT_Q, "conditioner.embedders.0.transformer.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight"),
    (
        "sdxl",
        "text_encoder_2.text_model.encoder.layers.3.self_attn.out_proj",
        "conditioner.embedders.1.model.transformer.resblocks.3.attn.out_proj.lora_A.weight",
    ),
    ("sd15", Q, "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_q.lora_down.weight"),
    (
        "sd21",
        "text_encoder.text_model.encoder.layers.3.self_attn.out_proj",
        "cond_stage_model.transformer.transformer_layer.resblocks.3.attn.attn.out_proj.lora_down.weight",
    ),
]


@pytest.mark.parametrize(("family", "layer", "name"), SPELLINGS, ids=[name for *_, name in SPELLINGS])
def test_a_layer_is_found_under_each_of_its_names(family, layer, name):
    model = PUBLISHED[family]
    down, up = factor_shapes(lora_layers(model)[layer], rank=4)
    other = name.replace("down.weight", "up.weight").replace("lora_A", "lora_B")
    alpha = re.sub(r"[._]lora(?:_linear_layer)?[._].*", ".alpha", name)
    plan = recognise_lora({name: down, other: up, alpha: (1, 1)}, "a file", [model])
    assert plan.layers.keys() == {layer}
    assert {factor: slot.name for factor, slot in plan.layers[layer].items()} == {DOWN: name, UP: other, ALPHA: alpha}
    assert plan.layers[layer][DOWN].public_shape(down)[0] == 4


class TestShapes:
    def test_a_1x1_convolution_may_be_adapted_as_a_linear_layer_and_the_other_way(self):
        for model, ones in ((SD_15, ()), (SD_21, (1, 1))):
            layer = "unet.mid_block.attentions.0.proj_in"
            name = "lora_unet_mid_block_attentions_0_proj_in"
            stored = {f"{name}.lora_down.weight": (4, 1280, *ones), f"{name}.lora_up.weight": (1280, 4, *ones)}
            plan = read_plan(LoraFormat.KOHYA, model, stored)
            assert plan.report.fits
            file = {key: normal(*shape) for key, shape in stored.items()}
            factors = plan.read(file.__getitem__)[layer]
            assert (factors[DOWN].shape, factors[UP].shape) == factor_shapes(lora_layers(model)[layer], 4)

    def test_mindones_fused_layer_is_three_with_one_a(self):
        path = "cond_stage_model.transformer.transformer_layer.resblocks.0.attn.attn.in_proj"
        file = {f"{path}.lora_down.weight": normal(4, 768), f"{path}.lora_up.weight": normal(3 * 768, 4, seed=1)}
        factors = read_back(LoraFormat.MINDONE, SD_15, file)
        tower = "text_encoder.text_model.encoder.layers.0.self_attn"
        assert list(factors) == [f"{tower}.{letter}_proj" for letter in "qkv"]
        whole = file[f"{path}.lora_up.weight"] @ file[f"{path}.lora_down.weight"]
        assert np.allclose(np.concatenate([update(layer) for layer in factors.values()]), whole)
        written = named(LoraFormat.MINDONE, SD_15, factors)
        assert written.keys() == file.keys()
        assert all(np.array_equal(written[name], file[name]) for name in file)

    def test_of_a_fused_layer_one_third_can_be_adapted(self):
        model, tower = SMALL["sd15"], "text_encoder.text_model.encoder.layers.0.self_attn"
        factors = random_factors(model, [f"{tower}.k_proj"])
        found = read_back(LoraFormat.MINDONE, model, named(LoraFormat.MINDONE, model, factors))
        assert np.allclose(update(found[f"{tower}.k_proj"]), update(factors[f"{tower}.k_proj"]))
        assert not update(found[f"{tower}.q_proj"]).any()

    @pytest.mark.parametrize(
        ("down", "up"),
        [
            ((4, 641), (640, 4)),
            ((4, 640), (640, 5)),
            ((4, 640), (640,)),
            ((), ()),
            ((0, 640), (640, 0)),
            ((4, 640, 3, 3), (640, 4, 1, 1)),
        ],
    )
    def test_factors_that_do_not_fit_the_layer_are_named(self, down, up):
        report = read_plan(
            LoraFormat.DIFFUSERS, SD_15, {f"{Q}.lora.down.weight": down, f"{Q}.lora.up.weight": up}
        ).report
        assert report.misshaped == (f"{Q}: a weight of (640, 640) has no update by {down} and {up}",)


class TestWhatIsRefused:
    @pytest.mark.parametrize(
        ("name", "said"),
        [
            (f"{Q}.lora_B.bias", "a trained bias"),
            (f"{Q}.lora_B.default.bias", "a trained bias"),
            (f"{Q}.lora_embedding_A", "LoRA of embeddings"),
            (f"base_model.model.{Q.removeprefix('unet.')}.boft_R", "BOFT"),
            (f"base_model.model.{Q.removeprefix('unet.')}.ia3_l", "IA3"),
            (f"base_model.model.{Q.removeprefix('unet.')}.vera_lambda_b", "VeRA"),
            (f"base_model.model.{Q.removeprefix('unet.')}.lora_E", "AdaLoRA"),
            ("lora_unet_mid_block_attentions_0_proj_in.oft_diag", "OFT of another form"),
            ("lora_unet_mid_block_attentions_0_proj_in.a1.weight", "GLoRA"),
            ("lycoris_mid_block_attentions_0_proj_in.b2.weight", "GLoRA"),
            ("lora_unet_mid_block_attentions_0_proj_in.up_list.0", "DyLoRA"),
            ("lora_unet_mid_block_attentions_0_proj_in.lora_A.0", "DyLoRA"),
            ("lora_unet_mid_block_resnets_0_norm1.w_norm", "norms"),
            ("lora_unet_mid_block_resnets_0_norm1.b_norm", "norms"),
            ("lora_unet_mid_block_attentions_0_proj_in.scalar", "a factor besides alpha"),
            ("diffusion_model.middle_block.1.proj_in.set_weight", "weights set anew or reshaped"),
            ("lora_unet_mid_block_attentions_0_proj_in.reshape_weight", "weights set anew or reshaped"),
            ("bundle_emb.dog.clip_l", "embeddings of new words beside it"),
            ("bundle_emb.dog.string_to_param.*", "embeddings of new words beside it"),
        ],
    )
    def test_other_methods_by_their_name(self, name, said):
        for stored in ({name: (1, 1)}, shapes_of(LoraFormat.KOHYA, SD_15, [K]) | {name: (1, 1)}):
            assert other_kind(stored) == "a LoRA"
            with pytest.raises(WeightError, match=f"x.safetensors: trained with {said}.*, which is not supported"):
                recognise_lora(stored, "x.safetensors")

    def test_a_model(self):
        stored = naming_of(Format.STABILITY, SD_15)
        with pytest.raises(WeightError, match="this is a whole model; expected a LoRA"):
            recognise_lora({slot.name: () for slot in stored.slots.values()}, "x.safetensors")

    @pytest.mark.parametrize(
        ("name", "model"),
        [
            ("lora_unet_double_blocks_0_img_attn_proj.lora_down.weight", "Flux"),
            ("transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight", "Flux"),
            ("transformer.transformer_blocks.0.attn.to_q.lora_A.weight", "SD 3 or another diffusion transformer"),
        ],
    )
    def test_a_lora_for_another_kind_of_model(self, name, model):
        with pytest.raises(WeightError, match=f"x.safetensors: this is a LoRA for {model}; expected one for SD 1.x"):
            recognise_lora({name: (4, 3072)}, "x.safetensors")

    def test_half_a_layer_and_a_stranger(self):
        stored = shapes_of(LoraFormat.DIFFUSERS, SD_15, [Q, K]) | {"unet.nowhere.lora.down.weight": (1, 1)}
        del stored[f"{K}.lora.up.weight"]
        with pytest.raises(WeightError) as error:
            recognise_lora(stored, "x.safetensors")
        assert str(error.value) == (
            "x.safetensors does not fit a LoRA of SD 1.x in the naming of diffusers: "
            f"1 missing (unet 1: {K.removeprefix('unet.')}.lora_B.weight); 1 unexpected (unet.nowhere.lora.down.weight)"
        )

    def test_a_layer_under_two_names(self):
        stored = shapes_of(LoraFormat.DIFFUSERS, SD_15, [Q]) | shapes_of(LoraFormat.DIFFUSERS_PEFT, SD_15, [Q])
        report = read_plan(LoraFormat.DIFFUSERS, SD_15, stored).report
        assert report.duplicate[0] == f"{Q}.lora_A.weight: {Q}.lora.down.weight and {Q}.lora_A.weight"

    def test_layers_that_the_format_has_no_place_for(self):
        layer = "text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj"
        with pytest.raises(WeightError, match=f"the naming of mindone has no place for 1 of 1 layer .{layer}."):
            named(LoraFormat.MINDONE, SMALL["sdxl"], random_factors(SMALL["sdxl"], [layer]))
        with pytest.raises(WeightError, match=r"no place for 1 of 1 layer \(unet\.conv_in\)"):
            write_plan(LoraFormat.DIFFUSERS_PROCESSORS, SD_15, {"unet.conv_in": (DOWN, UP)})


class TestFamilies:
    def test_what_several_models_have_in_common_fits_each(self):
        own_attention = Q.replace("attn2", "attn1")
        stored = shapes_of(LoraFormat.DIFFUSERS, SD_15, [own_attention])
        assert recognise_lora(stored, "a file").models == (SD_15, SD_21, SDXL_BASE)

    def test_the_width_of_the_text_tells_them_apart(self):
        for model in (SD_15, SD_21, SDXL_BASE):
            for form in (LoraFormat.DIFFUSERS, LoraFormat.KOHYA_DIFFUSERS):
                assert recognise_lora(shapes_of(form, model, [K]), "a file").models == (model,)

    def test_a_file_for_none_is_compared_with_the_nearest(self):
        stored = shapes_of(LoraFormat.KOHYA, SMALL["sdxl"], [K])
        with pytest.raises(WeightError, match=r"does not fit a LoRA of .* in the naming of kohya: 1 of another shape"):
            recognise_lora(stored, "x.safetensors")
        assert recognise_lora(stored, "a file", [*PUBLISHED_MODELS, SMALL["sdxl"]]).models == (SMALL["sdxl"],)

    def test_another_family_is_named_only_where_all_of_it_fits(self):
        stored = shapes_of(LoraFormat.KOHYA, SDXL_BASE, [K, Q], rank=4)
        with pytest.raises(WeightError, match=r"this is a LoRA for SDXL base; expected one for SD 1\.x"):
            recognise_lora(stored, "x.safetensors", [SD_15])
        name = next(iter(stored))
        with pytest.raises(WeightError, match=r"does not fit a LoRA of SD 1\.x in .* of another shape"):
            recognise_lora(stored | {name: (4, 7)}, "x.safetensors", [SD_15])
        # SD 2.x has the same names.
        published = shapes_of(LoraFormat.DIFFUSERS, SD_15, [K, Q], rank=4)
        with pytest.raises(WeightError, match=r"a LoRA of SD 1\.x in the naming of diffusers: 2 of another shape"):
            recognise_lora(published, "x.safetensors", [SMALL["sd15"]])

    def test_one_damaged_layer_is_named(self):
        stored = shapes_of(LoraFormat.KOHYA, SD_15, lora_layers(SD_15), rank=4)
        name = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k.lora_up.weight"
        with pytest.raises(WeightError) as error:
            recognise_lora(stored | {name: (640, 5)}, "x.safetensors", otherwise="do this")
        assert str(error.value) == (
            "x.safetensors does not fit a LoRA of SD 1.x in the naming of kohya: 1 of another shape (unet 1: "
            f"{K.removeprefix('unet.')}: a weight of (640, 768) has no update by (4, 768) and (640, 5) and ()); do this"
        )

    def test_peft_names_no_part_but_the_layers_tell(self):
        for part, layer in (("unet", Q), ("text_encoder", TEXT_Q)):
            stored = shapes_of(LoraFormat.PEFT, SD_15, [layer])
            assert [name.partition(".")[0] for name in recognise_lora(stored, "a file").layers] == [part]
        second = "text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj"
        plan = recognise_lora(shapes_of(LoraFormat.PEFT, SDXL_BASE, [second]), "a file")
        assert list(plan.layers) == [second]


def test_mindone_may_save_the_adapted_layers_weights_besides():
    stored = shapes_of(LoraFormat.MINDONE, SD_15, [Q])
    path = "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_q"
    plan = recognise_lora(stored | {f"{path}.linear.weight": (640, 640)}, "a file")
    assert list(plan.layers) == [Q]


def test_mindones_sdxl_lora_has_1120_tensors():
    """Rank 4 in q, k, v and out of every attention, as the example trains it."""
    model = SDXL_BASE
    attention = ("to_q", "to_k", "to_v", "to_out.0")
    layers = [layer for layer in lora_layers(model, ("unet",)) if layer.endswith(attention)]
    stored = shapes_of(LoraFormat.MINDONE, model, layers, rank=4)
    assert len(stored) == 1120
    path = "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k"
    assert (stored[f"{path}.lora_A.weight"], stored[f"{path}.lora_B.weight"]) == ((4, 2048), (640, 4))


def test_layers_are_those_with_a_matrix_or_kernel_and_no_embedding():
    layers = lora_layers(SD_15)
    assert len(layers) == 282 + 72
    assert not any("norm" in layer or ("embedding." in f"{layer}." and "time" not in layer) for layer in layers)
    assert all(model_shapes(SD_15)[f"{layer}.weight"] == shape for layer, shape in layers.items())
    assert ALPHA not in layers
