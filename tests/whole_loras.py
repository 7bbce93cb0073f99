"""Whole LoRAs: random factors for the layers of a small model, and the files that hold them."""

import numpy as np

from dreambooth_ms.adapters.lora_writing import write_lora_as
from dreambooth_ms.adapters.opened_lora import OpenedLora
from dreambooth_ms.formats.files.dtypes import DType
from dreambooth_ms.formats.files.stored import Container
from dreambooth_ms.formats.naming.lora import Factors
from dreambooth_ms.formats.naming.lora_formats import LoraFormat, factor_shapes, lora_layers
from tests.small_specs import SMALL

FILES = {LoraFormat.PEFT: "", LoraFormat.MINDONE: ".ckpt"}

ATTENTION = (".to_q", ".to_k", ".to_v", ".to_out.0")


def attention(layer):
    """What nearly every LoRA adapts, and every format has a place for."""
    return layer.endswith(ATTENTION)


def attention_and_text(layer):
    return layer.endswith(ATTENTION) or ".self_attn." in layer


def random_lora(spec, path, choose=attention_and_text, dtype=DType.F32, seed=0, alphas=(1.0, 3.0), ranks=(2, 4)):
    """A LoRA in memory, as if it had been opened at a path; ranks and alphas take turns over the layers."""
    rng = np.random.default_rng(seed)
    factors = {}
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
            factors[layer] = Factors(down, up, float(rank) if alpha is None else alpha)
    return OpenedLora(
        path=path,
        container=Container.SAFETENSORS,
        form=LoraFormat.DIFFUSERS,
        model=spec,
        families=(spec.family.value,),
        factors=factors,
        dtype=dtype,
        notes=(),
        metadata={},
    )


def write_lora_file(form, target, family="sd15", **more):
    """Write a random LoRA for a small model in a format; returns its path and the LoRA."""
    path = target.with_name(target.name + FILES.get(form, ".safetensors"))
    lora = random_lora(SMALL[family], path, **more)
    write_lora_as(lora, path, form)
    return path, lora
