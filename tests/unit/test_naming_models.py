"""Every parameter of every family goes into every format of models and comes back, name, shape and bits."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dreambooth_ms.formats.naming.formats import LOGIT_SCALE, Format, naming_of
from dreambooth_ms.formats.naming.plan import Assembly, Layout, Slot, found_slot
from dreambooth_ms.formats.naming.recognise import infer_model
from dreambooth_ms.models.parameter_shapes import model_shapes
from dreambooth_ms.models.specs import SD_15, VaeSpec
from tests.small_specs import PUBLISHED, SMALL
from tests.stored_tensors import written_shapes

FORMATS = list(Format)
DTYPES = [np.float32, np.float16, np.uint16]


def random_bits(shape, dtype, rng):
    """Any bits at all, not-a-number and bfloat16's patterns included."""
    size = np.dtype(dtype).itemsize
    return rng.integers(0, 256, (*shape, size), dtype=np.uint8).view(dtype).reshape(shape)


def stored_shapes(naming, names):
    return written_shapes(naming.write_plan(names), naming.shapes)


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.value)
@pytest.mark.parametrize("family", PUBLISHED)
class TestPublishedModels:
    def test_every_name_has_one_place_and_comes_back_from_it(self, family, form):
        naming = naming_of(form, PUBLISHED[family])
        written = naming.write_plan(list(naming.shapes))
        assert written.report.fits
        assert not written.left_out
        assert Counter(piece for assembly in written.tensors.values() for piece in assembly.pieces) == Counter(
            dict.fromkeys(naming.shapes, 1)
        )
        read = naming.read_plan(stored_shapes(naming, list(naming.shapes)))
        assert read.report.fits
        assert read.slots == naming.slots
        assert not read.ignored

    def test_the_public_names_alone_are_whole(self, family, form):
        model = PUBLISHED[family]
        naming = naming_of(form, model)
        assert naming.required() == list(model_shapes(model))
        written = naming.write_plan(list(model_shapes(model)))
        assert written.report.fits
        assert naming.read_plan(stored_shapes(naming, list(model_shapes(model)))).report.fits


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.value)
@pytest.mark.parametrize("family", SMALL)
def test_values_come_back_bit_by_bit(family, form, dtype):
    naming = naming_of(form, SMALL[family])
    rng = np.random.default_rng(0)
    values = {name: random_bits(shape, dtype, rng) for name, shape in naming.shapes.items()}
    file = {
        stored: assembly.build([values[piece] for piece in assembly.pieces])
        for stored, assembly in naming.write_plan(list(values)).tensors.items()
    }
    read = naming.read_plan({name: tensor.shape for name, tensor in file.items()})
    assert read.slots.keys() == values.keys()
    for name, slot in read.slots.items():
        restored = slot.restore(file[slot.name])
        assert restored.dtype == dtype
        assert restored.shape == values[name].shape
        assert restored.tobytes() == values[name].tobytes(), name


@st.composite
def models(draw):
    """Models of any structure: none that was published."""
    family = draw(st.sampled_from(sorted(PUBLISHED)))
    model = SMALL[family]
    levels = draw(st.integers(1, 4))
    unet = replace(
        model.unet,
        block_out_channels=tuple(draw(st.lists(st.integers(1, 5), min_size=levels, max_size=levels))),
        has_attention=tuple(draw(st.lists(st.booleans(), min_size=levels, max_size=levels))),
        num_heads=(1,) * levels,
        layers_per_block=draw(st.integers(1, 3)),
        transformer_layers_per_block=draw(st.integers(1, 3)),
        cross_attention_dim=draw(st.integers(1, 5)),
        in_channels=draw(st.sampled_from([4, 9])),
    )
    channels = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    vae = VaeSpec(block_out_channels=tuple(channels), layers_per_block=draw(st.integers(1, 3)))
    return replace(model, unet=unet, vae=vae)


@settings(max_examples=60, deadline=None)
@given(model=models(), form=st.sampled_from(FORMATS))
def test_models_of_any_structure_come_back_and_are_recognised(model, form):
    naming = naming_of(form, model)
    assert len({(slot.name, slot.block) for slot in naming.slots.values()}) == len(naming.slots)
    stored = stored_shapes(naming, list(naming.shapes))
    read = naming.read_plan(stored)
    assert read.report.fits
    assert read.slots == naming.slots
    assert model_shapes(infer_model(stored, form, model.family)) == model_shapes(model)


# Format, family and a public name and its name in the format, a line each.
NAMES = """
STABILITY sd15 unet.up_blocks.0.upsamplers.0.conv.bias
    model.diffusion_model.output_blocks.2.1.conv.bias
STABILITY sd15 unet.up_blocks.1.upsamplers.0.conv.bias
    model.diffusion_model.output_blocks.5.2.conv.bias
STABILITY sd15 unet.down_blocks.2.downsamplers.0.conv.bias
    model.diffusion_model.input_blocks.9.0.op.bias
STABILITY sd15 unet.mid_block.resnets.1.time_emb_proj.bias
    model.diffusion_model.middle_block.2.emb_layers.1.bias
STABILITY sd15 vae.decoder.up_blocks.0.resnets.2.conv1.bias
    first_stage_model.decoder.up.3.block.2.conv1.bias
STABILITY sd15 vae.encoder.down_blocks.1.resnets.0.conv_shortcut.bias
    first_stage_model.encoder.down.1.block.0.nin_shortcut.bias
STABILITY sd15 text_encoder.text_model.final_layer_norm.bias
    cond_stage_model.transformer.text_model.final_layer_norm.bias
STABILITY sd21 text_encoder.text_model.final_layer_norm.bias
    cond_stage_model.model.ln_final.bias
STABILITY sdxl unet.add_embedding.linear_2.bias
    model.diffusion_model.label_emb.0.2.bias
STABILITY sdxl unet.up_blocks.0.upsamplers.0.conv.bias
    model.diffusion_model.output_blocks.2.2.conv.bias
STABILITY sdxl text_encoder_2.text_model.embeddings.position_embedding.weight
    conditioner.embedders.1.model.positional_embedding
STABILITY refiner text_encoder_2.text_model.encoder.layers.7.mlp.fc1.bias
    conditioner.embedders.0.model.transformer.resblocks.7.mlp.c_fc.bias
MINDONE sdxl unet.conv_norm_out.weight
    model.diffusion_model.out.0.gamma
MINDONE sdxl unet.conv_out.weight
    model.diffusion_model.out.2.weight
MINDONE sdxl text_encoder.text_model.embeddings.position_embedding.weight
    conditioner.embedders.0.transformer.text_model.embeddings.position_embedding.embedding_table
MINDONE sdxl text_encoder_2.text_model.embeddings.token_embedding.weight
    conditioner.embedders.1.model.token_embedding.embedding_table
MINDONE sdxl text_encoder_2.text_model.final_layer_norm.bias
    conditioner.embedders.1.model.ln_final.beta
MINDONE sdxl text_encoder_2.logit_scale
    conditioner.embedders.1.model.logit_scale
MINDONE sd15 unet.down_blocks.0.resnets.0.conv2.weight
    model.diffusion_model.input_blocks.1.0.out_layers_conv.conv.weight
MINDONE sd15 unet.down_blocks.0.attentions.0.proj_in.weight
    model.diffusion_model.input_blocks.1.1.proj_in.weight
"""


class TestNames:
    @pytest.mark.parametrize(
        ("form", "family", "public", "stored"), np.array(NAMES.split()).reshape(-1, 4).tolist(), ids=NAMES.split()[3::4]
    )
    def test_of_some_parameters(self, form, family, public, stored):
        assert naming_of(Format[form], PUBLISHED[family]).slots[public] == Slot(stored)

    def test_q_k_and_v_are_one_matrix_in_openclip(self):
        slots = naming_of(Format.STABILITY, PUBLISHED["sdxl"]).slots
        layer = "text_encoder_2.text_model.encoder.layers.3.self_attn"
        stored = "conditioner.embedders.1.model.transformer.resblocks.3.attn.in_proj_weight"
        places = [slots[f"{layer}.{letter}_proj.weight"] for letter in "qkv"]
        assert places == [Slot(stored, block=block, blocks=3) for block in range(3)]

    def test_the_text_projection_is_transposed_in_openclip(self):
        slot = naming_of(Format.STABILITY, PUBLISHED["sdxl"]).slots["text_encoder_2.text_projection.weight"]
        assert slot == Slot("conditioner.embedders.1.model.text_projection", Layout.TRANSPOSED)


class TestSlots:
    def test_layouts_undo_each_other(self):
        value = np.arange(6, dtype=np.float32).reshape(2, 3)
        for layout in (Layout.AS_IS, Layout.TRANSPOSED, Layout.CONVOLUTION):
            stored = layout.store(value)
            assert stored.shape == layout.stored_shape(value.shape)
            assert np.array_equal(layout.inverse.store(stored), value)
        assert Layout.TRANSPOSED.store(value)[2, 1] == value[1, 2]
        assert Layout.LINEAR.store(value[..., None, None]).tolist() == value.tolist()

    def test_blocks_of_rows_are_cut_out_and_put_together(self):
        values = [np.full((2, 3), i) for i in range(3)]
        whole = Assembly(("q", "k", "v")).build(values)
        assert whole.shape == Assembly(("q", "k", "v")).shape([(2, 3)] * 3) == (6, 3)
        for i, value in enumerate(values):
            slot = Slot("in_proj", block=i, blocks=3)
            assert np.array_equal(slot.restore(whole), value)
            assert slot.stored_shape((2, 3)) == (6, 3)
            assert slot.public_shape((6, 3)) == (2, 3)

    @pytest.mark.parametrize(
        ("layout", "shape", "stored", "found"),
        [
            (Layout.CONVOLUTION, (8, 8), (8, 8), Layout.AS_IS),
            (Layout.AS_IS, (8, 8), (8, 8, 1, 1), Layout.CONVOLUTION),
            (Layout.AS_IS, (8, 4, 1, 1), (8, 4), Layout.LINEAR),
            (Layout.AS_IS, (8, 4, 3, 3), (8, 4), None),
            (Layout.AS_IS, (8, 4), (4, 8), None),
            (Layout.TRANSPOSED, (8, 4), (8, 4), None),
            (Layout.AS_IS, (8,), (8, 1, 1), None),
            (Layout.AS_IS, (), (1,), None),
        ],
    )
    def test_a_layer_may_be_kept_as_linear_or_as_convolution(self, layout, shape, stored, found):
        slot = found_slot(Slot("name", layout), shape, stored)
        assert slot == (Slot("name", found) if found else None)


class TestBesidesTheWeights:
    def test_schedules_and_position_ids_are_ignored(self):
        naming = naming_of(Format.STABILITY, SD_15)
        stored = stored_shapes(naming, list(naming.shapes)) | {
            "betas": (1000,),
            "sqrt_recipm1_alphas_cumprod": (1000,),
            "model_ema.decay": (),
            "cond_stage_model.transformer.text_model.embeddings.position_ids": (1, 77),
        }
        read = naming.read_plan(stored)
        assert read.report.fits
        assert len(read.ignored) == 4

    @pytest.mark.parametrize(
        ("form", "prefix"),
        [(Format.STABILITY, "model_ema.diffusion_modelinput_blocks00"), (Format.MINDONE, "ema.model.diffusion_model.")],
    )
    def test_averages_are_listed_and_taken_on_request(self, form, prefix):
        naming = naming_of(form, SD_15)
        weights = stored_shapes(naming, list(naming.shapes))
        averages = {slot.name: naming.shapes[name] for name, slot in naming.averages.items()}
        assert len(averages) == 686
        assert any(name.startswith(prefix) for name in averages)
        stored = weights | averages
        read = naming.read_plan(stored)
        assert read.report.fits
        assert set(read.averages) == averages.keys() == set(read.ignored)
        assert read.slots == naming.slots
        averaged = naming.read_plan(stored, averages=True)
        assert averaged.report.fits
        assert averaged.slots == {**naming.slots, **naming.averages}

    def test_weights_without_averages_are_read_themselves(self):
        """A file of weights alone is refused where averages are asked for, by `open_model`."""
        naming = naming_of(Format.STABILITY, SD_15)
        read = naming.read_plan(stored_shapes(naming, list(naming.shapes)), averages=True)
        assert read.averages == ()
        assert read.report.fits

    def test_the_temperature_is_written_unless_the_source_has_one(self):
        model = PUBLISHED["sdxl"]
        for form in (Format.STABILITY, Format.MINDONE):
            naming = naming_of(form, model)
            name = "conditioner.embedders.1.model.logit_scale"
            assert naming.write_plan(list(model_shapes(model))).constants == {name: LOGIT_SCALE}
            whole = naming.write_plan(list(naming.shapes))
            assert not whole.constants
            assert name in whole.tensors
            without = [public for public in model_shapes(model) if not public.startswith("text_encoder_2.")]
            assert not naming.write_plan(without).constants
        assert not naming_of(Format.DIFFUSERS, model).constants

    def test_what_sd2_does_not_use_is_kept_between_single_files_and_left_out_elsewhere(self):
        model = PUBLISHED["sd21"]
        single = naming_of(Format.STABILITY, model)
        unused = single.optional
        assert len(unused) == 16 + 2
        assert "text_encoder.text_model.encoder.layers.23.mlp.fc2.bias" in unused
        for form in (Format.DIFFUSERS, Format.MINDONE):
            assert set(naming_of(form, model).write_plan(list(single.shapes)).left_out) == unused

    def test_a_part_of_a_fused_matrix_is_not_written(self):
        naming = naming_of(Format.STABILITY, SMALL["sd21"])
        lost = "text_encoder.text_model.encoder.layers.0.self_attn.k_proj.weight"
        plan = naming.write_plan([name for name in naming.shapes if name != lost])
        assert plan.report.missing == (lost,)
        assert "cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight" not in plan.tensors
        assert set(plan.left_out) == {lost.replace("k_proj", "q_proj"), lost.replace("k_proj", "v_proj")}


class TestSpellings:
    def test_text_towers_without_their_first_level_are_read(self):
        naming = naming_of(Format.STABILITY, SD_15)
        stored = {
            name.replace("cond_stage_model.transformer.text_model.", "cond_stage_model.transformer."): shape
            for name, shape in stored_shapes(naming, list(naming.shapes)).items()
        }
        assert "cond_stage_model.transformer.embeddings.token_embedding.weight" in stored
        assert naming.read_plan(stored).report.fits

    @pytest.mark.parametrize("ones", [(), (1, 1)], ids=["linear", "convolution"])
    def test_the_old_names_of_the_autoencoders_attention_are_read(self, ones):
        naming = naming_of(Format.DIFFUSERS, SD_15)
        old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
        stored = {}
        for name, shape in stored_shapes(naming, list(naming.shapes)).items():
            layer, _, parameter = name.rpartition(".")
            for new, before in old.items():
                if name.startswith("vae.") and layer.endswith(new):
                    name = f"{layer.removesuffix(new)}{before}.{parameter}"
                    shape = (*shape, *ones) if parameter == "weight" else shape
            stored[name] = shape
        assert "vae.encoder.mid_block.attentions.0.proj_attn.weight" in stored
        read = naming.read_plan(stored)
        assert read.report.fits
        slot = read.slots["vae.decoder.mid_block.attentions.0.to_out.0.weight"]
        assert slot.public_shape(stored[slot.name]) == (512, 512)

    def test_wrappers_that_mindone_inserted_are_read_over(self):
        naming = naming_of(Format.MINDONE, SD_15)
        stored = {
            name.replace(".in_layers_conv", "._backbone.in_layers_conv")
            .replace(".to_q.weight", ".to_q.linear.weight")
            .replace(".to_out.0.", ".to_out.0.linear."): shape
            for name, shape in stored_shapes(naming, list(naming.shapes)).items()
        }
        read = naming.read_plan(stored)
        assert read.report.fits
        assert read.slots["unet.down_blocks.0.resnets.0.conv1.bias"].name in stored
