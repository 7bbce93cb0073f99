"""Train the embedded base, checkpoints/tiny-shapes, from scratch: a VAE, then CLIP, then the UNet.

    python -m tools.train_tiny_base            # about 70 minutes on 2 cores; stopped and started again, it goes on
    python -m tools.train_tiny_base --stage vae

World (tools/tiny_base/world.py), schedule and seed are all here, and every draw is a function of them.
"""

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from dreambooth_ms.ops import set_up_device

set_up_device("CPU", 0)

from mindspore import Tensor, nn, ops  # noqa: E402  (the device is chosen before any cell is built)

from dreambooth_ms.data.text import PromptTokenizer, encode_prompts  # noqa: E402
from dreambooth_ms.diffusion.noise_schedule import NoiseSchedule, NoiseScheduleSpec, PredictionType  # noqa: E402
from dreambooth_ms.models.clip import CLIPModel, CLIPTextModel, end_positions  # noqa: E402
from dreambooth_ms.models.specs import (  # noqa: E402
    ClipSpec,
    ClipTextSpec,
    ClipVisionSpec,
    TransformerSpec,
    UNetSpec,
    VaeSpec,
)
from dreambooth_ms.models.unet import UNet2DConditionModel  # noqa: E402
from dreambooth_ms.models.vae import AutoencoderKL, VaeEncoder  # noqa: E402
from dreambooth_ms.randomness import generator, standard_normal  # noqa: E402
from dreambooth_ms.training.optimisers import AdamW, AdamWHyperparameters  # noqa: E402
from dreambooth_ms.training.step import DiffusionLoss, TrainStep  # noqa: E402
from dreambooth_ms.weights.initialise import initialise  # noqa: E402
from dreambooth_ms.weights.model_config import (  # noqa: E402
    write_clip_config,
    write_text_config,
    write_unet_config,
    write_vae_config,
)
from dreambooth_ms.weights.model_folder import save_index, save_network, write_json  # noqa: E402
from dreambooth_ms.weights.parameters import load_strict, public_parameters, read_parameters  # noqa: E402
from dreambooth_ms.weights.tensor_file import read_tensors, write_tensors  # noqa: E402
from tools.tiny_base import world  # noqa: E402
from tools.tiny_base.tokenizer import write_tokenizer  # noqa: E402

SEED = 2026
SIZE = 64
FOLDER = Path("checkpoints/tiny-shapes")
WORK = Path("runs/tiny-base")

VAE = VaeSpec(block_out_channels=(24, 48, 96), layers_per_block=1, norm_num_groups=8)
TOWER = TransformerSpec(hidden_size=96, intermediate_size=288, num_hidden_layers=3, num_attention_heads=4)
VISION = ClipVisionSpec(transformer=TOWER, image_size=SIZE, patch_size=8)
PROJECTION = 64
UNET = UNetSpec(
    block_out_channels=(40, 80, 120),
    has_attention=(True, True, False),
    num_heads=(2, 4, 6),
    cross_attention_dim=TOWER.hidden_size,
    layers_per_block=1,
    norm_num_groups=8,
    sample_size=SIZE // VAE.downsampling,
)

# CLIP's own normalisation of pictures (Radford et al., 2021), as in preprocessor_config.json.
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)

KL_WEIGHT = 1e-6
EMPTY_PROMPT_SHARE = 0.1
MIN_SNR_GAMMA, MIN_SNR_FROM = 5.0, 1000
"""From this step on, rows are weighted by min(SNR, gamma) / SNR (Hang et al., 2023), which turns to shapes sooner."""
NUM_SCENES = 16_000
"""Scenes that the UNet sees, encoded once; VAE and CLIP draw theirs as they go."""


@dataclass(frozen=True)
class Schedule:
    """How one network is trained: warm up, then a cosine that would reach zero after `horizon` steps."""

    steps: int
    batch_size: int
    learning_rate: float
    horizon: int
    warmup: int = 100

    def rate(self, step: int) -> float:
        """Learning rate of a step counted from 0."""
        progress = max(0.0, (step - self.warmup) / (self.horizon - self.warmup))
        return self.learning_rate * min(1.0, (step + 1) / self.warmup) * 0.5 * (1 + math.cos(math.pi * progress))


SCHEDULES = {
    "vae": Schedule(steps=600, batch_size=12, learning_rate=6e-4, horizon=850),
    "vae_fine": Schedule(steps=900, batch_size=8, learning_rate=2e-4, horizon=900, warmup=20),
    "decoder": Schedule(steps=1200, batch_size=8, learning_rate=2e-4, horizon=1200, warmup=20),
    "clip": Schedule(steps=400, batch_size=64, learning_rate=1e-3, horizon=700),
    "unet": Schedule(steps=2900, batch_size=20, learning_rate=8e-4, horizon=2900),
}


class VaeLoss(nn.Cell):
    """Absolute and squared error of the reconstruction, and a little KL divergence from N(0, 1)."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__(auto_prefix=False)
        self.vae = vae

    def construct(self, pictures_B3HW: Tensor, noise_BChw: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_variance = self.vae.encode(pictures_B3HW)
        latents = mean + ops.exp(log_variance * 0.5) * noise_BChw
        difference = self.vae.decode(latents) - pictures_B3HW
        error = ops.abs(difference).mean() + 4.0 * (difference * difference).mean()
        divergence = 0.5 * (mean * mean + ops.exp(log_variance) - log_variance - 1.0).mean()
        return error + KL_WEIGHT * divergence, (difference * difference).mean()


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


def pictures(indices: range | np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Pictures (B, 3, H, W) float32 in [-1, 1] and captions of these scenes of the world."""
    drawn = [world.draw(SEED, int(index)) for index in indices]
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
) -> nn.Cell:
    """Train the parameters with these prefixes by a schedule; a stopped run goes on from its newest state."""
    schedule, state_file = SCHEDULES[stage], WORK / f"{stage}.state.safetensors"
    named = public_parameters(network)
    trainables = [public.parameter for name, public in named.items() if name.startswith(prefixes)]
    optimiser = AdamW(trainables, AdamWHyperparameters(beta2=0.99, weight_decay=1e-3))
    step_cell = TrainStep(loss_cell, trainables, optimiser, max_grad_norm=1.0)
    state = [*trainables, *optimiser.first_moments, *optimiser.second_moments]
    first = 0
    if state_file.is_file():
        tensors, metadata = read_tensors(state_file)
        for parameter in state:
            parameter.set_data(Tensor(tensors[parameter.name]))
        first = int(metadata["step"])
    started, recent = time.perf_counter(), []
    for step in range(first, schedule.steps):
        inputs = tuple(Tensor(array) for array in batch(step))
        scalars = optimiser.update_scalars(step + 1, schedule.rate(step))
        _, report, _ = step_cell(*scalars, *inputs)
        recent.append(float(report.asnumpy().mean()))
        if (step + 1) % 50 == 0:
            pace = (time.perf_counter() - started) / (step + 1 - first)
            print(f"{stage} {step + 1}/{schedule.steps}: {np.mean(recent):.5f}, {pace:.2f} s a step", flush=True)
            recent = []
        if (step + 1) % 200 == 0 or step + 1 == schedule.steps:
            write_tensors(state_file, {p.name: p.asnumpy() for p in state}, {"step": str(step + 1)})
    return network


def finished(stage: str, network: nn.Cell) -> bool:
    """Fill the network from an earlier run of its stage, if that one ended."""
    state_file = WORK / f"{stage}.state.safetensors"
    if not state_file.is_file():
        return False
    tensors, metadata = read_tensors(state_file)
    if int(metadata["step"]) < SCHEDULES[stage].steps:
        return False
    for name, public in public_parameters(network).items():
        if name in tensors:
            public.parameter.set_data(Tensor(tensors[name]))
    return True


def train_vae() -> AutoencoderKL:
    """The autoencoder: the whole of it, then its decoder alone, which leaves the latents as they are."""
    network = AutoencoderKL(VAE)
    initialise(network, SEED)
    start_with_narrow_posterior(network)
    for stage, prefixes in (("vae", ("",)), ("vae_fine", ("",)), ("decoder", ("decoder.", "post_quant_conv."))):
        if not finished(stage, network):
            batch = partial(vae_batch, stage, SCHEDULES[stage].batch_size)
            fit(stage, network, VaeLoss(network), batch, prefixes)
    return network


def vae_batch(stage: str, size: int, step: int) -> tuple[np.ndarray, ...]:
    """Pictures and posterior noise of a step; the few large batches come first, then many small ones."""
    rows, _ = pictures(range(step * size, (step + 1) * size))
    latent_shape = (size, VAE.latent_channels, UNET.sample_size, UNET.sample_size)
    return rows, standard_normal(latent_shape, SEED, f"{stage} noise", step)


def start_with_narrow_posterior(vae: AutoencoderKL) -> None:
    """Start with a deviation of about 0.05; from 1, the decoder hears little through the noise for a thousand steps."""
    bias = public_parameters(vae)["quant_conv.bias"]
    values = bias.read()
    values[VAE.latent_channels :] = -6.0
    bias.write(values)


def train_clip(tokenizer: PromptTokenizer, spec: ClipSpec) -> CLIPModel:
    """Both towers of CLIP."""
    network = CLIPModel(spec)
    initialise(network, SEED)
    size = SCHEDULES["clip"].batch_size

    def batch(step: int) -> tuple[np.ndarray, ...]:
        rows, captions = pictures(range(step * size, (step + 1) * size))
        ids = tokenizer.ids(captions)
        same = np.array([[a == b for b in captions] for a in captions], np.float32)
        targets = same / same.sum(1, keepdims=True)
        return ids, end_positions(ids, spec.text.eos_token_id), clip_pixels(rows), targets

    return network if finished("clip", network) else fit("clip", network, ContrastiveLoss(network), batch)


def text_encoder_of(clip: CLIPModel) -> CLIPTextModel:
    """The text tower alone, which conditions the UNet."""
    network = CLIPTextModel(clip.spec.text)
    values = {name: v for name, v in read_parameters(clip).items() if name.startswith("text_model.")}
    load_strict(network, values, "CLIP")
    return network


def encode_world(
    vae: AutoencoderKL, text_encoder: CLIPTextModel, tokenizer: PromptTokenizer
) -> tuple[np.ndarray, np.ndarray, list[str], dict[str, np.ndarray]]:
    """Posterior means and deviations of all scenes, their captions, and the embedding of each caption."""
    encoder, size = VaeEncoder(vae), 100
    means, deviations, captions = [], [], []
    for start in range(0, NUM_SCENES, size):
        rows, texts = pictures(range(start, start + size))
        mean, log_variance = encoder(Tensor(rows))
        means.append(mean.asnumpy().astype(np.float32))
        deviations.append(np.exp(0.5 * log_variance.asnumpy()).astype(np.float32))
        captions += texts
    embeddings = encode_prompts(tokenizer, text_encoder, [*captions, ""], batch_size=100)
    return np.concatenate(means), np.concatenate(deviations), captions, embeddings


def train_unet(
    vae: AutoencoderKL, text_encoder: CLIPTextModel, tokenizer: PromptTokenizer
) -> tuple[UNet2DConditionModel, float]:
    """The denoiser, and the scaling factor of the latents it was trained on."""
    network = UNet2DConditionModel(UNET)
    initialise(network, SEED)
    means, deviations, captions, embeddings = encode_world(vae, text_encoder, tokenizer)
    scaling = float(f"{1 / means[:2000].std():.5f}")
    if finished("unet", network):
        return network, scaling
    schedule, size = NoiseSchedule.from_spec(NoiseScheduleSpec()), SCHEDULES["unet"].batch_size
    per_epoch = NUM_SCENES // size

    def batch(step: int) -> tuple[np.ndarray, ...]:
        epoch, position = divmod(step, per_epoch)
        order = generator(SEED, "order", epoch).permutation(NUM_SCENES)[position * size : (position + 1) * size]
        rng = generator(SEED, "unet batch", step)
        shape = (size, *means.shape[1:])
        latents = (means[order] + deviations[order] * rng.standard_normal(shape, np.float32)) * scaling
        noise = rng.standard_normal(shape, np.float32)
        timesteps = rng.integers(0, schedule.num_train_timesteps, size)
        snr = (schedule.signal(timesteps) / schedule.noise(timesteps)) ** 2
        weights = np.minimum(snr, MIN_SNR_GAMMA) / snr if step >= MIN_SNR_FROM else np.ones(size)
        prompts = ["" if rng.random() < EMPTY_PROMPT_SHARE else captions[i] for i in order]
        return (
            latents.astype(np.float32),
            noise,
            timesteps.astype(np.int32),
            schedule.signal(timesteps).astype(np.float32),
            schedule.noise(timesteps).astype(np.float32),
            np.stack([embeddings[prompt] for prompt in prompts]),
            (weights / size).astype(np.float32),
        )

    return fit("unet", network, DiffusionLoss(network, PredictionType.EPSILON), batch), scaling


def write_folder(vae: AutoencoderKL, clip: CLIPModel, unet: UNet2DConditionModel, scaling: float) -> None:
    """The pipeline in diffusers' layout, and CLIP in transformers' layout beside it; float16."""
    vae_spec = replace(VAE, scaling_factor=scaling)
    save_network(FOLDER, "vae", vae, write_vae_config(vae_spec, SIZE), np.float16)
    save_network(FOLDER, "unet", unet, write_unet_config(UNET), np.float16)
    text_config = write_text_config(clip.spec.text, PROJECTION)
    save_network(FOLDER, "text_encoder", text_encoder_of(clip), text_config, np.float16)
    save_network(FOLDER, "clip", clip, write_clip_config(clip.spec), np.float16)
    write_json(
        FOLDER / "clip" / "preprocessor_config.json",
        {"image_mean": PIXEL_MEAN, "image_std": PIXEL_STD, "size": SIZE, "image_processor_type": "CLIPImageProcessor"},
    )
    save_index(FOLDER, NoiseScheduleSpec())


def main() -> None:
    """Train what is missing, up to the stage asked for, and write the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=["vae", "clip", "unet"], default="unet", help="stop after this stage")
    stage = parser.parse_args().stage
    WORK.mkdir(parents=True, exist_ok=True)
    vocabulary = write_tokenizer(FOLDER / "tokenizer", world.WORDS)
    tokenizer = PromptTokenizer(FOLDER / "tokenizer")
    text = ClipTextSpec(transformer=TOWER, vocab_size=vocabulary, eos_token_id=vocabulary - 1)
    vae = train_vae()
    if stage == "vae":
        return
    clip = train_clip(tokenizer, ClipSpec(text=text, vision=VISION, projection_dim=PROJECTION))
    if stage == "clip":
        return
    unet, scaling = train_unet(vae, text_encoder_of(clip), tokenizer)
    write_folder(vae, clip, unet, scaling)
    print(f"wrote {FOLDER}: scaling factor {scaling}")


if __name__ == "__main__":
    main()
