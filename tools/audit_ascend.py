"""Check that MindSpore has, for Ascend, every operation of the graphs that are compiled there; no card is needed.

    python -m tools.audit_ascend          # a table of all primitives; status 1 if one is not covered and not explained
    python -m tools.audit_ascend --graph optimisers

The graphs are those of the smallest networks with every kind of layer, in Ascend's formulation. MindSpore's front end
compiles them on CPU, without a backend, so that Ascend's own kernels stay in them by name; what is listed is its last
graph before a backend takes over. A primitive is covered if its documentation names Ascend, or if the wheel brings a
kernel for it: a class in its library for Ascend, or an entry in its registry of AI CPU kernels. Control nodes, which
the runtime executes itself, need none.

What this can't show: that a kernel accepts these shapes and dtypes, and that what it computes is right. And where
MindSpore chooses between primitives by the device, it has chosen CPU's.
"""

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

WORDS = 50
"""Of the vocabulary of the text encoders."""

# What the runtime does itself: values, order and parameters. No kernel is needed.
CONTROL = frozenset({"Load", "MakeTuple", "TupleGetItem", "Depend", "UpdateState", "Return", "make_tuple"})

EXPLAINED = {
    "AdamWeightDecay": "a pass of the Ascend backend, AdamWeightDecayUnifyMindIR, makes smaller ones of it (looked up)",
    "Conv2DBackpropFilter": "a gradient of Conv2D, which is documented for Ascend; not documented itself",
    "Conv2DBackpropInput": "a gradient of Conv2D, which is documented for Ascend; as an operation for users deprecated",
    "TensorMove": "a copy; passes of the Ascend backend, such as InsertTensorMoveForCommunication, make it (looked up)",
}
"""Primitives that have no document or kernel of their own, or no kernel of their own, with the reason."""

DTYPES = frozenset({"Float32", "Float16", "BFloat16", "Int32", "Int64", "Bool"})
"""What these graphs may hold. Ascend's cube unit has no float64, and a stray one would go to the AI CPU."""

EXPLAINED_DTYPES = {
    ("Assign", "UInt8"): "sets the codes of 8-bit AdamW; documented without a limit of dtypes",
    ("Cast", "UInt8"): "codes to and from int32 and int64, pairs that the registry of AI CPU kernels has (looked up)",
    ("Select", "UInt8"): "keeps the codes in a step that is skipped; the registry of AI CPU kernels has it (looked up)",
}
"""Other dtypes of primitives, with the reason why they may be there."""


@dataclass
class Use:
    """How one primitive is used."""

    count: int = 0
    dtypes: set[str] = field(default_factory=set)
    graphs: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class Evidence:
    """What MindSpore's wheel says of a primitive on Ascend."""

    documented: bool
    kernel: bool
    aicpu: bool

    def __str__(self) -> str:
        words = [name for name in ("documented", "kernel", "aicpu") if getattr(self, name)]
        return ", ".join(words) or "-"


# --- The graphs, in a process of their own ---

Graph = tuple[Any, Sequence[Any]]
"""A cell and the inputs it is compiled for."""


def training_sdxl() -> list[Graph]:
    """SDXL's UNet and text encoders, with adapters on linear layers and convolutions, and dropout; all of it trained.

    By gradients of a scaled loss that are added up over batches, which has every operation of a step in one batch; and
    the running average of what is trained.
    """
    from mindspore import Tensor

    from dreambooth_ms.adapters.dropout import DropoutState
    from dreambooth_ms.cli import toy_networks
    from dreambooth_ms.config.train import LossScalingConfig
    from dreambooth_ms.models.unet import UNet2DConditionModel
    from dreambooth_ms.training.ema import MovingAverage
    from dreambooth_ms.training.loss_scaling import LossScaler
    from dreambooth_ms.training.methods import TextConditioned
    from dreambooth_ms.training.optimisers import AdamW, AdamWHyperparameters
    from dreambooth_ms.training.step import AccumulatingTrainStep, DiffusionLoss, TrainStep

    unet, encoders = UNet2DConditionModel(toy_networks.SDXL_UNET), _sdxl_text_encoders()
    targets = ["to_q", "to_k", "to_v", "to_out.0", "conv1"]
    trainables = _all_trained(unet, encoders, targets, DropoutState(0.1, 0))
    optimiser = AdamW(trainables, AdamWHyperparameters())
    loss = DiffusionLoss(TextConditioned(unet, encoders))
    step = AccumulatingTrainStep(TrainStep(loss, trainables, optimiser, 1.0, scaler=LossScaler(LossScalingConfig())))
    batch = toy_networks.batch(
        input_ids=_token_ids(2),
        end_mask=_ends(),
        time_ids=toy_networks.add_time_ids(),
    )
    return [
        (step._add_gradients, (Tensor(True), *batch.tensors())),
        (step._update, ()),
        (MovingAverage(trainables, 0.9)._update, (toy_networks.normal("share"),)),
    ]


def training_sd() -> list[Graph]:
    """A whole step of SD 1, whose transformers begin and end with convolutions: UNet and text encoder, all trained.

    With adapters on linear layers and on those convolutions.
    """
    from dreambooth_ms.cli import toy_networks
    from dreambooth_ms.models.unet import UNet2DConditionModel
    from dreambooth_ms.training.methods import TextConditioned
    from dreambooth_ms.training.optimisers import AdamW, AdamWHyperparameters
    from dreambooth_ms.training.step import DiffusionLoss, TrainStep

    unet, encoders = UNet2DConditionModel(toy_networks.SD_UNET), _sd_text_encoders()
    trainables = _all_trained(unet, encoders, ["to_q", "proj_in", "proj_out"])
    optimiser = AdamW(trainables, AdamWHyperparameters())
    loss = DiffusionLoss(TextConditioned(unet, encoders))
    step = TrainStep(loss, trainables, optimiser, 1.0)
    return [(step, toy_networks.batch(input_ids=_token_ids()).tensors())]


def recomputing() -> list[Graph]:
    """A whole step of SD 1 with gradient checkpointing: adapters of the UNet and the text encoder."""
    from dreambooth_ms.adapters.lora import inject_lora, lora_trainables
    from dreambooth_ms.cli import toy_networks
    from dreambooth_ms.models.segments import Segments
    from dreambooth_ms.models.unet import UNet2DConditionModel
    from dreambooth_ms.training.methods import TextConditioned
    from dreambooth_ms.training.optimisers import AdamW, AdamWHyperparameters
    from dreambooth_ms.training.step import DiffusionLoss, TrainStep
    from dreambooth_ms.weights.roles import CLIP_TARGETS

    unet, encoders = UNet2DConditionModel(toy_networks.SD_UNET), _sd_text_encoders()
    layers = [inject_lora(unet, 2, 2.0, ["to_q"])]
    layers += [inject_lora(network, 2, 2.0, CLIP_TARGETS) for network in encoders.networks().values()]
    trainables = [parameter for adapted in layers for parameter in lora_trainables(adapted)]
    optimiser = AdamW(trainables, AdamWHyperparameters())
    loss = DiffusionLoss(TextConditioned(unet, encoders))
    step = TrainStep(loss, trainables, optimiser, 1.0, recomputed=Segments(unet, encoders))
    return [(step, toy_networks.batch(input_ids=_token_ids()).tensors())]


def optimisers() -> list[Graph]:
    """The updates of the other optimisers, and of AdamW where two processes share its state (ZeRO 1).

    Of a few tensors of every kind, by gradients of a scaled loss, so that each update has the choice to be skipped.
    """
    from unittest import mock

    from mindspore import Parameter

    from dreambooth_ms.cli import toy_networks
    from dreambooth_ms.processes.group import Processes
    from dreambooth_ms.runtime.collective import SumOverProcesses
    from dreambooth_ms.training.adafactor import Adafactor, AdafactorHyperparameters
    from dreambooth_ms.training.adamw_8bit import AdamW8bit
    from dreambooth_ms.training.optimisers import AdamW, AdamWHyperparameters, Optimiser
    from dreambooth_ms.training.prodigy import Prodigy, ProdigyHyperparameters
    from dreambooth_ms.training.sharding import ShardedOptimiser

    shapes = {"factor": (16, 2), "bias": (24,), "kernel": (8, 4, 3, 3)}
    trainables = [Parameter(toy_networks.normal(name, *shape), name=name) for name, shape in shapes.items()]
    decays = [1.0, 0.5, 0.5]

    def of_part(start: int, stop: int) -> Optimiser:
        return AdamW(trainables[start:stop], AdamWHyperparameters())

    whole: list[Optimiser] = [
        AdamW8bit(trainables, AdamWHyperparameters(), decay_factors=decays),
        Adafactor(trainables, AdafactorHyperparameters(scale_parameter=True), decay_factors=decays),
        Prodigy(trainables, ProdigyHyperparameters(), decay_factors=decays),
    ]
    # What MindSpore asks of its collective library, which does not run here; the graph is that of the first process.
    with mock.patch("mindspore.ops.operations.comm_ops.get_group_size", return_value=2):
        pair = Processes(rank=0, count=2, exchange=lambda what, value: [value, value])
        shared = _update(trainables, ShardedOptimiser(trainables, of_part, pair), SumOverProcesses())
    return [*(_update(trainables, optimiser) for optimiser in whole), shared]


def sampling_sdxl() -> list[Graph]:
    """Text encoders, a guided denoising step in half precision, and the autoencoder both ways."""
    from dreambooth_ms.cli import toy_networks
    from dreambooth_ms.models.layers import CellMethod
    from dreambooth_ms.models.vae import AutoencoderKL

    vae, side = AutoencoderKL(toy_networks.VAE), toy_networks.SIDE
    pooled = (toy_networks.normal("pooled", toy_networks.ROWS, toy_networks.POOLED), toy_networks.add_time_ids())
    return [
        (_sdxl_text_encoders(), (_token_ids(2), _ends())),
        _denoising(toy_networks.SDXL_UNET, *pooled),
        (CellMethod(vae.decode), (toy_networks.normal("latents", 1, toy_networks.VAE.latent_channels, side, side),)),
        (
            CellMethod(vae.encode),
            (toy_networks.normal("picture", 1, toy_networks.VAE.in_channels, 2 * side, 2 * side),),
        ),
    ]


def sampling_sd() -> list[Graph]:
    """SD 1's text encoder, and a guided denoising step in half precision. The autoencoder is the same as SDXL's."""
    from dreambooth_ms.cli import toy_networks

    return [(_sd_text_encoders(), (_token_ids(),)), _denoising(toy_networks.SD_UNET)]


def fused_attention() -> list[Graph]:
    """Ascend's fused attention and its gradient, which half precision gets."""
    import mindspore as ms
    from mindspore import Tensor

    from dreambooth_ms.cli import toy_networks
    from dreambooth_ms.ops import MultiHeadAttention

    def half(name: str, tokens: int) -> Tensor:
        return toy_networks.normal(name, toy_networks.ROWS, tokens, 32).astype(ms.float16)

    inputs = half("q", 64), half("k", toy_networks.TOKENS), half("v", toy_networks.TOKENS)
    return [(_attention_gradient(MultiHeadAttention(2, 16)), inputs)]


GRAPHS: dict[str, Callable[[], list[Graph]]] = {
    "training SDXL": training_sdxl,
    "training SD": training_sd,
    "recomputing": recomputing,
    "optimisers": optimisers,
    "sampling SDXL": sampling_sdxl,
    "sampling SD": sampling_sd,
    "fused attention": fused_attention,
}


def _token_ids(tokenizers: int = 1) -> Any:
    """Token ids (B, T * S) int32."""
    import numpy as np
    from mindspore import Tensor

    from dreambooth_ms.cli.toy_networks import ROWS, TOKENS

    count = tokenizers * TOKENS
    return Tensor((np.arange(ROWS * count).reshape(ROWS, count) * 7 % WORDS).astype(np.int32))


def _ends() -> Any:
    """Where the texts end (B, S)."""
    import numpy as np
    from mindspore import Tensor

    from dreambooth_ms.cli.toy_networks import TOKENS

    return Tensor(np.eye(TOKENS, dtype=np.float32)[[5, 9]])


def _text_spec() -> Any:
    from dreambooth_ms.models.specs import ClipTextSpec, TransformerSpec

    transformer = TransformerSpec(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    return ClipTextSpec(transformer=transformer, vocab_size=WORDS, eos_token_id=WORDS - 1)


def _sdxl_text_encoders() -> Any:
    from dreambooth_ms.cli.toy_networks import POOLED
    from dreambooth_ms.models.clip import CLIPTextModel, CLIPTextModelWithProjection

    spec = _text_spec()
    pooling = replace(spec, transformer=replace(spec.transformer, hidden_act="gelu"), projection_dim=POOLED)
    return _named(CLIPTextModel(spec, last_layer=False), CLIPTextModelWithProjection(pooling))


def _sd_text_encoders() -> Any:
    from dreambooth_ms.models.clip import CLIPTextModel

    return _named(CLIPTextModel(_text_spec()))


def _named(*networks: Any) -> Any:
    """All text encoders, each with its parameters' public names."""
    from dreambooth_ms.models.parameters import public_parameters
    from dreambooth_ms.models.text import TextEncoders

    for network in networks:
        public_parameters(network)
    return TextEncoders(dict(zip(("text_encoder", "text_encoder_2"), networks, strict=False)))


def _all_trained(unet: Any, encoders: Any, targets: Sequence[str], dropout: Any = None) -> list[Any]:
    """All parameters of a UNet and its text encoders, after adapters were put into them."""
    from dreambooth_ms.adapters.lora import inject_lora
    from dreambooth_ms.weights.roles import CLIP_TARGETS

    inject_lora(unet, 2, 2.0, targets, dropout)
    for encoder in encoders.networks().values():
        inject_lora(encoder, 2, 2.0, CLIP_TARGETS, dropout)
    # Scalars are scales and the state of the dropout.
    networks = [unet, *encoders.networks().values()]
    return [parameter for network in networks for parameter in network.get_parameters() if parameter.shape]


def _update(trainables: Sequence[Any], optimiser: Any, sum_gradients: Any = None) -> Graph:
    """An update by this optimiser, from gradients that were added up."""
    from mindspore import ParameterTuple

    from dreambooth_ms.config.train import LossScalingConfig
    from dreambooth_ms.training.loss_scaling import LossScaler
    from dreambooth_ms.training.optimisers import zeros_like
    from dreambooth_ms.training.step import ClipByGlobalNorm, Update, _UpdateFromSums

    sums = ParameterTuple([zeros_like(parameter, "gradient") for parameter in trainables])
    clip = ClipByGlobalNorm([total.shape for total in sums], 1.0)
    update = Update(optimiser, clip, sum_gradients, LossScaler(LossScalingConfig()))
    return _UpdateFromSums(sums, update), ()


def _denoising(spec: Any, *pooled_and_sizes: Any) -> Graph:
    """A guided denoising step of a UNet, in half precision."""
    import mindspore as ms

    from dreambooth_ms.adapters.precision import compute_in
    from dreambooth_ms.cli import toy_networks
    from dreambooth_ms.models.unet import UNet2DConditionModel
    from dreambooth_ms.sampling.denoiser import Denoiser

    unet = UNet2DConditionModel(spec)
    for parameter in unet.get_parameters():
        parameter.requires_grad = False
    compute_in(unet, ms.float16)
    latents = toy_networks.normal("latents", 1, spec.in_channels, toy_networks.SIDE, toy_networks.SIDE)
    number = toy_networks.normal("numbers", 2)
    text = toy_networks.normal("text", toy_networks.ROWS, toy_networks.TOKENS, spec.cross_attention_dim)
    return Denoiser(unet, guided=True, rescaled=True), (latents, number[:1], number[:2], text, *pooled_and_sizes)


def _attention_gradient(attention: Any) -> Any:
    from mindspore import nn, ops

    class Gradient(nn.Cell):
        def __init__(self) -> None:
            super().__init__()
            self.differentiate = ops.grad(attention, (0, 1, 2))

        def construct(self, q: Any, k: Any, v: Any) -> Any:
            return self.differentiate(q, k, v)

    return Gradient()


def compile_graphs(chosen: Sequence[str]) -> None:
    """Compile these graphs, in a process whose environment makes MindSpore write them down."""
    from dreambooth_ms.runtime.device import Formulation, set_up_device
    from tools.formulation import use_formulation

    set_up_device("CPU", 0)
    with use_formulation(Formulation.ASCEND, cpu_kernels=False):
        for name in chosen:
            for cell, inputs in GRAPHS[name]():
                cell.compile(*inputs)


def dump(chosen: Sequence[str], folder: Path) -> None:
    """Have MindSpore write the last graphs of its front end into the folder.

    Raises:
        subprocess.CalledProcessError: they do not compile.
    """
    switches = {
        "MS_DEV_PRECOMPILE_ONLY": "1",
        "MS_DEV_SAVE_GRAPHS": "1",
        "MS_DEV_DUMP_IR_PASSES": "validate",
        "MS_DEV_SAVE_GRAPHS_PATH": str(folder),
        "MS_COMPILER_CACHE_ENABLE": "0",
    }
    command = [sys.executable, "-m", "tools.audit_ascend", "--compile", *chosen]
    subprocess.run(command, env=os.environ | switches, check=True, cwd=Path(__file__).parents[1])


# --- What is in them ---

_NODE = re.compile(r"^  %\d+\([^)]*\) = (?:PrimFunc_)?(\w+)\(.*\n      : \((.*)\) -> \((.*)\)$", re.MULTILINE)
_TENSOR = re.compile(r"Tensor\[(\w+)\]")


def primitives(ir: str) -> dict[str, Use]:
    """The primitives of a graph as MindSpore writes it down, with the dtypes of the tensors they take and give."""
    uses: dict[str, Use] = {}
    for name, inputs, outputs in _NODE.findall(ir):
        use = uses.setdefault(name, Use())
        use.count += 1
        use.dtypes.update(_TENSOR.findall(f"{inputs} {outputs}"))
    return uses


def audited(chosen: Sequence[str]) -> dict[str, Use]:
    """The primitives of all these graphs."""
    total: dict[str, Use] = {}
    for name in chosen:
        with TemporaryDirectory() as folder:
            dump([name], Path(folder))
            files = list(Path(folder).rglob("*_validate_*.ir"))
            if not files:
                raise SystemExit(f"{name}: MindSpore wrote no graph down")
            for file in files:
                for primitive, use in primitives(file.read_text(encoding="utf-8")).items():
                    known = total.setdefault(primitive, Use())
                    known.count += use.count
                    known.dtypes |= use.dtypes
                    known.graphs.add(name)
    return total


# --- What MindSpore has for Ascend ---


class Wheel:
    """What the installed MindSpore says and brings for Ascend."""

    def __init__(self) -> None:
        import mindspore as ms

        root = Path(ms.__file__).parent
        self._kernels = kernel_names((root / "lib" / "plugin" / "libmindspore_ops_ascend.so").read_bytes())
        registry = root / "ops" / "_op_impl" / "aicpu"
        self._aicpu = {
            name for file in registry.glob("*.py") for name in re.findall(r'AiCPURegOp\("(\w+)"', file.read_text())
        }

    def evidence(self, primitive: str) -> Evidence:
        """What there is of a primitive."""
        return Evidence(_is_documented(primitive), primitive in self._kernels, primitive in self._aicpu)


def kernel_names(library: bytes) -> set[str]:
    """Primitives that a graph has a kernel class for, by the type information in a library.

    It names a class by the lengths and names of its scopes: N9mindspore6kernel4muls10MulsAscendE. The scope `pyboost`
    holds the kernels of the eager mode, which are not what a graph runs.
    """
    names = set()
    for found in re.finditer(rb"N9mindspore6kernel(?=\d)", library):
        position, scopes = found.end(), []
        while length := re.compile(rb"\d+").match(library, position):
            position = length.end() + int(length[0])
            scopes.append(library[length.end() : position].decode(errors="replace"))
        of = re.fullmatch(r"Aclnn(\w+)KernelMod|(\w+)AclnnKernelMod|(\w+)Ascend|Hcom(\w+)Kernel", scopes[-1])
        if of and "pyboost" not in scopes:
            names.add(next(name for name in of.groups() if name))
    return names


def _is_documented(primitive: str) -> bool:
    """Whether the documentation of a primitive, or of a function of its name, lists Ascend among its platforms."""
    from mindspore import ops
    from mindspore.ops.auto_generate import gen_ops_def, gen_ops_prim
    from mindspore.ops.operations import _grad_ops

    snake_case = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", primitive).lower()
    places = [(place, primitive) for place in (ops, gen_ops_prim, _grad_ops)]
    places += [(place, name) for place in (ops, gen_ops_def) for name in (snake_case, primitive.lower())]
    texts = [getattr(place, name).__doc__ or "" for place, name in places if hasattr(place, name)]
    return any("``Ascend``" in text.partition("Supported Platforms:")[2].partition("Examples:")[0] for text in texts)


def findings(uses: dict[str, Use], wheel: Wheel) -> list[str]:
    """What is neither covered nor explained, one line each."""
    problems = []
    for name, use in sorted(uses.items()):
        if name in CONTROL:
            continue
        evidence = wheel.evidence(name)
        if not (evidence.documented or evidence.kernel or evidence.aicpu or name in EXPLAINED):
            problems.append(f"{name}: nothing in MindSpore says that Ascend has it")
        odd = {dtype for dtype in use.dtypes - DTYPES if (name, dtype) not in EXPLAINED_DTYPES}
        if odd:
            problems.append(f"{name}: has {', '.join(sorted(odd))}")
    return problems


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--graph", nargs="+", choices=list(GRAPHS), default=list(GRAPHS), help="which (default: all)")
    parser.add_argument("--compile", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.compile:
        compile_graphs(args.compile)
        return 0
    uses, wheel = audited(args.graph), Wheel()
    print(f"{'primitive':24} {'count':>6}  {'dtypes':32} evidence")
    for name, use in sorted(uses.items()):
        said = "done by the runtime" if name in CONTROL else str(wheel.evidence(name))
        if name in EXPLAINED:
            said += f"; {EXPLAINED[name]}"
        said += "".join(f"; {dtype}: {why}" for (of, dtype), why in EXPLAINED_DTYPES.items() if of == name)
        print(f"{name:24} {use.count:6}  {', '.join(sorted(use.dtypes)):32} {said}")
    problems = findings(uses, wheel)
    for problem in problems:
        print(f"NOT COVERED  {problem}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
