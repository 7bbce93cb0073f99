"""Every kind of adapter trains as peft's layers do, and LoCon as LyCORIS': loss, gradients, factors after five steps.

Each kind has a branch of its own, a convolution and a linear layer, in one network that is compiled once.
"""

from types import SimpleNamespace

import mindspore as ms
import numpy as np
import pytest
import torch
from lycoris.modules.locon import LoConModule
from mindspore import Tensor, nn, ops
from peft import LoHaConfig, LoKrConfig, LoraConfig, OFTConfig, inject_adapter_in_model

from dreambooth_ms.adapters.layer_updates import LayerUpdate
from dreambooth_ms.adapters.lora import initialise_lora, inject, lora_trainables
from dreambooth_ms.models.parameters import initialise, public_parameters
from dreambooth_ms.ops import Conv2d, Dense, mean
from dreambooth_ms.ops.layout import from_public_layout, image_to_tokens
from dreambooth_ms.training.optimisers import AdamW, Hyperparameters
from dreambooth_ms.training.step import AccumulatingTrainStep, TrainStep
from tests.parity.reference import normal, relative_error

STEPS, RATE, MAX_NORM, RANK, ALPHA = 5, 1e-3, 0.5, 2, 3.0
KINDS = {
    "lora": LayerUpdate("lora", RANK, ALPHA),
    "dora": LayerUpdate("dora", RANK, ALPHA),
    "loha": LayerUpdate("loha", RANK, ALPHA),
    "lokr": LayerUpdate("lokr", RANK, ALPHA, -1),
    "oft": LayerUpdate("oft", RANK, ALPHA, 6),
    "locon": LayerUpdate("locon", RANK, ALPHA, has_middle=True),
}
CONFIGS = {
    "lora": LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["conv", "linear"]),
    "dora": LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["conv", "linear"], use_dora=True),
    "loha": LoHaConfig(r=RANK, alpha=ALPHA, target_modules=["conv", "linear"]),
    "lokr": LoKrConfig(r=RANK, alpha=ALPHA, target_modules=["conv", "linear"]),
    "oft": OFTConfig(r=0, oft_block_size=6, target_modules=["linear"]),
}
PREFIXES = {"lora_magnitude_vector": "dora_scale", "lora_down": "lora_A", "lora_up": "lora_B"}


class Branch(nn.Cell):
    def __init__(self):
        super().__init__()
        self.conv, self.linear = Conv2d(24, 36), Dense(36, 24)

    def construct(self, x):
        return self.linear(image_to_tokens(self.conv(x)))


class Branches(nn.Cell):
    """An image and what each branch should answer -> the sum of their errors, and each."""

    def __init__(self):
        super().__init__()
        for kind in KINDS:
            setattr(self, kind, Branch())
        self.branches = tuple(getattr(self, kind) for kind in KINDS)

    def construct(self, x, target_BLC):
        errors = ()
        for branch in self.branches:
            difference = branch(x) - target_BLC
            errors = errors + (mean(difference * difference, (0, 1, 2)),)
        errors = ops.stack(errors)
        return errors.sum(), errors


class TorchBranch(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.linear = torch.nn.Conv2d(24, 36, 3, padding=1), torch.nn.Linear(36, 24)

    def forward(self, x):
        return self.linear(self.conv(x).flatten(2).transpose(1, 2))


def reference(kind, weights):
    """A branch of torch with such adapters, and their factors by our names."""
    branch = TorchBranch()
    branch.load_state_dict({name: torch.tensor(value) for name, value in weights.items()})
    branch.requires_grad_(False)
    if kind == "locon":
        factors = {}
        for name, layer in (("conv", branch.conv), ("linear", branch.linear)):
            module = LoConModule(name, layer, lora_dim=RANK, alpha=ALPHA, use_tucker=True)
            module.apply_to()
            factors |= {f"{name}.{own}": parameter for own, parameter in module.named_parameters() if "lora" in own}
    else:
        inject_adapter_in_model(CONFIGS[kind], branch)
        factors = {name: parameter for name, parameter in branch.named_parameters() if parameter.requires_grad}
    named = {}
    for name, parameter in factors.items():
        layer, _, factor = name.replace(".default", "").partition(".")
        first, dot, rest = factor.partition(".")
        own = PREFIXES.get(first, first)
        named[f"{layer}.{own}{dot + rest if own.startswith('lora_') else ''}"] = parameter
    return branch, named


@pytest.fixture(scope="module")
def trained():
    """Both, from the same factors, which are all away from zero."""
    network = Branches()
    initialise(network, 0)
    base = {name: own.read() for name, own in public_parameters(network).items()}
    makers = {
        f"{kind}.{layer}": update.layer
        for kind, update in KINDS.items()
        for layer in ("conv", "linear")
        if (kind, layer) != ("oft", "conv")
    }
    image, target = normal(2, 24, 5, 4, seed=90), normal(2, 20, 24, seed=91)
    batch = from_public_layout(Tensor(image)), Tensor(target)
    plain = network(*batch)[1].asnumpy()
    # A middle factor is for convolutions.
    makers["locon.linear"] = KINDS["lora"].layer
    layers = inject(network, makers, None)
    initialise_lora(layers, 0)
    fresh = network(*batch)[1].asnumpy()
    parts = {f"{name}.{own}": part for name, layer in layers.items() for own, part in layer.parts.items()}
    for seed, (name, part) in enumerate(parts.items()):
        part.write((part.read() if "dora_scale" in name else 0) + 0.1 * normal(*part.shape, seed=seed))
    start = {name: part.read() for name, part in parts.items()}
    trainables = lora_trainables(layers)
    step = AccumulatingTrainStep(TrainStep(network, trainables, AdamW(trainables, Hyperparameters()), MAX_NORM))
    eager = ms.value_and_grad(network, None, trainables, has_aux=True)(*batch)
    losses, gradients = [], {}
    for number in range(STEPS):
        step.optimiser.prepare(number + 1, RATE)
        loss, *_ = step.take([batch])
        losses.append(float(loss.asnumpy()))
        if not gradients:
            sums = dict(zip(parts, step._update.sums, strict=True))
            gradients = {n: type(parts[n])(own, parts[n].layout).read() for n, own in sums.items()}
    return SimpleNamespace(
        **{"base": base, "start": start, "plain": plain, "fresh": fresh, "eager": eager, "batch": (image, target)},
        **{"losses": losses, "gradients": gradients, "parts": parts},
    )


@pytest.fixture(scope="module")
def expected(trained):
    """The same by torch."""
    image, target = map(torch.tensor, trained.batch)
    branches, factors = [], {}
    for kind in KINDS:
        own = {n.removeprefix(f"{kind}."): value for n, value in trained.base.items() if n.startswith(f"{kind}.")}
        branch, named = reference(kind, own)
        branches.append(branch)
        factors |= {f"{kind}.{name}": parameter for name, parameter in named.items()}
    assert factors.keys() == trained.start.keys()
    with torch.no_grad():
        for name, parameter in factors.items():
            parameter.copy_(torch.tensor(trained.start[name]).reshape(parameter.shape))
    optimiser = torch.optim.AdamW(factors.values(), RATE, weight_decay=1e-2)
    losses, gradients = [], {}
    for _ in range(STEPS):
        optimiser.zero_grad()
        loss = sum(((branch(image) - target) ** 2).mean() for branch in branches)
        loss.backward()
        gradients = gradients or {name: own.grad.numpy().copy() for name, own in factors.items()}
        torch.nn.utils.clip_grad_norm_(factors.values(), MAX_NORM)
        optimiser.step()
        losses.append(loss.item())
    return SimpleNamespace(losses=losses, gradients=gradients, factors=factors)


def test_fresh_ones_change_no_bit_of_a_graph(trained):
    assert trained.fresh.tobytes() == trained.plain.tobytes()


def test_the_losses_are_the_same(trained, expected):
    assert trained.losses == pytest.approx(expected.losses, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradients_are_the_same(trained, expected, kind):
    for name, value in expected.gradients.items():
        if name.startswith(f"{kind}."):
            assert relative_error(trained.gradients[name], value.reshape(trained.gradients[name].shape)) < 1e-5, name


@pytest.mark.parametrize("kind", KINDS)
def test_after_five_steps_the_factors_are_the_same(trained, expected, kind):
    for name, parameter in expected.factors.items():
        if name.startswith(f"{kind}."):
            own = trained.parts[name].read()
            way = parameter.detach().numpy().reshape(own.shape) - trained.start[name]
            # Adam divides a gradient by its own size, so where it is mostly rounding, so is a whole step.
            assert np.abs(own - trained.start[name] - way).max() < 2e-2 * RATE * STEPS, name
            assert np.abs(way).max() > 0.5 * RATE * STEPS


def test_pynative_is_the_graph(trained):
    (loss, _), gradients = trained.eager
    assert float(loss.asnumpy()) == pytest.approx(trained.losses[0], rel=1e-6)
    for (name, part), own in zip(trained.parts.items(), gradients, strict=True):
        value = part.layout.restore(own.asnumpy()) if part.layout else own.asnumpy()
        assert relative_error(value, trained.gradients[name]) < 1e-5, name
