"""diffusers' pipelines take the LoRA files that we write, and we take those that diffusers and peft save.

The comparison is of what a LoRA does: the update of every layer, as peft merges it.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict

from dreambooth_ms.adapters.file import open_adapter
from dreambooth_ms.cli.main import main
from dreambooth_ms.conversion import merged
from dreambooth_ms.errors import WeightError
from dreambooth_ms.formats.files.dtypes import DTYPES, DType
from dreambooth_ms.formats.files.stored import StoredTensor
from dreambooth_ms.formats.naming.formats import Format
from dreambooth_ms.formats.naming.lora_formats import LoraFormat
from dreambooth_ms.weights.model_writing import plan_model
from dreambooth_ms.weights.opened_model import open_model
from tests.whole_loras import FILES, attention_and_text, delta, random_lora, write_lora_as
from tests.whole_models import RUNNING, RUNNING_SDXL, random_model

MODELS = {"sd1": RUNNING, "sdxl": RUNNING_SDXL}
READ_BY_DIFFUSERS = [
    LoraFormat.DIFFUSERS,
    LoraFormat.DIFFUSERS_PEFT,
    LoraFormat.DIFFUSERS_PROCESSORS,
    LoraFormat.KOHYA,
    LoraFormat.KOHYA_DIFFUSERS,
]

# Two float32 products of the same factors.
TOLERANCE = 1e-5


@pytest.fixture(scope="module", params=MODELS)
def base(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    model = random_model(MODELS[request.param], folder)
    plan_model(model, Format.DIFFUSERS).write(folder / "model")
    kind = StableDiffusionXLPipeline if request.param == "sdxl" else StableDiffusionPipeline
    return SimpleNamespace(path=folder / "model", model=model, kind=kind, spec=model.spec)


def networks_of(pipeline):
    parts = ("unet", "text_encoder", "text_encoder_2")
    return {part: getattr(pipeline, part) for part in parts if getattr(pipeline, part, None) is not None}


def updates_of(pipeline):
    """Layer -> the update that peft would merge into its weight."""
    updates = {}
    for part, network in networks_of(pipeline).items():
        for name, module in network.named_modules():
            if hasattr(module, "lora_A") and len(module.lora_A):
                (adapter,) = module.lora_A
                updates[f"{part}.{name}"] = module.get_delta_weight(adapter).detach().numpy()
    return updates


def assert_same(found, updates):
    assert found.keys() == updates.keys()
    for layer, own in updates.items():
        expected = delta(own)
        assert np.abs(found[layer] - expected).max() <= TOLERANCE * np.abs(expected).max(), layer


@pytest.mark.parametrize("form", READ_BY_DIFFUSERS, ids=lambda form: form.value)
def test_load_lora_weights_takes_our_file(base, tmp_path, form):
    # One rank and alpha: diffusers 0.39 loses kohya's alphas where they differ from layer to layer (it says so). Beside
    # the names of its old processors it reads none at all.
    alpha = None if form is LoraFormat.DIFFUSERS_PROCESSORS else 3.0
    lora = random_lora(base.spec, tmp_path, ranks=(4,), alphas=(alpha,))
    write_lora_as(lora, tmp_path / "lora.safetensors", form)
    pipeline = base.kind.from_pretrained(base.path)
    pipeline.load_lora_weights(tmp_path / "lora.safetensors")
    assert_same(updates_of(pipeline), lora.adapter.updates)


def adapted(base, rank=3, alpha=5, text_rank=2, text_alpha=6):
    """A pipeline with a random adapter of peft in every network."""
    pipeline = base.kind.from_pretrained(base.path)
    torch.manual_seed(0)
    for part, network in networks_of(pipeline).items():
        if part == "unet":
            config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=["to_q", "to_out.0", "ff.net.2", "conv1"])
        else:
            config = LoraConfig(r=text_rank, lora_alpha=text_alpha, target_modules=["q_proj", "fc1"])
        config.init_lora_weights = False
        network.add_adapter(config)
    return pipeline


def test_we_take_what_diffusers_saves(base, tmp_path):
    pipeline = adapted(base)
    layers, settings = {}, {}
    for part, network in networks_of(pipeline).items():
        layers[f"{part}_lora_layers"] = get_peft_model_state_dict(network)
        settings[f"{part}_lora_adapter_metadata"] = network.peft_config["default"].to_dict()
    base.kind.save_lora_weights(tmp_path, **layers, **settings)
    found = open_adapter(tmp_path, [base.spec])
    assert found.notes == []
    assert_same(updates_of(pipeline), found.adapter.updates)


@pytest.mark.parametrize("base", ["sd1"], indirect=True)
class TestPeft:
    def test_we_take_the_folders_it_saves(self, base, tmp_path):
        pipeline = base.kind.from_pretrained(base.path)
        torch.manual_seed(0)
        for part, network in networks_of(pipeline).items():
            targets = ["to_q", "proj_in", "conv2"] if part == "unet" else ["v_proj"]
            config = LoraConfig(
                r=4,
                lora_alpha=3,
                target_modules=targets,
                rank_pattern={"conv2": 2},
                alpha_pattern={"conv2": 5},
                use_rslora=part == "unet",
                init_lora_weights=False,
            )
            network = get_peft_model(network, config)
            network.save_pretrained(tmp_path / part)
            setattr(pipeline, part, network.base_model.model)
        assert_same(updates_of(pipeline), open_adapter(tmp_path, [base.spec]).adapter.updates)

    def test_it_takes_the_folders_we_write(self, base, tmp_path):
        lora = random_lora(base.spec, tmp_path)
        write_lora_as(lora, tmp_path / "peft", LoraFormat.PEFT)
        pipeline = base.kind.from_pretrained(base.path)
        for part, network in networks_of(pipeline).items():
            PeftModel.from_pretrained(network, tmp_path / "peft" / part)
        assert_same(updates_of(pipeline), lora.adapter.updates)


class TestMerging:
    # One rounding of a sum of float32 numbers, and one of float16 ones.
    SUMS = {"fp32": 1e-6, "fp16": 1e-3}

    def test_merged_is_what_diffusers_fuses(self, base, tmp_path):
        """Two LoRAs of unlike formats and ranks, times 0.7, into a single file."""
        first = random_lora(base.spec, tmp_path, seed=1, ranks=(4,), alphas=(6.0,))
        second = random_lora(base.spec, tmp_path, seed=2, ranks=(3,), alphas=(2.0,))
        write_lora_as(first, tmp_path / "first.safetensors", LoraFormat.KOHYA)
        write_lora_as(second, tmp_path / "second", LoraFormat.PEFT)
        assert merge(base, tmp_path / "merged.safetensors", tmp_path / "first.safetensors", tmp_path / "second") == 0
        write_lora_as(second, tmp_path / "second.safetensors", LoraFormat.KOHYA)
        pipeline = base.kind.from_pretrained(base.path)
        for name in ("first", "second"):
            pipeline.load_lora_weights(tmp_path / f"{name}.safetensors", adapter_name=name)
        pipeline.set_adapters(["first", "second"], [0.7, 0.7])
        pipeline.fuse_lora()
        pipeline.unload_lora_weights()
        found = open_model(tmp_path / "merged.safetensors").tensors
        changed = 0
        for part, network in networks_of(pipeline).items():
            for name, value in network.state_dict().items():
                own = found[f"{part}.{name}"].read()
                assert np.abs(own - value.numpy()).max() <= 1e-5 * max(1, np.abs(own).max()), name
                changed += not np.array_equal(own, base.model.tensors[f"{part}.{name}"].read())
        assert changed == len(first.adapter.updates)

    @pytest.mark.parametrize("dtype", SUMS)
    @pytest.mark.parametrize("form", Format, ids=lambda form: form.value)
    @pytest.mark.parametrize("base", ["sd1"], indirect=True)
    def test_taken_out_again_it_is_the_base(self, base, tmp_path, form, dtype):
        suffix = {Format.DIFFUSERS: "", Format.STABILITY: ".safetensors", Format.MINDONE: ".ckpt"}[form]
        write_lora_as(random_lora(base.spec, tmp_path), tmp_path / "lora.safetensors", LoraFormat.KOHYA)
        there, back = tmp_path / f"there{suffix}", tmp_path / f"back{suffix}"
        assert merge(base, there, tmp_path / "lora.safetensors", dtype=dtype) == 0
        assert merge(SimpleNamespace(path=there), back, tmp_path / "lora.safetensors", scale=-0.7) == 0
        merged_ones, found = open_model(there).tensors, open_model(back).tensors
        for name, own in base.model.tensors.items():
            expected = own.read()
            largest = max(np.abs(expected).max(), np.abs(merged_ones[name].read()).max())
            assert np.abs(found[name].read() - expected).max() <= self.SUMS[dtype] * largest, name

    @pytest.mark.parametrize("source", ["fp16", "bf16"])
    @pytest.mark.parametrize("target", ["fp32", "fp16", "bf16"])
    @pytest.mark.parametrize("base", ["sd1"], indirect=True)
    def test_the_sum_is_rounded_once_to_what_is_written(self, base, tmp_path, source, target):
        """Small updates of a base in half precision: what its own type has no digits for is there in float32."""
        lora = random_lora(base.spec, tmp_path, alphas=(1e-3,))
        write_lora_as(lora, tmp_path / "lora.safetensors", LoraFormat.KOHYA)
        half = tmp_path / "half.safetensors"
        assert main(["convert", str(base.path), str(half), "--dtype", source]) == 0
        assert merge(SimpleNamespace(path=half), tmp_path / "out", tmp_path / "lora.safetensors", dtype=target) == 0
        weights, found = open_model(half).tensors, open_model(tmp_path / "out").tensors
        for layer, own in lora.adapter.updates.items():
            weight = weights[f"{layer}.weight"].cast_to(DType.F32).read()
            wanted = StoredTensor.of(weight + np.float32(0.7) * own.delta(weight)).cast_to(DTYPES[target])
            assert found[f"{layer}.weight"].read().tobytes() == wanted.read().tobytes(), layer

    @pytest.mark.parametrize("base", ["sd1"], indirect=True)
    def test_a_scale_of_zero_changes_no_bit(self, base, tmp_path):
        lora = random_lora(base.spec, tmp_path, choose=attention_and_text)
        assert merged(base.model, [lora], 0.0) is base.model

    @pytest.mark.parametrize("base", ["sd1"], indirect=True)
    def test_a_lora_for_a_network_that_is_not_there_is_refused(self, base, tmp_path):
        lora = random_lora(base.spec, tmp_path)
        with pytest.raises(WeightError, match="adapts text_encoder, which"):
            merged(random_model(base.spec, tmp_path, parts=("unet", "vae")), [lora], 1.0)


def merge(base, target, *loras, scale=0.7, dtype=None):
    flags = ["--dtype", dtype] if dtype else []
    for lora in loras:
        flags += ["--lora", str(lora)]
    return main(["merge", "--base", str(base.path), "--target", str(target), "--scale", str(scale), *flags])


def test_files_of_mindone_are_taken_for_what_they_were_made_of(tmp_path):
    """The names by the published rules; the values come by way of another format."""
    lora = random_lora(RUNNING_SDXL, tmp_path, choose=lambda layer: layer.endswith((".to_q", ".to_out.0")))
    write_lora_as(lora, tmp_path / f"lora{FILES[LoraFormat.MINDONE]}", LoraFormat.MINDONE)
    found = open_adapter(tmp_path / "lora.ckpt", [RUNNING_SDXL])
    assert found.form is LoraFormat.MINDONE
    assert_same({layer: delta(own) for layer, own in found.adapter.updates.items()}, lora.adapter.updates)
