"""Updates of every kind for a few layers of a small model, by hand; and these layers as a network of PyTorch, with what
other programs' updates make of their weights."""

import numpy as np
import torch

from tests.whole_models import RUNNING, random_model

LAYERS = (
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
    "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k",
    "down_blocks.0.attentions.0.proj_in",
    "down_blocks.0.resnets.0.conv1",
)
"""A square linear layer, one that is not, a convolution that is one as well, and one of three by three."""


def weights_of(model=None, layers=LAYERS):
    """The layers' weights in a small random model of SD 1, or another."""
    tensors = (model or random_model(RUNNING, "base")).tensors
    return {layer: tensors[f"unet.{layer}.weight"].read() for layer in layers}


def torch_layer(weight, dtype=torch.float64):
    """A layer without a bias, whose output on unit vectors is its weight (`weight_of`)."""
    rows, columns, *kernel = weight.shape
    if kernel:
        layer = torch.nn.Conv2d(columns, rows, kernel[0], padding=kernel[0] // 2, bias=False)
    else:
        layer = torch.nn.Linear(columns, rows, bias=False)
    layer.weight.data = torch.tensor(weight)
    return layer.to(dtype)


def weight_of(module, like):
    """The weight of a layer with its update, by what it makes of unit vectors."""
    columns, kernel = like.shape[1], like.shape[2:]
    unit = torch.eye(columns, dtype=torch.float64)
    with torch.no_grad():
        if not kernel:
            return module(unit).T.numpy()
        image = torch.zeros(columns, columns, *kernel, dtype=torch.float64)
        image[..., kernel[0] // 2, kernel[1] // 2] = unit
        return module(image).flip(2, 3).transpose(0, 1).numpy()


def network_of(weights, dtype=torch.float64):
    """The layers under their names in a network."""
    root = torch.nn.Module()
    for name, weight in weights.items():
        *path, last = name.split(".")
        parent = root
        for word in path:
            if not hasattr(parent, word):
                parent.add_module(word, torch.nn.Module())
            parent = getattr(parent, word)
        parent.add_module(last, torch_layer(weight, dtype))
    return root


def disturb(module, deviation=0.1, seed=0):
    """Random numbers for what is trained."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.dtype)
            parameter.data = deviation * noise + (parameter.data.abs() if "dora" in name or "magnitude" in name else 0)


def error(ours, expected):
    """Of what is added to a weight, relative to its largest number."""
    return float(np.abs(ours.astype(np.float64) - expected).max() / np.abs(expected).max())


def factors_of(kind, weight, seed=0):
    """Random tensors of an update of a weight, by the names that kohya's files have for them."""
    rng, rows, columns, kernel = np.random.default_rng(seed), *weight.shape[:2], weight.shape[2:]
    taps = int(np.prod(kernel))

    def draw(*shape):
        return rng.standard_normal(shape, dtype=np.float32) / 8

    points = tuple(1 for _ in kernel)
    lora = {"lora_down.weight": draw(4, columns, *kernel), "lora_up.weight": draw(rows, 4, *points)}
    norms = np.linalg.norm(weight.reshape(rows, -1), axis=1).reshape(-1, 1, *points)
    loha = {f"hada_w{n}_{end}": draw(*((rows, 4) if end == "a" else (4, columns * taps))) for n in "12" for end in "ab"}
    alpha = {"alpha": np.array(2, np.float32)}
    return {
        "LoRA": lora | alpha,
        "DoRA": lora | alpha | {"dora_scale": norms * (1 + draw(*norms.shape))},
        "LoHa": loha | alpha,
        "LoKr": {"lokr_w1": draw(4, 4), "lokr_w2_a": draw(rows // 4, 2), "lokr_w2_b": draw(2, columns // 4 * taps)}
        | alpha,
        "OFT of rows": {"oft_blocks": draw(rows // 8, 8, 8) / 8},
        "OFT": {"oft_R": draw(columns * taps // 8, 28) / 8},
        "IA3": {"weight": draw(rows), "on_input": np.array(0)},
        "difference": {"diff": draw(*weight.shape)},
        "difference with its bias": {"diff": draw(*weight.shape), "diff_b": draw(rows)},
    }[kind]


def kohya_names(kinds, weights):
    """The tensors of a file, by kind for each layer."""
    return {
        f"lora_unet_{layer.replace('.', '_')}.{name}": value
        for number, (layer, kind) in enumerate(kinds.items())
        for name, value in factors_of(kind, weights[layer], number).items()
    }
