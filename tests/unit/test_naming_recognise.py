"""A file's names and shapes show what it is, and what does not fit is said in one line."""

import re
from dataclasses import replace

import pytest

from dreambooth_ms.errors import WeightError
from dreambooth_ms.formats.naming.formats import Format, naming_of
from dreambooth_ms.formats.naming.plan import Report
from dreambooth_ms.formats.naming.recognise import other_kind, recognise_model, recognise_vae, with_channels
from dreambooth_ms.models.parameter_shapes import model_shapes, vae_shapes
from dreambooth_ms.models.specs import PUBLISHED_MODELS, SD_15, SD_21, SDXL_BASE, SDXL_REFINER, Family
from tests.small_specs import PUBLISHED, SMALL
from tests.stored_tensors import written_shapes


def file_of(form, model, parts=("unet", "vae", "text_encoder", "text_encoder_2")):
    """Names and shapes of a file with some parts of a model."""
    naming = naming_of(form, model)
    plan = naming.write_plan([name for name in naming.shapes if name.partition(".")[0] in parts])
    return written_shapes(plan, naming.shapes)


@pytest.mark.parametrize("form", list(Format), ids=lambda form: form.value)
class TestFamilies:
    @pytest.mark.parametrize("family", PUBLISHED)
    def test_a_published_model_is_recognised(self, family, form):
        recognition = recognise_model(file_of(form, PUBLISHED[family]), "a file")
        assert (recognition.form, recognition.model) == (form, PUBLISHED[family])
        assert recognition.model in PUBLISHED_MODELS

    @pytest.mark.parametrize("family", SMALL)
    def test_a_model_of_other_sizes_is_recognised_with_its_sizes(self, family, form):
        recognition = recognise_model(file_of(form, SMALL[family]), "a file")
        assert (recognition.form, recognition.model.family) == (form, SMALL[family].family)
        assert model_shapes(recognition.model) == model_shapes(SMALL[family])
        assert with_channels(recognition.model, 4, 4) not in PUBLISHED_MODELS
        assert any("heads and norm groups are assumed" in note for note in recognition.notes)

    @pytest.mark.parametrize("family", PUBLISHED)
    def test_the_unet_alone_tells_the_family(self, family, form):
        stored = file_of(form, PUBLISHED[family], parts=("unet",))
        recognition = recognise_model(stored, "a file")
        assert recognition.model == PUBLISHED[family]
        assert recognition.naming.present_parts(stored) == ["unet"]

    def test_inpainting_is_noted(self, form):
        recognition = recognise_model(file_of(form, with_channels(SD_15, 9, 4)), "a file")
        assert recognition.model == with_channels(SD_15, 9, 4)
        assert recognition.notes == ("Its UNet takes 9 channels: a model for inpainting.",)


class TestPredictionType:
    def test_of_sd2_it_cannot_be_told_by_names(self):
        recognition = recognise_model(file_of(Format.STABILITY, SD_21), "a file")
        assert recognition.prediction_type is None
        assert "noise (512 px) or velocity (768 px)" in recognition.notes[0]

    @pytest.mark.parametrize("model", [SD_15, SDXL_BASE, SDXL_REFINER], ids=["sd15", "sdxl", "refiner"])
    def test_others_predict_noise_unless_a_mark_says_velocity(self, model):
        stored = file_of(Format.STABILITY, model)
        assert recognise_model(stored, "a file").prediction_type == "epsilon"
        marked = stored | {"v_pred": (0,), "ztsnr": (0,)}
        recognition = recognise_model(marked, "a file")
        assert recognition.prediction_type == "v_prediction"
        assert recognition.naming.read_plan(marked).report.fits

    def test_playground_has_latents_of_its_own(self):
        stored = file_of(Format.STABILITY, SDXL_BASE) | {"edm_mean": (1, 4, 1, 1), "edm_std": (1, 4, 1, 1)}
        recognition = recognise_model(stored, "a file")
        assert recognition.prediction_type is None
        assert "Playground v2.5" in recognition.notes[0]
        assert recognition.naming.read_plan(stored).report.fits


OTHERS = {
    "a CosXL model, trained with the noise of EDM": ["edm_vpred.sigma_max", "model.diffusion_model.out.0.weight"],
    "a LoRA": ["lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight"],
    "an SD 3 model": ["model.diffusion_model.joint_blocks.0.context_block.adaLN_modulation.1.bias"],
    "a Flux model": ["double_blocks.0.img_attn.norm.key_norm.scale", "guidance_in.in_layer.bias"],
    "a ControlNet": ["control_model.input_blocks.0.0.weight"],
    "a T2I-Adapter": ["adapter.body.0.resnets.0.block1.weight"],
    "an IP-Adapter": ["image_proj.proj.weight", "ip_adapter.1.to_k_ip.weight"],
    "an AnimateDiff motion module": ["down_blocks.0.motion_modules.0.temporal_transformer.norm.bias"],
    "a textual inversion embedding": ["emb_params"],
    "an upscaler": ["model.diffusion_model.label_emb.weight", "model.diffusion_model.out.0.weight"],
    "a diffusion transformer": ["blocks.0.scale_shift_table"],
    "a model with another UNet": ["model.diffusion_model.x.weight", "first_stage_model.encoder.conv_in.weight"],
    "a model without its UNet": ["cond_stage_model.x.weight", "first_stage_model.encoder.conv_in.weight"],
    "a text encoder alone": ["embeddings.token_embedding.weight"],
    "an autoencoder alone": ["encoder.conv_in.weight", "decoder.conv_in.weight"],
    "a UNet alone, in diffusers' naming without its folder": ["down_blocks.0.resnets.0.norm1.weight", "conv_in.weight"],
    "a UNet alone, in LDM naming without its prefix": ["input_blocks.0.0.weight"],
    "of an unknown kind (it holds a, b)": ["b", "a"],
    "of an unknown kind (it holds nothing)": [],
}


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.", "base_model.model.", "module._orig_mod."])
@pytest.mark.parametrize("form", list(Format), ids=lambda form: form.value)
def test_what_networks_were_wrapped_in_is_taken_off(form, wrapper):
    model = SMALL["sdxl"]
    for place in (r"^", r"(?<=^unet\.)|(?<=^vae\.)|(?<=^text_encoder\.)|(?<=^text_encoder_2\.)"):
        stored = {re.sub(place, wrapper, name): shape for name, shape in file_of(form, model).items()}
        recognition = recognise_model(stored, "a file")
        assert (recognition.form, model_shapes(recognition.model)) == (form, model_shapes(model))
        plan = recognition.naming.read_plan(stored)
        assert plan.report.fits, plan.report.summary()
        assert {slot.name for slot in plan.slots.values()} <= stored.keys()
        assert other_kind(stored) == "a whole model"


def test_text_encoders_without_text_model_are_read():
    """As transformers 5 saves them."""
    whole = file_of(Format.DIFFUSERS, SMALL["sd15"])
    stored = {name.replace("text_encoder.text_model.", "text_encoder."): shape for name, shape in whole.items()}
    assert stored.keys() != whole.keys()
    recognition = recognise_model(stored, "a file")
    assert model_shapes(recognition.model) == model_shapes(SMALL["sd15"])
    assert recognition.naming.read_plan(stored).report.fits


@pytest.mark.parametrize(
    ("form", "mark"),
    [
        (Format.DIFFUSERS, "unet.conv_in.weight"),
        (Format.STABILITY, "model.diffusion_model.out.0.weight"),
        (Format.MINDONE, "model.diffusion_model.out.0.gamma"),
    ],
)
def test_a_model_that_lacks_a_tensor_is_a_model_that_lacks_a_tensor(form, mark):
    stored = file_of(form, SD_15)
    del stored[mark]
    recognition = recognise_model(stored, "a file")
    report = recognition.naming.read_plan(stored).report
    assert len(report.missing) == report.count == 1


@pytest.mark.parametrize("kind", OTHERS)
def test_other_files_are_refused_by_their_kind(kind):
    stored = dict.fromkeys(OTHERS[kind], (1,))
    with pytest.raises(WeightError, match=re.escape(f"x.safetensors: this is {kind}; expected a model of SD 1.x")):
        recognise_model(stored, "x.safetensors")


def test_a_model_is_a_model_whatever_else_it_holds():
    assert other_kind(file_of(Format.MINDONE, SD_15)) == "a whole model"


class TestAutoencoderAlone:
    @pytest.mark.parametrize("form", [Format.DIFFUSERS, Format.STABILITY], ids=["diffusers", "ldm"])
    def test_it_is_recognised_under_both_names(self, form):
        for spec in (SD_15.vae, SMALL["sd15"].vae):
            prefix = "vae." if form is Format.DIFFUSERS else "first_stage_model."
            whole = file_of(form, replace(SD_15, vae=spec), parts=("vae",))
            stored = {name.removeprefix(prefix): shape for name, shape in whole.items()}
            found = recognise_vae(stored | {"model_ema.decay": (), "loss.logvar": ()}, "a file")
            assert vae_shapes(found.model.vae) == vae_shapes(spec)
            assert found.naming.read_plan(stored, ("vae",)).report.fits
            assert len(stored) == 248

    def test_anything_else_is_refused_by_its_kind(self):
        with pytest.raises(WeightError, match=r"this is a whole model; expected an autoencoder"):
            recognise_vae(file_of(Format.STABILITY, SD_15), "a file")


class TestReports:
    def test_everything_that_does_not_fit_is_in_one_line(self):
        stored = file_of(Format.STABILITY, SD_15)
        del stored["first_stage_model.quant_conv.bias"], stored["model.diffusion_model.out.2.bias"]
        stored["model.diffusion_model.out.0.weight"] = (321,)
        stored["a.stranger"] = (1,)
        stored["cond_stage_model.transformer.final_layer_norm.bias"] = (768,)
        report = naming_of(Format.STABILITY, SD_15).read_plan(stored).report
        assert not report.fits
        assert report.count == 5
        assert report.summary() == (
            "2 missing (unet 1: conv_out.bias; vae 1: quant_conv.bias); 1 unexpected (a.stranger); "
            "1 of another shape (unet 1: conv_norm_out.weight: expected (320,), got (321,)); "
            "1 there more than once (text_encoder 1: text_model.final_layer_norm.bias: "
            "cond_stage_model.transformer.text_model.final_layer_norm.bias and "
            "cond_stage_model.transformer.final_layer_norm.bias)"
        )
        with pytest.raises(WeightError, match=r"^x\.ckpt does not fit SD 1\.x: 2 missing"):
            report.check("x.ckpt", "SD 1.x")

    def test_long_lists_are_cut(self):
        report = Report(missing=tuple(f"unet.{i}" for i in range(9)))
        assert report.summary() == "9 missing (unet 9: 0, 1, 2 and 6 more)"

    def test_what_fits_stops_nobody(self):
        Report().check("a file", "a network")
        assert Report().summary() == "fits"

    def test_a_file_without_its_autoencoder_says_so_by_parts(self):
        naming = naming_of(Format.STABILITY, SD_15)
        stored = file_of(Format.STABILITY, SD_15, parts=("unet", "text_encoder"))
        assert naming.present_parts(stored) == ["unet", "text_encoder"]
        assert len(naming.read_plan(stored).report.missing) == 248
        assert naming.read_plan(stored, parts=naming.present_parts(stored)).report.fits

    def test_parts_that_are_not_wanted_are_neither_read_nor_unexpected(self):
        read = naming_of(Format.STABILITY, SD_15).read_plan(file_of(Format.STABILITY, SD_15), parts=["vae"])
        assert read.report.fits
        assert len(read.slots) == 248


@pytest.mark.parametrize("shape", [(), (0,), (1,), (2, 0, 3, 3), (5, 5, 5, 5, 5)])
@pytest.mark.parametrize("form", list(Format), ids=lambda form: form.value)
def test_shapes_that_make_no_sense_are_reported(form, shape):
    stored = dict.fromkeys(file_of(form, SMALL["sdxl"]), shape)
    recognition = recognise_model(stored, "a file")
    assert recognition.model.family is Family.SDXL
    assert not recognition.naming.read_plan(stored).report.fits
