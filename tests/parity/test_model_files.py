"""diffusers reads the single files and folders that we write, and we read what it saves: every number, in every way."""

from types import SimpleNamespace

import mindspore as ms
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from mindspore import Tensor

from dreambooth_ms.cli.main import main
from dreambooth_ms.data.conditioning import PromptTokenizer
from dreambooth_ms.formats.files.dtypes import DType
from dreambooth_ms.formats.naming.formats import Format
from dreambooth_ms.models.layers import CellMethod
from dreambooth_ms.weights.bundle import open_bundle
from dreambooth_ms.weights.model_writing import plan_model
from dreambooth_ms.weights.opened_model import open_model
from tests.parity.reference import normal, relative_error
from tests.whole_models import RUNNING, RUNNING_SD2, RUNNING_SDXL, random_model, values_of

MODELS = {"sd1": RUNNING, "sd2": RUNNING_SD2, "sdxl": RUNNING_SDXL}
NETWORKS = ("unet", "vae", "text_encoder", "text_encoder_2")

# Float32 sums in another order: measured 1e-6 and less.
TOLERANCE = 1e-4


@pytest.fixture(scope="module", params=MODELS)
def written(request, tmp_path_factory):
    """A model in a single file of ours, and the folder that it was converted to."""
    folder = tmp_path_factory.mktemp(request.param)
    model = random_model(MODELS[request.param], folder, prediction_type="epsilon")
    plan_model(model, Format.STABILITY).write(folder / "model.safetensors")
    assert main(["convert", str(folder / "model.safetensors"), str(folder / "diffusers")]) == 0
    kind = StableDiffusionXLPipeline if request.param == "sdxl" else StableDiffusionPipeline
    return SimpleNamespace(file=folder / "model.safetensors", folder=folder / "diffusers", model=model, kind=kind)


def state_of(pipeline):
    """Public name -> array of every network of a pipeline."""
    state = {}
    for part in NETWORKS:
        if getattr(pipeline, part, None) is not None:
            state |= {f"{part}.{name}": value.numpy() for name, value in getattr(pipeline, part).state_dict().items()}
    return {name: value for name, value in state.items() if not name.endswith("position_ids")}


def assert_holds(pipeline, model):
    state = state_of(pipeline)
    assert state.keys() == model.tensors.keys()
    for name, tensor in model.tensors.items():
        assert np.array_equal(state[name], tensor.read()), name


def test_from_single_file_reads_our_file(written):
    pipeline = written.kind.from_single_file(
        str(written.file), config=str(written.folder), local_files_only=True, torch_dtype=torch.float32
    )
    assert_holds(pipeline, written.model)


def test_from_pretrained_reads_our_folder(written):
    pipeline = written.kind.from_pretrained(written.folder)
    assert_holds(pipeline, written.model)
    assert pipeline.scheduler.config.prediction_type == "epsilon"
    assert pipeline.tokenizer("a cat").input_ids == [49406, 320, 2368, 49407]
    assert pipeline.tokenizer.pad_token_id == (0 if written.model.spec is RUNNING_SD2 else 49407)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"variant": "fp16"},
        {"safe_serialization": False},
        {"max_shard_size": "300KB"},
        {"max_shard_size": "300KB", "safe_serialization": False, "variant": "fp16"},
    ],
    ids=["plain", "variant", "bin", "shards", "shards of a variant in bin"],
)
def test_we_read_what_it_saves(written, tmp_path, options):
    dtype = torch.float16 if "variant" in options else torch.float32
    written.kind.from_pretrained(written.folder, torch_dtype=dtype).save_pretrained(tmp_path / "saved", **options)
    found = open_model(tmp_path / "saved")
    found.check()
    own = DType.F16 if "variant" in options else DType.F32
    expected = {name: tensor.cast_to(own) for name, tensor in written.model.tensors.items()}
    assert values_of(found.tensors) == values_of(expected)
    assert main(["convert", str(tmp_path / "saved"), str(tmp_path / "again.safetensors")]) == 0
    again = open_model(tmp_path / "again.safetensors").tensors
    assert values_of({name: again[name] for name in expected}) == values_of(expected)


@pytest.mark.parametrize("written", ["sd1"], indirect=True)
def test_its_networks_from_our_file_give_our_outputs(written, pynative):
    pipeline = written.kind.from_single_file(
        str(written.file), config=str(written.folder), local_files_only=True, torch_dtype=torch.float32
    )
    ours = open_bundle(written.file)
    latents, timesteps, text = normal(1, 4, 16, 16), np.array([500]), normal(1, 77, 64)
    picture, ids = normal(1, 3, 32, 32), PromptTokenizer(ours.text).ids("a photo of sks dog")
    with torch.no_grad():
        noise = pipeline.unet(torch.tensor(latents), torch.tensor(timesteps), torch.tensor(text)).sample
        mean = pipeline.vae.encode(torch.tensor(picture)).latent_dist.mean
        states = pipeline.text_encoder(torch.tensor(ids, dtype=torch.long))[0]
    unet = ours.denoiser.load()(Tensor(latents), Tensor(timesteps, ms.int32), Tensor(text))
    assert relative_error(unet, noise) < TOLERANCE
    assert relative_error(CellMethod(ours.codec.load().encode)(Tensor(picture))[0], mean) < TOLERANCE
    assert relative_error(ours.text[0].load()(Tensor(ids, ms.int32)), states) < TOLERANCE
