"""Textual inversion, with the flags and by the defaults of diffusers' textual_inversion.py.

    python tools/train_textual_inversion.py --pretrained_model_name_or_path sd15 --train_data_dir photographs/toy \
        --placeholder_token "<toy>" --initializer_token toy --learnable_property object --max_train_steps 3000

It is `dreambooth-ms train --method textual_inversion`, and as below; --train_data_dir is the pictures' folder, and the
prompt is "a photo of a <toy>" or "a painting in the style of <toy>" if --instance_prompt gives no other.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dreambooth_ms.cli.main import main
from tools.train_dreambooth import with_defaults

DEFAULTS: dict[str, dict[str, object]] = {
    "": {
        "method": "textual_inversion", "learning_rate": 1e-4, "train_batch_size": 16, "max_train_steps": 5000,
        "random_flip": True,
    },
}  # fmt: skip


def translated(argv: Sequence[str]) -> list[str]:
    """The script's command line as `dreambooth-ms train` reads it: the folder is one subject's, the prompt follows."""
    words = [word.replace("--train_data_dir", "--instance_data_dir", 1) for word in argv]
    flags = [word.partition("=") for word in words]
    values = {name: value or (words[at + 1 : at + 2] or [""])[0] for at, (name, _, value) in enumerate(flags)}
    word, is_style = values.get("--placeholder_token"), values.get("--learnable_property") == "style"
    if word and "--instance_prompt" not in values:
        prompt = f"a painting in the style of {word}" if is_style else f"a photo of a {word}"
        words.append(f"--instance_prompt={prompt}")
    return words


if __name__ == "__main__":
    sys.exit(main(["train", *with_defaults(translated(sys.argv[1:]), DEFAULTS)]))
