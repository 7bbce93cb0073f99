"""The graphs that are compiled on Ascend, of the smallest networks with every kind of layer.

They are built where the device is set up already, in whatever formulation it has then.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

WORDS = 50
"""Of the vocabulary of the text encoders."""

Graph = tuple[Any, Sequence[Any]]
"""A cell and the inputs it is compiled for."""


def training_sdxl() -> list[Graph]:
    """SDXL's UNet and text encoders, with adapters on linear layers and convolutions, and dropout; these are trained,
    and what SDXL has beyond SD 1, of which all is.

    By gradients of a scaled loss, of Huber with masks, that are added up over batches, which has every operation of a
    step in one batch; and the running average of what is trained.
    """
    import numpy as np
    from mindspore import Tensor

    from dreambooth_ms.adapters.lora import DropoutState
    from dreambooth_ms.cli import toy_networks
    from dreambooth_ms.config.train import LossScalingConfig
    from dreambooth_ms.models.unet import UNet2DConditionModel
    from dreambooth_ms.training.methods import TextConditioned
    from dreambooth_ms.training.optimisers import AdamW, Hyperparameters
    from dreambooth_ms.training.step import AccumulatingTrainStep, DiffusionLoss, LossScaler, MovingAverage, TrainStep

    unet, encoders = UNet2DConditionModel(toy_networks.SDXL_UNET), _sdxl_text_encoders()
    targets = ["to_q", "to_k", "to_v", "to_out.0", "conv1"]
    trained = _all_trained(unet, encoders, targets, DropoutState(0.1, 0))
    own = ("lora_", "add_embedding", "text_projection", "proj_in", "proj_out")
    trainables = [parameter for parameter in trained if any(part in parameter.name for part in own)]
    optimiser = AdamW(trainables, Hyperparameters())
    loss = DiffusionLoss(TextConditioned(unet, encoders), ("mask", "huber_c"))
    step = AccumulatingTrainStep(TrainStep(loss, trainables, optimiser, 1.0, scaler=LossScaler(LossScalingConfig())))
    batch = toy_networks.batch(
        input_ids=_token_ids(2),
        end_mask=_ends(),
        time_ids=toy_networks.add_time_ids(),
    )
    extras = {"mask": np.ones_like(batch.target), "huber_c": np.ones_like(batch.weight)}
    batch = replace(batch, extras=extras)
    return [
        (step._add_gradients, (Tensor(True), *batch.tensors())),
        (step._update, ()),
        (MovingAverage(trainables, 0.9), (toy_networks.normal("share"),)),
    ]


def training_sd() -> list[Graph]:
    """A whole step of SD 1, whose transformers begin and end with convolutions: UNet and text encoder, all trained.

    With adapters on linear layers and on those convolutions, the keys and values of Custom Diffusion, and new words.
    """
    import numpy as np

    from dreambooth_ms.adapters.cross_attention import free_cross_attention
    from dreambooth_ms.cli import toy_networks
    from dreambooth_ms.models.unet import UNet2DConditionModel
    from dreambooth_ms.training.methods import TextConditioned
    from dreambooth_ms.training.optimisers import AdamW, Hyperparameters
    from dreambooth_ms.training.step import DiffusionLoss, TrainStep

    unet, encoders = UNet2DConditionModel(toy_networks.SD_UNET), _sd_text_encoders()
    free_cross_attention(unet, "crossattn_kv")
    for encoder in encoders.networks().values():
        encoder.add_words(np.zeros((2, encoder.spec.transformer.hidden_size), np.float32))
    trainables = _all_trained(unet, encoders, ["to_q", "proj_in", "proj_out"])
    optimiser = AdamW(trainables, Hyperparameters())
    loss = DiffusionLoss(TextConditioned(unet, encoders))
    step = TrainStep(loss, trainables, optimiser, 1.0)
    return [(step, toy_networks.batch(input_ids=_token_ids(words=WORDS + 2)).tensors())]


def recomputing() -> list[Graph]:
    """A whole step of SD 1 with gradient checkpointing: adapters of the UNet and the text encoder."""
    from dreambooth_ms.adapters.lora import inject_lora, lora_trainables
    from dreambooth_ms.cli import toy_networks
    from dreambooth_ms.models.unet import Segments, UNet2DConditionModel
    from dreambooth_ms.training.methods import TextConditioned
    from dreambooth_ms.training.optimisers import AdamW, Hyperparameters
    from dreambooth_ms.training.step import DiffusionLoss, TrainStep
    from dreambooth_ms.weights.bundle import CLIP_TARGETS

    unet, encoders = UNet2DConditionModel(toy_networks.SD_UNET), _sd_text_encoders()
    layers = [inject_lora(unet, 2, 2.0, ["to_q"])]
    layers += [inject_lora(network, 2, 2.0, CLIP_TARGETS) for network in encoders.networks().values()]
    trainables = [parameter for adapted in layers for parameter in lora_trainables(adapted)]
    optimiser = AdamW(trainables, Hyperparameters())
    loss = DiffusionLoss(TextConditioned(unet, encoders))
    step = TrainStep(loss, trainables, optimiser, 1.0, recomputed=Segments(unet, encoders))
    return [(step, toy_networks.batch(input_ids=_token_ids()).tensors())]


def training_other_kinds() -> list[Graph]:
    """A whole step of layers with the other kinds of adapters, convolutions and linear layers, in half precision.

    The penalty on what they add is part of the loss.
    """
    import mindspore as ms
    from mindspore import nn

    from dreambooth_ms.adapters.layer_updates import LayerUpdate
    from dreambooth_ms.adapters.lora import inject, lora_trainables
    from dreambooth_ms.adapters.precision import compute_in
    from dreambooth_ms.cli import toy_networks
    from dreambooth_ms.ops import Conv2d, Dense, total
    from dreambooth_ms.ops.layout import image_to_tokens
    from dreambooth_ms.training.optimisers import AdamW, Hyperparameters
    from dreambooth_ms.training.step import TrainStep

    of_kernels = [LayerUpdate("locon", 2, 2.0, has_middle=True), LayerUpdate("lora", 2, 2.0)]
    of_all = [LayerUpdate("dora", 2, 2.0), LayerUpdate("loha", 2, 2.0), LayerUpdate("lokr", 2, 2.0, -1)]
    of_linear = [LayerUpdate("oft", 2, 2.0, 8), LayerUpdate("lora", 2, 2.0, is_principal=True)]
    kernels, linears = [*of_kernels, *of_all], [*of_all, *of_linear]

    class Network(nn.Cell):
        def __init__(self) -> None:
            super().__init__()
            self.kernels = nn.CellList([Conv2d(24, 24) for _ in kernels])
            self.linears = nn.CellList([Dense(24, 24) for _ in linears])

        def construct(self, x: Any) -> Any:
            penalty = 0.0
            for kernel in self.kernels:
                x = kernel(x)
                penalty = penalty + kernel.squared_change()
            rows = image_to_tokens(x)
            for linear in self.linears:
                rows = linear(rows)
                penalty = penalty + linear.squared_change()
            rows = rows.astype(ms.float32)
            loss = total(rows * rows) + penalty
            return loss, loss

    network = Network()
    places = {"kernels": kernels, "linears": linears}
    makers = {f"{name}.{i}": one.layer for name, own in places.items() for i, one in enumerate(own)}
    trainables = lora_trainables(inject(network, makers, None))
    compute_in(network, ms.float16)
    step = TrainStep(network, trainables, AdamW(trainables, Hyperparameters()), 1.0)
    return [(step, (toy_networks.normal("image", 2, 24, 8, 6).astype(ms.float16),))]


def training_if() -> list[Graph]:
    """A whole step of DeepFloyd IF's second stage, all trained, with adapters; and of XLM-R before SD 1's UNet, whose
    text encoder alone is trained."""
    from dreambooth_ms.adapters.lora import inject_lora, lora_trainables
    from dreambooth_ms.cli import toy_networks
    from dreambooth_ms.models.unet import UNet2DConditionModel
    from dreambooth_ms.training.methods import TextConditioned
    from dreambooth_ms.training.optimisers import AdamW, Hyperparameters
    from dreambooth_ms.training.step import DiffusionLoss, TrainStep
    from dreambooth_ms.weights.bundle import XLM_R_TARGETS

    unet = UNet2DConditionModel(toy_networks.IF_UNET)
    inject_lora(unet, 2, 2.0, ["to_q", "add_k_proj"])
    trainables = [parameter for parameter in unet.get_parameters() if parameter.shape]
    step = TrainStep(DiffusionLoss(unet), trainables, AdamW(trainables, Hyperparameters()), 1.0)
    label, text = toy_networks.normal("label", 2), toy_networks.normal("T5", 2, toy_networks.TOKENS, 24)
    batch = toy_networks.batch(3, encoder_hidden_states=text, class_labels=label)
    twice = batch.inputs["sample"].repeat(2, axis=1)
    of_if = (step, replace(batch, inputs=batch.inputs | {"sample": twice}).tensors())

    encoders = _xlm_r()
    (encoder,) = encoders.networks().values()
    trained = lora_trainables(inject_lora(encoder, 2, 2.0, XLM_R_TARGETS))
    reading = TextConditioned(UNet2DConditionModel(toy_networks.SD_UNET), encoders)
    step = TrainStep(DiffusionLoss(reading), trained, AdamW(trained, Hyperparameters()), 1.0)
    return [of_if, (step, toy_networks.batch(input_ids=_token_ids()).tensors())]


def optimisers() -> list[Graph]:
    """The updates of the other optimisers, and of AdamW where two processes share its state (ZeRO 1).

    Of a few tensors of every kind, by gradients of a scaled loss, so that each update has the choice to be skipped.
    """
    from unittest import mock

    from mindspore import Parameter

    from dreambooth_ms.cli import toy_networks
    from dreambooth_ms.processes.group import Processes
    from dreambooth_ms.runtime.collective import SumOverProcesses
    from dreambooth_ms.training.flat_vectors import AdamW8bit, Prodigy
    from dreambooth_ms.training.optimisers import Adafactor, AdamW, Hyperparameters, Optimiser, ShardedOptimiser

    shapes = {"factor": (16, 2), "bias": (24,), "kernel": (8, 4, 3, 3)}
    trainables = [Parameter(toy_networks.normal(name, *shape), name=name) for name, shape in shapes.items()]
    decays = [1.0, 0.5, 0.5]

    def of_part(start: int, stop: int) -> Optimiser:
        return AdamW(trainables[start:stop], Hyperparameters())

    whole: list[Optimiser] = [
        AdamW8bit(trainables, Hyperparameters(), decay_factors=decays),
        Adafactor(trainables, Hyperparameters(scale_parameter=True), decay_factors=decays),
        Prodigy(trainables, Hyperparameters(), decay_factors=decays),
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
    """SD 1's text encoder, and guided denoising steps in half precision, one of which inpaints. The autoencoder is the
    same as SDXL's."""
    from dreambooth_ms.cli import toy_networks

    inpainting = replace(toy_networks.SD_UNET, in_channels=9)
    return [(_sd_text_encoders(), (_token_ids(),)), _denoising(toy_networks.SD_UNET), _denoising(inpainting)]


def sampling_if() -> list[Graph]:
    """T5's encoder, XLM-R with a pre-transformation, and a guided denoising step of IF's second stage, which predicts
    the variance, in half precision."""
    from dreambooth_ms.cli import toy_networks
    from dreambooth_ms.models.specs import T5Spec
    from dreambooth_ms.models.t5 import T5EncoderModel

    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 4}
    t5 = _named(T5EncoderModel(T5Spec(vocab_size=WORDS, **sizes), use_attention_mask=True))
    label = toy_networks.normal("labels", 2)
    ids = _token_ids()
    return [(t5, (ids,)), (_xlm_r(True), (ids,)), _denoising(toy_networks.IF_UNET, label)]


def fused_attention() -> list[Graph]:
    """Ascend's fused attention and its gradient: of a head whose size is a multiple of 16, and of SD 1's of 40."""
    return [_attention_gradient(16), _attention_gradient(40)]


def wide_attention() -> list[Graph]:
    """An attention and its gradient with a head that is too wide for the fused one."""
    return [_attention_gradient(528)]


GRAPHS: dict[str, Callable[[], list[Graph]]] = {
    "training SDXL": training_sdxl,
    "training SD": training_sd,
    "recomputing": recomputing,
    "training other kinds": training_other_kinds,
    "training IF": training_if,
    "optimisers": optimisers,
    "sampling SDXL": sampling_sdxl,
    "sampling SD": sampling_sd,
    "sampling IF": sampling_if,
    "fused attention": fused_attention,
    "wide attention": wide_attention,
}


def _token_ids(tokenizers: int = 1, words: int = WORDS) -> Any:
    """Token ids (B, T * S) int32."""
    import numpy as np
    from mindspore import Tensor

    from dreambooth_ms.cli.toy_networks import ROWS, TOKENS

    count = tokenizers * TOKENS
    return Tensor((np.arange(ROWS * count).reshape(ROWS, count) * 7 % words).astype(np.int32))


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
    from dreambooth_ms.models.clip import CLIPTextModel

    spec = _text_spec()
    pooling = replace(spec, transformer=replace(spec.transformer, hidden_act="gelu"), projection_dim=POOLED)
    return _named(CLIPTextModel(spec, last_layer=False), CLIPTextModel(pooling))


def _sd_text_encoders() -> Any:
    from dreambooth_ms.models.clip import CLIPTextModel

    return _named(CLIPTextModel(_text_spec()))


def _xlm_r(has_pre_transformation: bool = False) -> Any:
    """AltDiffusion's text encoder, as wide as SD 1's."""
    from dreambooth_ms.models.roberta import RobertaSeriesModelWithTransformation
    from dreambooth_ms.models.specs import RobertaSpec

    own: dict[str, Any] = {"max_position_embeddings": 100, "type_vocab_size": 1, "project_dim": 32}
    transformer = replace(_text_spec().transformer, hidden_act="gelu")
    spec = RobertaSpec(transformer=transformer, vocab_size=WORDS, **own, has_pre_transformation=has_pre_transformation)
    return _named(RobertaSeriesModelWithTransformation(spec))


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
    from dreambooth_ms.weights.bundle import CLIP_TARGETS

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
    from dreambooth_ms.training.optimisers import zeros_like
    from dreambooth_ms.training.step import ClipByGlobalNorm, LossScaler, Update, _UpdateFromSums

    sums = ParameterTuple([zeros_like(parameter, "gradient") for parameter in trainables])
    clip = ClipByGlobalNorm([total.shape for total in sums], 1.0)
    update = Update(optimiser, clip, sum_gradients, LossScaler(LossScalingConfig()))
    return _UpdateFromSums(sums, update), ()


def _denoising(spec: Any, *others: Any) -> Graph:
    """A guided denoising step of a UNet, in half precision."""
    import mindspore as ms

    from dreambooth_ms.adapters.precision import compute_in
    from dreambooth_ms.cli import toy_networks
    from dreambooth_ms.models.unet import UNet2DConditionModel
    from dreambooth_ms.sampling.schedulers import Denoiser

    unet = UNet2DConditionModel(spec)
    for parameter in unet.get_parameters():
        parameter.requires_grad = False
    compute_in(unet, ms.float16)
    latents = toy_networks.normal("latents", 1, spec.in_channels, toy_networks.SIDE, toy_networks.SIDE)
    number = toy_networks.normal("numbers", 2)
    text = toy_networks.normal("text", toy_networks.ROWS, toy_networks.TOKENS, spec.text_width)
    denoiser = Denoiser(unet, guided=True, rescaled=True, variance=spec.out_channels == 6)
    return denoiser, (latents, number[:1], number[:2], text, *others)


def _attention_gradient(head_dim: int) -> Graph:
    """The gradient of an attention of two such heads, in half precision."""
    import mindspore as ms
    from mindspore import Tensor, nn, ops

    from dreambooth_ms.cli import toy_networks
    from dreambooth_ms.ops import MultiHeadAttention

    class Gradient(nn.Cell):
        def __init__(self) -> None:
            super().__init__()
            self.differentiate = ops.grad(MultiHeadAttention(2, head_dim), (0, 1, 2))

        def construct(self, q: Any, k: Any, v: Any) -> Any:
            return self.differentiate(q, k, v)

    def half(name: str, tokens: int) -> Tensor:
        return toy_networks.normal(name, toy_networks.ROWS, tokens, 2 * head_dim).astype(ms.float16)

    return Gradient(), (half("q", 64), half("k", toy_networks.TOKENS), half("v", toy_networks.TOKENS))
