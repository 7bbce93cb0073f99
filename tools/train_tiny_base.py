"""Train the embedded base, checkpoints/tiny-shapes, from scratch: a VAE and CLIP, then the UNet and a better decoder.

    python -m tools.train_tiny_base               # stopped and started again, it goes on
    python -m tools.train_tiny_base --sharpen     # from the folder's weights on: autoencoder and UNet, on rich scenes
    python -m tools.train_tiny_base --only vae    # one stage; vae and clip can run side by side, then unet and decoder
    PYTHONPATH=. msrun --worker_num 2 --local_worker_num 2 --join True tools/train_tiny_base.py --only unet # half each

World (tools/tiny_base/world.py), schedule and seed are all here, and every draw is a function of them.
"""

import argparse
import math
import os
import sys
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np

from dreambooth_ms.runtime.device import set_up_device

set_up_device("CPU", 0)

from mindspore import Tensor, nn, ops  # noqa: E402  (the device is chosen before any cell is built)

from dreambooth_ms.data.conditioning import PromptTokenizer, encode_prompts  # noqa: E402
from dreambooth_ms.diffusion import NoiseSchedule, NoiseScheduleSpec, velocity_at  # noqa: E402
from dreambooth_ms.formats.clip_tokenizer import ClipTokenizer  # noqa: E402
from dreambooth_ms.formats.files.dtypes import DType  # noqa: E402
from dreambooth_ms.formats.files.open import read_tensors, write_tensors  # noqa: E402
from dreambooth_ms.formats.folder_layout import write_json  # noqa: E402
from dreambooth_ms.formats.model_config import (  # noqa: E402
    pipeline_configs,
    write_text_config,
    write_unet_config,
    write_vae_config,
)
from dreambooth_ms.models.clip import CLIPModel, CLIPTextModel, end_positions  # noqa: E402
from dreambooth_ms.models.layers import CellMethod  # noqa: E402
from dreambooth_ms.models.parameters import public_parameters, read_parameters  # noqa: E402
from dreambooth_ms.models.specs import (  # noqa: E402
    SD_15,
    ClipSpec,
    ClipTextSpec,
    ClipVisionSpec,
    TransformerSpec,
    UNetSpec,
    VaeSpec,
)
from dreambooth_ms.models.text import TextEncoders  # noqa: E402
from dreambooth_ms.models.unet import UNet2DConditionModel  # noqa: E402
from dreambooth_ms.models.vae import AutoencoderKL  # noqa: E402
from dreambooth_ms.processes.group import ALONE, Processes, run_in_group  # noqa: E402
from dreambooth_ms.processes.launch import SCHEDULER, find_launch  # noqa: E402
from dreambooth_ms.randomness import generator, standard_normal  # noqa: E402
from dreambooth_ms.runtime.collective import SumOverProcesses, collective_operations, serve_as_scheduler  # noqa: E402
from dreambooth_ms.training.optimisers import AdamW, Hyperparameters  # noqa: E402
from dreambooth_ms.training.step import DiffusionLoss, TrainStep  # noqa: E402
from dreambooth_ms.weights.bundle import TextReader, load_strict, save_network  # noqa: E402
from tools.tiny_base import world  # noqa: E402
from tools.tiny_base.clip_config import write_clip_config  # noqa: E402
from tools.tiny_base.initialise import initialise_for_training  # noqa: E402
from tools.tiny_base.tokenizer import write_tokenizer  # noqa: E402

PROCESSES = ALONE

SEED = 2026
SIZE = 64
FOLDER = Path("checkpoints/tiny-shapes")
WORK = Path("runs/tiny-base")

VAE = VaeSpec(block_out_channels=(16, 32, 64), layers_per_block=1, norm_num_groups=8, scaling_factor=1.0)
TOWER = TransformerSpec(hidden_size=96, intermediate_size=288, num_hidden_layers=3, num_attention_heads=4)
VISION = ClipVisionSpec(transformer=TOWER, image_size=SIZE, patch_size=8)
PROJECTION = 64
UNET = UNetSpec(
    block_out_channels=(48, 64, 128),
    has_attention=(False, True, True),
    num_heads=(2, 4, 8),
    cross_attention_dim=TOWER.hidden_size,
    layers_per_block=1,
    norm_num_groups=8,
    sample_size=SIZE // VAE.downsampling,
)

# CLIP's own normalisation of pictures (Radford et al., 2021), as in preprocessor_config.json.
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)

KL_WEIGHT = {"vae": 1e-3, "decoder": 1e-3, "sharp_vae": 2e-4}
EXTRA_NOISE = {"vae": 0.0, "decoder": 0.15, "sharp_vae": 0.05}
"""Deviation of what is added to the posterior's own noise, where the latents' is 1.
The decoder learns to see through it, as the UNet's latents are not clean either."""
POSTERIOR_DEVIATION = 0.02
"""Of the finished autoencoder, where the latents' is 1: as good as none, as in Stable Diffusion's own."""
EMPTY_PROMPT_SHARE = 0.1
NOISE = NoiseScheduleSpec(prediction_type="v_prediction")
"""Predicting the velocity weighs the error of the clean latents by SNR + 1, so that what a very noisy picture shows is
learnt early; predicting the noise, colours still went wrong after 1000 steps (tried)."""
WEIGHT_LIMIT = 5.0
"""That weight, SNR + 1, counts up to here (truncated as in Salimans and Ho, 2022), for shapes before textures."""
NUM_SCENES = 12_000
"""Scenes that the UNet sees, encoded once; VAE and CLIP draw theirs as they go."""
ALIKE = 8
"""Rows of a batch of CLIP's that are alike, first in their colours, then in everything but the shape. With rows drawn
at random most differ in colours already, and after 1000 steps the towers knew colours only (measured: of the variance
of the last state of a prompt, the shape made 0.0%)."""

FIRST_SCENE = {"vae": 0, "unet": 0, "decoder": 100_000, "sharp_vae": 200_000}
FIRST_SCENE |= {"sharp_unet": 300_000, "sharp_unet_again": 400_000}
SHARES = {"sharp_vae": world.RICH, "sharp_unet": world.RICH, "sharp_unet_again": world.MIXED}
"""What the stages' scenes have, but for calm ones."""


@dataclass(frozen=True)
class Schedule:
    """How one network is trained: warm up, hold the rate up to step `hold`, then a cosine down to zero."""

    steps: int
    batch_size: int
    learning_rate: float
    hold: int = 0
    warmup: int = 50

    def rate(self, step: int) -> float:
        """Learning rate of a step counted from 0."""
        falls_from = max(self.warmup, self.hold)
        progress = max(0.0, (step - falls_from) / (self.steps - falls_from))
        return self.learning_rate * min(1.0, (step + 1) / self.warmup) * 0.5 * (1 + math.cos(math.pi * progress))


SCHEDULES = {
    "vae": Schedule(steps=3000, batch_size=8, learning_rate=2e-3),
    "decoder": Schedule(steps=2000, batch_size=8, learning_rate=1e-3),
    "clip": Schedule(steps=1000, batch_size=64, learning_rate=1e-3, warmup=100),
    "clip_shapes": Schedule(steps=1600, batch_size=64, learning_rate=1e-3),
    "unet": Schedule(steps=13_000, batch_size=32, learning_rate=1.2e-3, hold=7000, warmup=100),
    "sharp_vae": Schedule(steps=3500, batch_size=8, learning_rate=1e-3, hold=1500, warmup=100),
    "sharp_unet": Schedule(steps=3600, batch_size=32, learning_rate=1e-3, hold=1600, warmup=100),
    "sharp_unet_again": Schedule(steps=9000, batch_size=32, learning_rate=1e-3, hold=3600, warmup=100),
}


class VaeLoss(nn.Cell):
    """Absolute and squared error of the reconstruction, and a little KL divergence from N(0, 1)."""

    def __init__(self, vae: AutoencoderKL, stage: str) -> None:
        super().__init__(auto_prefix=False)
        self.vae = vae
        self.extra_variance, self.kl_weight = EXTRA_NOISE[stage] ** 2, KL_WEIGHT[stage]

    def construct(self, pictures_B3HW: Tensor, noise_BChw: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_variance = self.vae.encode(pictures_B3HW)
        latents = mean + ops.sqrt(ops.exp(log_variance) + self.extra_variance) * noise_BChw
        difference = self.vae.decode(latents) - pictures_B3HW
        error = ops.abs(difference).mean() + 4.0 * (difference * difference).mean()
        divergence = 0.5 * (mean * mean + ops.exp(log_variance) - log_variance - 1.0).mean()
        return (error + self.kl_weight * divergence) / PROCESSES.count, (difference * difference).mean()


class ContrastiveLoss(nn.Cell):
    """Symmetric cross-entropy over the similarities of a batch (Radford et al., 2021, figure 3).

    Pictures whose captions are the same count as equally right, since captions repeat in a small world.
    """

    def __init__(self, clip: CLIPModel) -> None:
        super().__init__(auto_prefix=False)
        self.clip = clip

    def construct(
        self, ids_BS: Tensor, end_BS: Tensor, pictures_B3HW: Tensor, targets_BB: Tensor
    ) -> tuple[Tensor, Tensor]:
        texts_BE, images_BE = self.clip(ids_BS, end_BS, pictures_B3HW)
        scale = ops.exp(ops.minimum(self.clip.logit_scale, math.log(100.0)))
        logits_BB = ops.matmul(texts_BE, ops.transpose(images_BE, (1, 0)))
        logits_BB = logits_BB * ops.broadcast_to(scale, logits_BB.shape)
        by_text = (ops.log_softmax(logits_BB, 1) * targets_BB).sum()
        by_image = (ops.log_softmax(logits_BB, 0) * targets_BB).sum()
        loss = (by_text + by_image) * (-0.5 / logits_BB.shape[0])
        return loss, loss


def pictures(indices: range | np.ndarray, shares: world.Shares = world.CALM) -> tuple[np.ndarray, list[str]]:
    """Pictures (B, 3, H, W) float32 in [-1, 1] and captions of these scenes of the world."""
    drawn = [world.draw(SEED, int(index), shares) for index in indices]
    stacked = np.stack([picture for picture, _ in drawn]).transpose(0, 3, 1, 2)
    return stacked.astype(np.float32) / 127.5 - 1, [caption for _, caption in drawn]


def clip_pixels(pictures_B3HW: np.ndarray) -> np.ndarray:
    """Pictures in [-1, 1] as CLIP expects them."""
    mean, std = (np.array(values, np.float32).reshape(1, 3, 1, 1) for values in (PIXEL_MEAN, PIXEL_STD))
    return ((pictures_B3HW + 1) / 2 - mean) / std


def fit(
    stage: str,
    network: nn.Cell,
    loss_cell: nn.Cell,
    batch: Callable[[int], tuple[np.ndarray, ...]],
    prefixes: tuple[str, ...] = ("",),
) -> None:
    """Train the parameters with these prefixes by a schedule; a stopped run goes on from its newest state."""
    schedule, state_file = SCHEDULES[stage], WORK / f"{stage}.state.safetensors"
    named = public_parameters(network)
    trainables = [public.parameter for name, public in named.items() if name.startswith(prefixes)]
    optimiser = AdamW(trainables, Hyperparameters(beta2=0.99, weight_decay=1e-3))
    sum_gradients = SumOverProcesses() if PROCESSES.count > 1 else None
    step_cell = TrainStep(loss_cell, trainables, optimiser, 1.0, sum_gradients)
    state = [*trainables, *optimiser.first_moments, *optimiser.second_moments]
    first = 0
    if state_file.is_file():
        tensors, metadata = read_tensors(state_file)
        for parameter in state:
            parameter.set_data(Tensor(tensors[parameter.name]))
        first = int(metadata["step"])
    started, recent = time.perf_counter(), []
    for step in range(first, schedule.steps):
        inputs = tuple(Tensor(array[PROCESSES.rank :: PROCESSES.count]) for array in batch(step))
        optimiser.prepare(step + 1, schedule.rate(step))
        _, report, _ = step_cell(*inputs)
        recent.append(float(report.asnumpy().mean()))
        if PROCESSES.rank > 0:
            continue
        if (step + 1) % 50 == 0:
            pace = (time.perf_counter() - started) / (step + 1 - first)
            print(f"{stage} {step + 1}/{schedule.steps}: {np.mean(recent):.5f}, {pace:.2f} s a step", flush=True)
            recent = []
        if (step + 1) % 200 == 0 or step + 1 == schedule.steps:
            write_tensors(state_file, {p.name: p.asnumpy() for p in state}, {"step": str(step + 1)})


def restore(stage: str, network: nn.Cell) -> None:
    """Fill the parameters that an earlier, completed run of the stage trained."""
    state_file = WORK / f"{stage}.state.safetensors"
    tensors, metadata = read_tensors(state_file) if state_file.is_file() else ({}, {"step": "0"})
    if int(metadata["step"]) < SCHEDULES[stage].steps:
        raise SystemExit(f"{stage} is not trained yet: run python -m tools.train_tiny_base --only {stage}")
    for name, public in public_parameters(network).items():
        if name in tensors:
            public.parameter.set_data(Tensor(tensors[name]))


def new_vae() -> AutoencoderKL:
    """An untrained autoencoder.

    Its posterior starts with a deviation of about 0.05; from 1, the decoder hears little through the noise for a
    thousand steps.
    """
    network = AutoencoderKL(VAE)
    initialise_for_training(network, SEED)
    bias = public_parameters(network)["quant_conv.bias"]
    values = bias.read()
    values[VAE.latent_channels :] = -6.0
    bias.write(values)
    return network


def new_clip(vocabulary: int) -> CLIPModel:
    """Both towers, untrained."""
    text = ClipTextSpec(transformer=TOWER, vocab_size=vocabulary, eos_token_id=vocabulary - 1)
    network = CLIPModel(ClipSpec(text=text, vision=VISION, projection_dim=PROJECTION))
    initialise_for_training(network, SEED)
    return network


def new_unet() -> UNet2DConditionModel:
    """An untrained denoiser."""
    network = UNet2DConditionModel(UNET)
    initialise_for_training(network, SEED)
    return network


def vae_batch(stage: str, step: int) -> tuple[np.ndarray, ...]:
    """Pictures and posterior noise of a step; each stage has pictures of its own."""
    size = SCHEDULES[stage].batch_size
    first = FIRST_SCENE[stage] + step * size
    rows, _ = pictures(range(first, first + size), SHARES.get(stage, world.CALM))
    latent_shape = (size, VAE.latent_channels, UNET.sample_size, UNET.sample_size)
    return rows, standard_normal(latent_shape, SEED, f"{stage} noise", step)


def alike(key: Callable[[int], Hashable]) -> list[np.ndarray]:
    """Numbers of the scenes that have the same key, for every key that enough of them have."""
    found: dict[Hashable, list[int]] = {}
    for index in range(NUM_SCENES):
        found.setdefault(key(index), []).append(index)
    return [np.array(indices) for indices in found.values() if len(indices) >= ALIKE]


def colours(index: int) -> Hashable:
    """Colours of the shape and of the background of a scene."""
    scene = world.scene(SEED, index)
    return scene.colour, scene.background


def all_but_the_shape(index: int) -> Hashable:
    """The caption of a scene, without the word for its shape."""
    shape, caption = world.scene(SEED, index).shape, world.draw(SEED, index)[1]
    return caption.replace(shape, "")


def clip_batch(
    clip: CLIPModel, tokenizer: PromptTokenizer, stage: str, groups: list[np.ndarray], step: int
) -> tuple[np.ndarray, ...]:
    """Captions, pictures, and which of them belong together; some rows at a time are alike in something."""
    rng = generator(SEED, f"{stage} batch", step)
    chosen = rng.choice(len(groups), SCHEDULES[stage].batch_size // ALIKE, replace=False)
    rows, captions = pictures(np.concatenate([rng.choice(groups[i], ALIKE, replace=False) for i in chosen]))
    ids = np.concatenate([tokenizer.ids(caption) for caption in captions])
    same = np.array([[a == b for b in captions] for a in captions], np.float32)
    targets = same / same.sum(1, keepdims=True)
    return ids, end_positions(ids, clip.spec.text.eos_token_id), clip_pixels(rows), targets


def text_encoder_of(clip: CLIPModel) -> CLIPTextModel:
    """The text tower alone, which conditions the UNet."""
    network = CLIPTextModel(clip.spec.text)
    values = {name: v for name, v in read_parameters(clip).items() if name.startswith("text_model.")}
    load_strict(network, values, "CLIP")
    return network


def encode_world(
    stage: str, vae: AutoencoderKL, text_encoder: CLIPTextModel, tokenizer: PromptTokenizer
) -> tuple[np.ndarray, np.ndarray, list[str], dict[str, np.ndarray]]:
    """Posterior means and deviations of all scenes of a stage, their captions, and the embedding of each caption."""
    encoder, size = CellMethod(vae.encode), 100
    means, deviations, captions = [], [], []
    for start in range(0, NUM_SCENES, size):
        first = FIRST_SCENE[stage] + start
        rows, texts = pictures(range(first, first + size), SHARES.get(stage, world.CALM))
        mean, log_variance = encoder(Tensor(rows))
        means.append(mean.asnumpy().astype(np.float32))
        deviations.append(np.exp(0.5 * log_variance.asnumpy()).astype(np.float32))
        captions += texts
    encoded = encode_prompts(tokenizer, TextEncoders({"text_encoder": text_encoder}), [*captions, ""], batch_size=100)
    embeddings = {caption: prompt.text for caption, prompt in encoded}
    return np.concatenate(means), np.concatenate(deviations), captions, embeddings


def train_unet(
    stage: str,
    network: UNet2DConditionModel,
    vae: AutoencoderKL,
    text_encoder: CLIPTextModel,
    tokenizer: PromptTokenizer,
) -> None:
    """The denoiser, on the latents of this autoencoder."""
    encoded = cache(lambda: encode_world(stage, vae, text_encoder, tokenizer))
    schedule, size = NoiseSchedule.from_spec(NOISE), SCHEDULES[stage].batch_size
    per_epoch = NUM_SCENES // size

    def batch(step: int) -> tuple[np.ndarray, ...]:
        means, deviations, captions, embeddings = encoded()
        epoch, position = divmod(step, per_epoch)
        order = generator(SEED, "order", epoch).permutation(NUM_SCENES)
        order = order[position * size : (position + 1) * size]
        rng = generator(SEED, f"{stage.removesuffix('_again')} batch", step)
        shape = (size, *means.shape[1:])
        latents = means[order] + deviations[order] * rng.standard_normal(shape, np.float32)
        noise = rng.standard_normal(shape, np.float32)
        timesteps = rng.integers(0, len(schedule.alphas_cumprod), size)
        columns = velocity_at(schedule, timesteps)
        weight = (columns.in_x / columns.in_n) ** 2 + 1
        weights = np.minimum(weight, WEIGHT_LIMIT) / weight
        prompts = ["" if rng.random() < EMPTY_PROMPT_SHARE else captions[i] for i in order]
        return (
            columns.target(latents, noise),
            (weights / size).astype(np.float32),
            columns.network_input(latents, noise),
            timesteps.astype(np.float32),
            np.stack([embeddings[prompt] for prompt in prompts]),
        )

    fit(stage, network, DiffusionLoss(network), batch)


def equalise(vae: AutoencoderKL) -> None:
    """Turn and scale the latents to channels that are uncorrelated and of similar size, with mean 0 and variance 1.

    As trained, their principal deviations are 2.6, 2.0, 0.30 and 0.14 (measured): the noise of the diffusion would
    drown what the two small ones hold, the course of outlines. The deviations become proportional to their fourth
    roots, so that the small ones count, and still less than those that hold the colours.
    """
    means_CN = latent_means(vae)
    centre_C, (variances, directions) = means_CN.mean(1), np.linalg.eigh(np.cov(means_CN))
    wanted = variances**0.125
    wanted /= np.sqrt((wanted**2).mean())
    map_latents(vae, (directions * wanted / np.sqrt(variances)).T, centre_C)


def scale(vae: AutoencoderKL) -> None:
    """Latents of mean 0, and of variance 1 over all channels; each channel stays what it was, as the UNet knows it."""
    means_CN = latent_means(vae)
    deviation = np.sqrt(means_CN.var(axis=1).mean())
    map_latents(vae, np.eye(len(means_CN)) / deviation, means_CN.mean(1))


def latent_means(vae: AutoencoderKL) -> np.ndarray:
    """Posterior means of some scenes, (channels, all places of all)."""
    encoder, (rows, _) = CellMethod(vae.encode), pictures(range(1000))
    means = [encoder(Tensor(rows[i : i + 100]))[0].asnumpy() for i in range(0, len(rows), 100)]
    return _by_channel(np.concatenate(means))


def map_latents(vae: AutoencoderKL, forward: np.ndarray, centre_C: np.ndarray) -> None:
    """Move the latents' centre to 0, then map them; what is decoded stays the same.

    The map goes into the 1x1 convolutions on both sides of the latents; the posterior's noise, which has done its work,
    shrinks to `POSTERIOR_DEVIATION`.
    """
    latents, named = vae.spec.latent_channels, public_parameters(vae)
    weight, bias = named["quant_conv.weight"], named["quant_conv.bias"]
    new_weight = np.zeros(weight.shape)
    new_weight[:latents] = np.einsum("ij,jklm->iklm", forward, weight.read()[:latents])
    new_bias = np.full(bias.shape, 2 * math.log(POSTERIOR_DEVIATION))
    new_bias[:latents] = forward @ (bias.read()[:latents] - centre_C)
    weight.write(new_weight.astype(np.float32))
    bias.write(new_bias.astype(np.float32))
    weight, bias = named["post_quant_conv.weight"], named["post_quant_conv.bias"]
    bias.write((bias.read() + weight.read()[:, :, 0, 0] @ centre_C).astype(np.float32))
    weight.write(np.einsum("ijkl,jm->imkl", weight.read(), np.linalg.inv(forward)).astype(np.float32))


def _by_channel(values_NChw: np.ndarray) -> np.ndarray:
    return values_NChw.transpose(1, 0, 2, 3).reshape(values_NChw.shape[1], -1).astype(np.float64)


def write_folder(vae: AutoencoderKL, clip: CLIPModel, unet: UNet2DConditionModel) -> None:
    """The pipeline in diffusers' layout, and CLIP in transformers' layout beside it; float16."""
    save_network(FOLDER, "vae", vae, write_vae_config(VAE, SIZE), DType.F16)
    save_network(FOLDER, "unet", unet, write_unet_config(UNET), DType.F16)
    text_config = write_text_config(clip.spec.text, PROJECTION)
    save_network(FOLDER, "text_encoder", text_encoder_of(clip), text_config, DType.F16)
    save_network(FOLDER, "clip", clip, write_clip_config(clip.spec), DType.F16)
    write_json(
        FOLDER / "clip" / "preprocessor_config.json",
        {"image_mean": PIXEL_MEAN, "image_std": PIXEL_STD, "size": SIZE, "image_processor_type": "CLIPImageProcessor"},
    )
    for name, content in pipeline_configs(SD_15, ("unet", "vae", "text_encoder"), NOISE).items():
        write_json(FOLDER / name, content)


def main() -> None:
    """Train, as one of the processes that msrun started if it did."""
    launch = find_launch(os.environ)
    if launch and launch.rank == SCHEDULER:
        serve_as_scheduler(launch)
    else:
        sys.exit(run_in_group(launch, train_as_one_of, lambda line: print(line, file=sys.stderr)))


def train_as_one_of(processes: Processes) -> int:
    """Train what is missing, or the one stage asked for; write the folder when all is trained."""
    global PROCESSES
    PROCESSES = processes
    with collective_operations(processes.launch):
        train_stages()
    return 0


def train_stages() -> None:
    """All stages from scratch, or those that sharpen; or the one of them that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", choices=[stage for stage in SCHEDULES if stage != "clip_shapes"], help="train this stage and no other"
    )
    parser.add_argument("--sharpen", action="store_true", help="from the folder's weights, the stages called sharp")
    arguments = parser.parse_args()
    only = arguments.only
    if only and arguments.sharpen != only.startswith("sharp_"):
        parser.error("--only with a stage that is called sharp goes with --sharpen, with others it does not")
    if PROCESSES.count > 1 and only in (None, "clip"):
        parser.error("several processes train one stage, and not clip, whose loss is no sum over rows")
    WORK.mkdir(parents=True, exist_ok=True)
    vocabulary = write_tokenizer(FOLDER / "tokenizer", world.WORDS)
    reader = SimpleNamespace(tokenizer=lambda: ClipTokenizer(FOLDER / "tokenizer"), pooled_at=None)
    tokenizer = PromptTokenizer([cast(TextReader, reader)])
    vae, clip, unet = new_vae(), new_clip(vocabulary), new_unet()
    if arguments.sharpen:
        for name, network in {"vae": vae, "clip": clip, "unet": unet}.items():
            (file,) = (FOLDER / name).glob("*.safetensors")
            load_strict(network, read_tensors(file)[0], name)
        sharpen(only, vae, clip, unet, tokenizer)
    else:
        train_from_scratch(only, vae, clip, unet, tokenizer)
    if only is None:
        write_folder(vae, clip, unet)
        print(f"wrote {FOLDER}")


def sharpen(
    only: str | None, vae: AutoencoderKL, clip: CLIPModel, unet: UNet2DConditionModel, tokenizer: PromptTokenizer
) -> None:
    """The stages on rich scenes, of finished networks."""
    if only in (None, "sharp_vae"):
        fit("sharp_vae", vae, VaeLoss(vae, "sharp_vae"), partial(vae_batch, "sharp_vae"))
    for stage in ("sharp_unet", "sharp_unet_again"):
        if only in (None, stage):
            # By itself, it goes on with the folder's autoencoder.
            if only is None or (WORK / "sharp_vae.state.safetensors").is_file():
                restore("sharp_vae", vae)
            scale(vae)
            train_unet(stage, unet, vae, text_encoder_of(clip), tokenizer)


def train_from_scratch(
    only: str | None, vae: AutoencoderKL, clip: CLIPModel, unet: UNet2DConditionModel, tokenizer: PromptTokenizer
) -> None:
    """The stages on calm scenes."""
    if only in (None, "vae"):
        fit("vae", vae, VaeLoss(vae, "vae"), partial(vae_batch, "vae"))
    if only in (None, "clip"):
        for stage, key in (("clip", colours), ("clip_shapes", all_but_the_shape)):
            fit(stage, clip, ContrastiveLoss(clip), partial(clip_batch, clip, tokenizer, stage, alike(key)))
    if only in ("vae", "clip"):
        return
    restore("vae", vae)
    equalise(vae)
    restore("clip_shapes", clip)
    if only in (None, "unet"):
        train_unet("unet", unet, vae, text_encoder_of(clip), tokenizer)
    if only in (None, "decoder"):
        # The encoder stays, and with it the latents that the UNet knows.
        fit("decoder", vae, VaeLoss(vae, "decoder"), partial(vae_batch, "decoder"), ("decoder.", "post_quant_conv."))


if __name__ == "__main__":
    main()
