"""Measure a training step of real size in MindSpore's simulation of Ascend, beside what `dreambooth-ms train` expects.

    python -m tools.ascend_memory sd15                                  # LoRA, fp16, 2 rows, the model's own pictures
    python -m tools.ascend_memory sdxl --method full --mixed_precision bf16 --gradient_checkpointing
    python -m tools.ascend_memory sd21 --train_text_encoder --rows 4 --resolution 512

The networks hold zeros: sizes alone decide what is measured. Device memory is a lower bound: a card also holds
workspaces of operators, buffers of collective operations and what CANN takes.
"""

import argparse
import json
import resource
import sys
import time
from collections.abc import Sequence
from typing import Any

from tools import ascend_stubs
from tools.simulate_ascend import simulate

RANK = 4
UNET_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
OWN_RESOLUTIONS = {"sd15": 512, "sd21": 768, "sdxl": 1024}


def run(args: argparse.Namespace) -> None:
    """Take two steps, in a process whose environment `tools.simulate_ascend` made, and say what they took."""
    from dreambooth_ms.runtime.device import set_up_device

    set_up_device("Ascend", 0)
    step, batch, workload = build(args)
    from dreambooth_ms.training.memory import estimate

    times = []
    for number in (1, 2):
        step.optimiser.prepare(number, 1e-4)
        begun = time.monotonic()
        step(*batch)
        times.append(time.monotonic() - begun)
        print(f"step {number} taken", flush=True)
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    expected = estimate(workload)
    print(json.dumps({"times": times, "host": host, "expected": expected.total, "parts": expected.parts}), flush=True)


def build(args: argparse.Namespace) -> tuple[Any, list[Any], Any]:
    """The training step, its batch, and what its memory is estimated from."""
    from dreambooth_ms.adapters.lora import inject_lora, lora_trainables
    from dreambooth_ms.adapters.precision import compute_in
    from dreambooth_ms.config.train import LossScalingConfig
    from dreambooth_ms.models.clip import CLIPTextModel
    from dreambooth_ms.models.parameters import public_parameters
    from dreambooth_ms.models.specs import SD_15, SD_21, SDXL_BASE, ClipTextSpec
    from dreambooth_ms.models.text import TextEncoders
    from dreambooth_ms.models.unet import Segments, UNet2DConditionModel
    from dreambooth_ms.runtime.device import compute_dtype
    from dreambooth_ms.training.methods import TextConditioned
    from dreambooth_ms.training.optimisers import AdamW, Hyperparameters
    from dreambooth_ms.training.step import DiffusionLoss, LossScaler, TrainStep
    from dreambooth_ms.weights.bundle import CLIP_TARGETS

    spec = {"sd15": SD_15, "sd21": SD_21, "sdxl": SDXL_BASE}[args.model]
    unet, encoders = UNet2DConditionModel(spec.unet), None
    texts = [own for own in spec.networks.values() if isinstance(own, ClipTextSpec) and args.train_text_encoder]
    if texts:
        towers = [CLIPTextModel(one, last_layer=len(texts) == 1 or bool(one.projection_dim)) for one in texts]
        encoders = TextEncoders(dict(zip(("text_encoder", "text_encoder_2"), towers, strict=False)))
    networks = {"unet": unet} | (encoders.networks() if encoders else {})
    trainables = []
    for name, network in networks.items():
        if args.method == "lora":
            layers = inject_lora(network, RANK, float(RANK), UNET_TARGETS if name == "unet" else CLIP_TARGETS)
            named = {n: p for n, cell in layers.items() for p in [cell]}
            public_parameters(network)
            pairs = [(n, p) for n, cell in named.items() for p in lora_trainables({n: cell})]
        else:
            pairs = [(n, public.parameter) for n, public in public_parameters(network).items()]
        trainables += [p for n, p in pairs if encoders is None or encoders.is_read(name, n)]
    denoiser = TextConditioned(unet, encoders) if encoders else unet
    compute_in(denoiser, compute_dtype(args.mixed_precision))
    step = TrainStep(
        DiffusionLoss(denoiser),
        trainables,
        AdamW(trainables, Hyperparameters()),
        1.0,
        scaler=LossScaler(LossScalingConfig()) if args.mixed_precision == "fp16" else None,
        recomputed=Segments(unet, encoders) if args.gradient_checkpointing else None,
    )
    return step, _batch(args, spec, len(texts)), _workload(args, spec, texts)


def _batch(args: argparse.Namespace, spec: Any, trained_texts: int) -> list[Any]:
    """Zeros in the shapes of `data.batches.Batch.tensors`."""
    import mindspore as ms
    import numpy as np
    from mindspore import Tensor

    rows, side = args.rows, args.resolution // spec.vae.downsampling
    latents = Tensor(np.zeros((rows, spec.unet.in_channels, side, side)), ms.float32)
    numbers = Tensor(np.zeros(rows), ms.float32)
    tensors = [latents, numbers, latents, numbers]
    pooled, ids = 1280, spec.unet.num_add_time_ids(1280)
    if trained_texts:
        tensors.append(Tensor(np.zeros((rows, 77 * trained_texts)), ms.int32))
        more = [(rows, 77), (rows, ids)] if ids else []
    else:
        tensors.append(Tensor(np.zeros((rows, 77, spec.unet.cross_attention_dim)), ms.float32))
        more = [(rows, pooled), (rows, ids)] if ids else []
    return [*tensors, *(Tensor(np.zeros(shape), ms.float32) for shape in more)]


def _workload(args: argparse.Namespace, spec: Any, texts: Sequence[Any]) -> Any:
    from dreambooth_ms.models.parameter_shapes import text_shapes, unet_shapes
    from dreambooth_ms.training.memory import FLOAT32, Workload, ranks_of
    from dreambooth_ms.weights.bundle import CLIP_TARGETS

    side, width = args.resolution // spec.vae.downsampling, FLOAT32 if args.mixed_precision == "no" else 2
    shapes = [(unet_shapes(spec.unet), UNET_TARGETS), *((text_shapes(one), CLIP_TARGETS) for one in texts)]
    return Workload(
        unet=spec.unet,
        text_encoders=texts,
        ranks=[ranks_of(own, RANK, ends) if args.method == "lora" else ranks_of(own, None) for own, ends in shapes],
        rows=args.rows,
        latent_height=side,
        latent_width=side,
        bytes_of_number=width,
        on_ascend=True,
        recomputed=args.gradient_checkpointing,
    )


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=list(OWN_RESOLUTIONS))
    parser.add_argument("--method", choices=["lora", "full"], default="lora", help="what is trained (default: lora)")
    parser.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"], default="fp16", help="(default: fp16)")
    parser.add_argument("--rows", type=int, default=2, help="of a batch, those of the class among them (default: 2)")
    parser.add_argument("--resolution", type=int, help="side of the pictures in pixels (default: the model's own)")
    parser.add_argument("--gradient_checkpointing", action="store_true", help="compute activations again")
    parser.add_argument("--train_text_encoder", action="store_true", help="train the text encoders as well")
    parser.add_argument("--run", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.resolution = args.resolution or OWN_RESOLUTIONS[args.model]
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Print the figures of a step; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    args = parse(arguments)
    if args.run:
        run(args)
        return 0
    if lacking := ascend_stubs.missing_tools():
        raise SystemExit(f"{', '.join(lacking)}: not found; install g++ and binutils")
    reports, said = simulate(["-m", "tools.ascend_memory", *arguments, "--run"])
    report = reports[""]
    print(report if not report.refused else f"{said}\n{report}")
    figures: dict[str, Any] = next((json.loads(line) for line in said.splitlines() if line.startswith("{")), {})
    if figures:
        expected, peak = figures["expected"], report.peak
        print(f"expected {expected / 2**30:.2f} GiB of {peak / 2**30:.2f} measured: {expected / peak - 1:+.0%}; parts")
        print(", ".join(f"{name} {size / 2**30:.2f}" for name, size in figures["parts"].items()))
        print(f"host memory {figures['host'] / 2**30:.1f} GiB")
    return 1 if report.refused else 0


if __name__ == "__main__":
    sys.exit(main())
