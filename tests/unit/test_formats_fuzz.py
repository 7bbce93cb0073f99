"""Bent models and LoRAs through the commands: each ends in our line and nothing written, or in a correct result.

Bytes of containers are bent in test_tensor_files_fuzz; here it is what they say: names, shapes, types, settings.
"""

import io
import json
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dreambooth_ms.adapters.file import open_adapter
from dreambooth_ms.cli.main import main
from dreambooth_ms.formats.files.dtypes import DType
from dreambooth_ms.formats.files.mindspore_ckpt import write_mindspore_ckpt
from dreambooth_ms.formats.files.open import open_tensor_file, write_tensors
from dreambooth_ms.formats.files.safetensors_file import write_safetensors
from dreambooth_ms.formats.files.stored import StoredTensor
from dreambooth_ms.formats.naming.formats import Format
from dreambooth_ms.formats.naming.lora_formats import LoraFormat
from dreambooth_ms.models.specs import ClipTextSpec, VaeSpec
from dreambooth_ms.weights.model_writing import plan_model
from dreambooth_ms.weights.opened_model import open_model
from tests.unit.test_tensor_files_fuzz import bent, one_gibibyte
from tests.whole_loras import random_lora, write_lora_as
from tests.whole_models import RUNNING, random_model

__all__ = ["one_gibibyte"]

SMALLEST = replace(
    RUNNING,
    unet=replace(RUNNING.unet, block_out_channels=(2,), has_attention=(False,), num_heads=(1,), cross_attention_dim=3),
    vae=VaeSpec(block_out_channels=(2,), layers_per_block=1),
    text_encoder=ClipTextSpec(
        transformer=replace(RUNNING.text_encoder.transformer, hidden_size=3, intermediate_size=4, num_hidden_layers=1),
        vocab_size=5,
    ),
)
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-1, 2**70), st.floats(), st.text(max_size=4)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=6), inner, max_size=3)),
    max_leaves=6,
)
few = settings(max_examples=40, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model in both kinds of file and as a folder, and a LoRA for it in two formats."""
    place = tmp_path_factory.mktemp("fuzz")
    model = random_model(SMALLEST, place)
    for form, name in ((Format.STABILITY, "m.safetensors"), (Format.MINDONE, "m.ckpt"), (Format.DIFFUSERS, "folder")):
        plan_model(model, form).write(place / name)
    lora = random_lora(SMALLEST, place, ranks=(1, 2))
    write_lora_as(lora, place / "lora.safetensors", LoraFormat.KOHYA)
    write_lora_as(lora, place / "peft", LoraFormat.PEFT)
    write_tensors(place / "kinds.safetensors", kinds_of(model))
    return place


def kinds_of(model):
    """An update of each kind, in kohya's names."""
    stem = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_"
    rng, side = np.random.default_rng(0), model.spec.unet.block_out_channels[0]
    a, b, whole, rows = (rng.standard_normal(shape) for shape in ((side, 1), (1, side), (side, side), (side, 1)))
    own = {f"{stem}q.hada_w{number}_{end}": value for number in "12" for end, value in (("a", a), ("b", b))}
    own |= {f"{stem}k.lokr_w1": np.ones((1, 1)), f"{stem}k.lokr_w2_a": a, f"{stem}k.lokr_w2_b": b}
    own |= {f"{stem}v.lora_down.weight": b, f"{stem}v.lora_up.weight": a, f"{stem}v.dora_scale": rows}
    own |= {f"{stem}{end}.alpha": np.array(1.0) for end in "qkv"}
    own |= {f"{stem}out_0.oft_blocks": whole[None], f"{stem}out_0.rescale": rows}
    stem = stem.replace("attn1", "attn2")
    own |= {f"{stem}q.weight": rows[:, 0], f"{stem}q.on_input": np.array(0)}
    own |= {f"{stem}out_0.diff": whole}
    return {name: value.astype(np.float32) for name, value in own.items()}


def run(*arguments):
    """The status of a command line, which says at most one line about a mistake."""
    said, started = io.StringIO(), time.process_time()
    with redirect_stderr(said), redirect_stdout(io.StringIO()):
        status = main([str(argument) for argument in arguments])
    lines = [line for line in said.getvalue().splitlines() if "error: " in line]
    assert (status, len(lines)) in ((0, 0), (2, 1)), said.getvalue()
    assert time.process_time() - started < 5
    return status


def convert(place, source, target, opens, *flags):
    """Inspect and convert a bent source: what is written can be opened, and a refusal leaves nothing."""
    run("inspect", source, *flags[:2])
    out = place / target
    if run("convert", source, out, *flags) == 0:
        opens(out)
        if out.is_dir():
            for path in sorted(out.rglob("*"), reverse=True):
                path.rmdir() if path.is_dir() else path.unlink()
            out.rmdir()
        else:
            out.unlink()
    assert not out.exists()
    assert not list(place.glob(".partial-*"))


@st.composite
def bent_tensors(draw, tensors):
    """The tensors of a file after one to three changes of names, shapes or types."""
    changed = dict(tensors)
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(sorted(changed)))
        other = draw(st.sampled_from(sorted(tensors)))
        change = draw(st.sampled_from(["drop", "rename", "reshape", "retype", "copy", "strange", "swap"]))
        if change == "drop" and len(changed) > 1:
            del changed[name]
        elif change == "rename":
            changed[f"{name}{draw(st.sampled_from(['.x', '_', '0', '.lora_A.weight', '.alpha']))}"] = changed.pop(name)
        elif change == "reshape":
            shape = draw(st.lists(st.sampled_from([0, 1, 2, 3, 5, 77]), max_size=5))
            changed[name] = StoredTensor.of(np.zeros(shape, np.float32))
        elif change == "retype":
            kind = draw(st.sampled_from([np.int64, np.uint8, np.bool_, np.float64, np.float16]))
            changed[name] = StoredTensor.of(np.zeros(changed[name].shape, kind))
        elif change == "copy":
            changed[other] = changed[name]
        elif change == "strange":
            changed[draw(st.text(max_size=5))] = StoredTensor.of(np.zeros(2, np.float32), DType.F32)
        else:
            changed[name], changed[other] = changed.get(other, changed[name]), changed[name]
    return {name: own for name, own in changed.items() if name != "__metadata__"}


@few
@given(data=st.data())
def test_models_in_single_files(place, data):
    tensors = data.draw(bent_tensors(open_tensor_file(place / "m.safetensors").tensors))
    write_safetensors(place / "bent.safetensors", tensors)
    convert(place, place / "bent.safetensors", "out.ckpt", open_model)


@few
@given(data=st.data())
def test_models_in_mindspore_checkpoints(place, data):
    tensors = data.draw(bent_tensors(open_tensor_file(place / "m.ckpt").tensors))
    write_mindspore_ckpt(place / "bent.ckpt", {name: own for name, own in tensors.items() if name})
    convert(place, place / "bent.ckpt", "out.safetensors", open_model)


@few
@given(data=st.data())
def test_loras(place, data):
    file = open_tensor_file(place / "lora.safetensors")
    write_safetensors(place / "bent.safetensors", data.draw(bent_tensors(file.tensors)), file.metadata)
    flags = ["--base", place / "m.safetensors", "--format", "diffusers"]
    convert(place, place / "bent.safetensors", "out.safetensors", lambda out: open_adapter(out, [SMALLEST]), *flags)


@few
@given(data=st.data())
def test_updates_of_other_kinds(place, data):
    tensors = open_tensor_file(place / "kinds.safetensors").tensors
    write_safetensors(place / "bent.safetensors", data.draw(bent_tensors(tensors)))
    flags = ["--base", place / "m.safetensors", "--format", "kohya", *data.draw(st.sampled_from([[], ["--rank", "1"]]))]
    convert(place, place / "bent.safetensors", "out.safetensors", lambda out: open_adapter(out, [SMALLEST]), *flags)


@few
@given(key=st.sampled_from(["r", "lora_alpha", "alpha_pattern", "rank_pattern", "use_rslora", "use_dora"]), value=JSON)
def test_settings_of_peft(place, key, value):
    path = place / "peft/unet/adapter_config.json"
    before = path.read_text()
    path.write_text(json.dumps(json.loads(before) | {key: value}))
    flags = ["--base", place / "m.safetensors", "--format", "kohya"]
    convert(place, place / "peft", "out.safetensors", lambda out: open_adapter(out, [SMALLEST]), *flags)
    path.write_text(before)


@few
@given(data=st.data())
def test_settings_in_the_metadata_of_diffusers(place, data):
    tensors = open_tensor_file(place / "lora.safetensors").tensors
    as_json = st.one_of(JSON, JSON.map(lambda value: {"unet.lora_alpha": value})).map(json.dumps)
    value = data.draw(st.one_of(st.text(max_size=20), as_json))
    write_safetensors(place / "bent.safetensors", tensors, {"lora_adapter_metadata": value, "ss_network_dim": value})
    flags = ["--base", place / "m.safetensors", "--format", "diffusers"]
    convert(place, place / "bent.safetensors", "out.safetensors", lambda out: open_adapter(out, [SMALLEST]), *flags)


@few
@given(name=st.sampled_from(["model_index.json", "scheduler/scheduler_config.json", "vae/config.json"]), data=st.data())
def test_configurations_of_folders(place, name, data):
    path = place / "folder" / name
    before = path.read_bytes()
    keys = sorted(json.loads(before))
    as_json = st.tuples(st.sampled_from(keys), JSON).map(
        lambda item: json.dumps(json.loads(before) | {item[0]: item[1]}).encode()
    )
    path.write_bytes(data.draw(st.one_of(as_json, bent(before))))
    convert(place, place / "folder", "out", open_model)
    path.write_bytes(before)
