"""How much memory a run will need, from its configuration."""

from dreambooth_ms.cli.output import tell
from dreambooth_ms.config.ranges import memory_size
from dreambooth_ms.config.train import TrainConfig
from dreambooth_ms.models.activation_memory import FLOAT32, ActivationSettings
from dreambooth_ms.models.parameter_shapes import clip_text_shapes, unet_shapes
from dreambooth_ms.processes.group import Processes
from dreambooth_ms.runtime.device import Formulation, formulation
from dreambooth_ms.training.memory import OPTIMISER_BYTES, Workload, check_memory, estimate, machine_memory, ranks_of
from dreambooth_ms.weights.bundle import ModelBundle


def check_expected_memory(config: TrainConfig, folder: ModelBundle, processes: Processes) -> None:
    """Say how much memory a step will need; what cannot fit ends here, before any work.

    `--max_device_memory` is of each process. All processes must ask at the same time.
    """
    run, expected = config.run, estimate(_workload(config, folder, processes.count))
    tell(str(expected))
    advice = [] if run.gradient_checkpointing else ["--gradient_checkpointing"]
    advice += [f"a --train_batch_size below {run.train_batch_size}"] if run.train_batch_size > 1 else []
    advice += [f"a --resolution below {config.data.resolution}"]
    advice += ["--method lora"] if config.method.method == "full" else []
    # The processes on a machine share its memory, but not that of their cards.
    limit, sharing = machine_memory(), processes.count_on_this_machine() if formulation() is Formulation.CPU else 1
    if run.max_device_memory and (size := memory_size(run.max_device_memory)):
        limit, sharing = size, 1
    advice += ["fewer processes on a machine"] if sharing > 1 else []
    check_memory(expected, limit, f"what needs less: {', '.join(advice)}", sharing)


def _workload(config: TrainConfig, folder: ModelBundle, processes: int) -> Workload:
    method, data, run = config.method, config.data, config.run
    _, height, width_of_latents = folder.latent_shape(data.resolution, data.resolution)
    groups = 2 if config.prior.with_prior_preservation else 1
    readers = folder.text if method.train_text_encoder else ()
    shapes = [unet_shapes(folder.denoiser.spec), *(clip_text_shapes(reader.spec) for reader in readers)]
    targets = [method.lora_target_modules, *(reader.adapted_layers for reader in readers)]
    is_lora = method.method == "lora"
    optimiser = "adamw_8bit" if config.optimiser.use_8bit_adam else config.optimiser.optimizer.lower()
    width = 2 if config.device.mixed_precision in ("fp16", "bf16") else FLOAT32
    return Workload(
        unet=folder.denoiser.spec,
        text_encoders=[reader.spec for reader in readers],
        ranks=[
            ranks_of(own, method.rank, ends) if is_lora else ranks_of(own, None)
            for own, ends in zip(shapes, targets, strict=True)
        ],
        activations=ActivationSettings(
            rows=groups * run.train_batch_size,
            latent_height=height,
            latent_width=width_of_latents,
            bytes_of_number=width,
            dropout=method.lora_dropout > 0,
        ),
        recomputed=run.gradient_checkpointing,
        bytes_of_weight=width,
        bytes_of_optimiser=OPTIMISER_BYTES[optimiser],
        copies_of_trained=int(method.use_ema) + int(run.gradient_accumulation_steps > 1),
        processes=processes,
        shares_optimiser=config.processes.zero_stage > 0,
    )
