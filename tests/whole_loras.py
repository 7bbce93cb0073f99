"""Whole LoRAs: random factors for the layers of a small model, and the files that hold them."""

import numpy as np

from dreambooth_ms.adapters.adapter import Adapter
from dreambooth_ms.adapters.file import FILE_NAME, OpenedAdapter, open_adapter
from dreambooth_ms.adapters.formulas import Update
from dreambooth_ms.adapters.writing import write_adapter
from dreambooth_ms.formats.files.dtypes import DType
from dreambooth_ms.formats.files.stored import Container
from dreambooth_ms.formats.naming.lora_formats import LoraFormat, lora_layers
from dreambooth_ms.formats.naming.update_kinds import ALPHA, DOWN, UP
from dreambooth_ms.models.specs import SD_15
from dreambooth_ms.training.checkpoint import STEP_KEY
from dreambooth_ms.weights.opened_model import open_model
from tests.small_specs import SMALL

FILES = {LoraFormat.PEFT: "", LoraFormat.MINDONE: ".ckpt"}

ATTENTION = (".to_q", ".to_k", ".to_v", ".to_out.0")


def lora_update(down, up, alpha=None):
    """The update alpha / r * B A of a layer, r where there is no alpha."""
    return Update({DOWN: down, UP: up} | ({} if alpha is None else {ALPHA: np.array(alpha)}))


def factor_shapes(weight, rank):
    """The shapes of A and B for a layer's weight."""
    return (rank, *weight[1:]), (weight[0], rank, *(1 for _ in weight[2:]))


def attention(layer):
    """What nearly every LoRA adapts, and every format has a place for."""
    return layer.endswith(ATTENTION)


def attention_and_text(layer):
    return layer.endswith(ATTENTION) or ".self_attn." in layer


def random_lora(spec, path, choose=attention_and_text, dtype=DType.F32, seed=0, alphas=(1.0, 3.0), ranks=(2, 4)):
    """A LoRA in memory, as if it had been opened at a path; ranks and alphas take turns over the layers."""
    rng = np.random.default_rng(seed)
    updates = {}
    for number, (layer, weight) in enumerate(lora_layers(spec).items()):
        if choose(layer):
            rank = ranks[number % len(ranks)]
            down, up = (
                (rng.standard_normal(shape, dtype=np.float32) / 4).astype(np.float16)
                for shape in factor_shapes(weight, rank)
            )
            if dtype is not DType.F16:
                # Half of float16's digits, so that bfloat16 holds them too.
                down, up = (np.round(value.astype(np.float32) * 16) / 16 for value in (down, up))
            alpha = alphas[number % len(alphas)]
            updates[layer] = lora_update(down, up, float(rank) if alpha is None else alpha)
    return OpenedAdapter(
        path=path,
        container=Container.SAFETENSORS,
        form=LoraFormat.DIFFUSERS,
        models=(spec,),
        adapter=Adapter.of(updates),
        dtype=dtype,
        metadata={},
    )


def write_lora_as(lora, path, form):
    """Write a LoRA in a format, in its own type."""
    write_adapter(lora.adapter, path, form, lora.model, lora.dtype, lora.metadata)


def write_lora_file(form, target, family="sd15", **more):
    """Write a random LoRA for a small model in a format; returns its path and the LoRA."""
    path = target.with_name(target.name + FILES.get(form, ".safetensors"))
    lora = random_lora(SMALL[family], path, **more)
    write_lora_as(lora, path, form)
    return path, lora


def write_run_lora(folder, networks, step=1, alpha=None):
    """The file of a training: for each network, A and B by the layers' names. Its names need no model."""
    adapter = Adapter(
        {
            part: {layer: lora_update(*factors, alpha) for layer, factors in own.items()}
            for part, own in networks.items()
        }
    )
    path = folder / FILE_NAME
    metadata = {STEP_KEY: str(step)}
    write_adapter(adapter, path, LoraFormat.DIFFUSERS, SD_15, metadata=metadata)
    return path


def read_lora(path, base):
    """The updates of each network in a file or folder that is for a base."""
    return open_adapter(path, [open_model(base).spec]).adapter.parts


def delta(update):
    """What a LoRA's update adds to its layer's weight."""
    return update.delta(np.zeros((len(update.up), *update.down.shape[1:]), np.float32))
