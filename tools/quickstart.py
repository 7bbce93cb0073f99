"""The main job on the embedded base: five pictures of a subject in, a trained adapter and a before/after sheet out.

    python -m tools.quickstart

It runs the two commands that a user would run on their own photographs, and prints them.
"""

import json
import shlex
import sys
import time
from pathlib import Path

from dreambooth_ms.cli.main import main as dreambooth_ms

RUN = Path("runs/quickstart")
TRAIN = ["train", "--config", "configs/training/quickstart.yaml"]
EVALUATE = [
    "evaluate",
    "--pretrained_model_name_or_path", "checkpoints/tiny-shapes",
    "--lora", str(RUN),
    "--instance_data_dir", "demo/subject",
    "--prompt", "configs/inference/quickstart_prompts.txt",
    "--class_prompt", "a photo of a star",
    "--guidance_scale", "3",
    # As good as 25 of ddim (docs/evaluation.md), so that there is time for as many pictures of the class.
    "--scheduler", "dpm++_2m",
    "--num_inference_steps", "12",
    "--num_seeds", "1",
    "--num_class_images", "30",
    "--batch_size", "12",
    "--output_dir", str(RUN),
]  # fmt: skip
RESULTS = ("pytorch_lora_weights.safetensors", "config.yaml", "before_after.png", "loss.png", "metrics.json")

NEXT = """
Next:
  look at           {run}/before_after.png and {run}/loss.png
  generate more     .venv/bin/dreambooth-ms sample --pretrained_model_name_or_path checkpoints/tiny-shapes \\
                      --lora {run} --prompt "a photo of a sks star on a pink background" --guidance_scale 3
  your own photos   .venv/bin/dreambooth-ms train --help, and README.md, "Train on your own photographs"
"""


def main(extra: list[str]) -> int:
    """Run what is missing; `extra` flags go to the training."""
    if not Path("checkpoints/tiny-shapes/model_index.json").is_file():
        print(
            "quickstart: error: checkpoints/tiny-shapes holds no model; run this from the repository's folder, "
            "and make the model with python -m tools.train_tiny_base if it is not there",
            file=sys.stderr,
        )
        return 2
    if all((RUN / name).is_file() for name in RESULTS):
        print(f"{RUN} is complete: {', '.join(RESULTS)}. Remove the folder to start over.")
    else:
        started = time.perf_counter()
        for command in ([*TRAIN, *extra], EVALUATE):
            print(f"\n$ dreambooth-ms {shlex.join(command)}", flush=True)
            status = dreambooth_ms(command)
            if status:
                return status
        print(f"\nDone in {time.perf_counter() - started:.0f} s; everything is in {RUN}.")
    print(summary(json.loads((RUN / "metrics.json").read_text(encoding="utf-8"))))
    print(NEXT.format(run=RUN))
    return 0


def summary(metrics: dict[str, dict[str, float]]) -> str:
    """The figures as people read them."""
    before, after = metrics["before"], metrics["after"]
    return (
        f"  subject similarity  {before['subject_similarity']:.3f} -> {after['subject_similarity']:.3f}"
        "   (CLIP cosine with the photographs; higher is better)\n"
        f"  class drift         {before['class_drift']:.3f} -> {after['class_drift']:.3f}"
        "   (change of plain stars; lower is better)"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
