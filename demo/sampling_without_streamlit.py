"""Sample pictures by the flags of mindone's SDXL guide, with the functions of `dreambooth-ms sample`.

    python demo/sampling_without_streamlit.py --task txt2img --config configs/inference/sd_xl_base.yaml \
        --weight base.safetensors,lora.safetensors --prompt "a photo of sks dog" --num_rows 2 --num_cols 2

`dreambooth-ms sample --help all` lists what else it takes. Different here: without a prompt and a configuration it has
those of the guide, a training configuration stands for the inference one of its base, and the refiner is called the
guide's way: --add_pipeline True with --pipeline_weight, --pipeline_config, --stage2strength and --finish_denoising.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import yaml  # noqa: E402

from dreambooth_ms.cli.main import main  # noqa: E402
from dreambooth_ms.cli.output import tell  # noqa: E402
from dreambooth_ms.config.sample import SampleConfig  # noqa: E402
from dreambooth_ms.config.schema import sections  # noqa: E402
from dreambooth_ms.config.train import TrainConfig  # noqa: E402

INFERENCE = ROOT / "configs" / "inference"
PROMPT = "Astronaut in a jungle, cold color palette, muted colors, detailed, 8k"
SWITCH = {"nargs": "?", "const": "True", "choices": ["True", "False"]}


def sample_flags(argv: Sequence[str]) -> list[str]:
    """The flags of `dreambooth-ms sample` that ask for the same as those of the guide."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", default=str(INFERENCE / "sd_xl_base.yaml"), help="of the base")
    parser.add_argument("--prompt", default=PROMPT, help="what to sample, or a file with one prompt per line")
    parser.add_argument("--save_path", default="outputs/demo", help="folder for the pictures")
    parser.add_argument("--guider", choices=["VanillaCFG", "IdentityGuider"], default="VanillaCFG")
    parser.add_argument("--add_pipeline", default="False", **SWITCH, help="refine the pictures with a second model")
    parser.add_argument("--pipeline_config", default=str(INFERENCE / "sd_xl_refiner.yaml"), help="of the second model")
    parser.add_argument("--pipeline_weight", help="the second model (default: the one of --pipeline_config)")
    parser.add_argument("--stage2strength", type=float, default=0.15, help="share of the second model")
    parser.add_argument("--finish_denoising", default="True", **SWITCH, help="the second model finishes the first's")
    wanted, others = parser.parse_known_args(argv)

    flags = ["--config", inference_config(wanted.config), "--prompt", wanted.prompt, "--save_path", wanted.save_path]
    if wanted.guider == "IdentityGuider":
        flags += ["--guidance_scale", "1"]
    if wanted.add_pipeline == "True":
        refiner = wanted.pipeline_weight or base_of(wanted.pipeline_config)
        flags += ["--refiner", refiner, *_shares(wanted.stage2strength, wanted.finish_denoising == "True")]
    return flags + others


def _shares(of_second: float, finishes: bool) -> list[str]:
    if finishes:
        return ["--denoising_end", f"{1 - of_second:.6g}"]
    return ["--refiner_strength", f"{of_second:.6g}"]


def inference_config(path: str) -> str:
    """The configuration itself, or if it is one of training, the inference configuration of its base's family."""
    of_training = sections(TrainConfig).keys() - sections(SampleConfig).keys()
    if not of_training & _content(path).keys():
        return path
    name = Path(path).stem
    family = "sd_xl_base" if "xl" in name else "sd_v2_1" if "v2" in name else "sd_v1_5"
    chosen = str(INFERENCE / f"{family}.yaml")
    tell(f"--config {path}: is for training; pictures are sampled by {chosen}")
    return chosen


def base_of(path: str) -> str:
    """The model that a configuration names; the path itself if it names none, which is then refused as a model."""
    return str((_content(path).get("weights") or {}).get("pretrained_model_name_or_path", path))


def _content(path: str) -> dict[str, Any]:
    """What a file says, if it says anything: what is wrong with it is reported where it is read to be used."""
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) else {}


if __name__ == "__main__":
    sys.exit(main(["sample", *sample_flags(sys.argv[1:])]))
