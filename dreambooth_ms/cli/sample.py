"""`dreambooth-ms sample`: base model, adapters and prompts -> PNG files."""

from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from dreambooth_ms.cli.assemble import load_adapted, open_base
from dreambooth_ms.cli.tell import tell
from dreambooth_ms.config.load import load_sample_config
from dreambooth_ms.config.schema import SampleConfig
from dreambooth_ms.errors import DataError
from dreambooth_ms.sampling.picture_file import write_picture
from dreambooth_ms.sampling.pipeline import Sampler, SamplingSettings, starting_noise
from dreambooth_ms.weights.atomic import check_writable

PURPOSE = "sample"


def run(argv: Sequence[str]) -> int:
    """Draw the pictures of a command line; returns the exit status."""
    config = load_sample_config(argv)
    wanted, weights = config.pictures, config.weights
    prompts = read_prompts(wanted.prompt)
    folder = open_base(
        config.device, weights.pretrained_model_name_or_path, vae=weights.pretrained_vae_model_name_or_path
    )
    height, width = wanted.height or folder.picture_size, wanted.width or folder.picture_size
    latent_shape = folder.latent_shape(height, width)
    rows = [prompt for prompt in prompts for _ in range(wanted.num_images_per_prompt)]
    output = Path(wanted.output_dir)
    check_writable(output)

    model = load_adapted(folder, weights, [*prompts, wanted.negative_prompt], config.device.mixed_precision)
    settings = SamplingSettings(
        wanted.scheduler, wanted.num_inference_steps, wanted.guidance_scale, min(wanted.batch_size, len(rows))
    )
    sampler = Sampler(model.unet, folder.load_vae(), folder.scheduler_config, settings)
    pictures = sampler.pictures(
        starting_noise(len(rows), latent_shape, wanted.seed, PURPOSE),
        [model.embeddings[prompt] for prompt in rows],
        model.embeddings[wanted.negative_prompt],
    )
    first = _first_free_number(output)
    for number, picture in enumerate(tqdm(pictures, desc="sampling", total=len(rows), unit="picture")):
        path = output / f"{first + number:05d}.png"
        write_picture(path, picture, _settings(config, rows[number], number, height, width))
    tell(f"wrote {len(rows)} pictures to {output}, {first:05d}.png to {first + len(rows) - 1:05d}.png")
    return 0


def read_prompts(text_or_path: str) -> list[str]:
    """The prompt itself, or the lines of the text file that it names.

    Raises:
        DataError: the file is not UTF-8 text, or has no line with a prompt.
    """
    try:
        is_file = Path(text_or_path).is_file()
    except OSError:
        is_file = False
    if not is_file:
        return [text_or_path]
    try:
        lines = Path(text_or_path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--prompt {text_or_path}: not readable as UTF-8 text ({error})") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise DataError(f"--prompt {text_or_path}: the file holds no prompt; write one per line")
    return prompts


def _settings(config: SampleConfig, prompt: str, number: int, height: int, width: int) -> dict[str, object]:
    """What made a picture: repeat the command with these to get it again."""
    return {
        **vars(config.weights),
        **vars(config.pictures),
        "prompt": prompt,
        "number": number,
        "height": height,
        "width": width,
    }


def _first_free_number(folder: Path) -> int:
    """One more than the highest number of a picture in the folder, so that nothing is written over."""
    numbers = [int(path.stem) for path in folder.glob("*.png") if path.stem.isdigit()]
    return max(numbers, default=-1) + 1
