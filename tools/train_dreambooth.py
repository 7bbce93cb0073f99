"""Train all weights of a model, under the name, with the flags and by the defaults of diffusers' train_dreambooth.py.

    python tools/train_dreambooth.py --pretrained_model_name_or_path sd15 --instance_data_dir photographs/dog \
        --instance_prompt "a photo of sks dog" --resolution 512 --max_train_steps 400

It is `dreambooth-ms train --method full`. With --config, as in mindone's guide, whose script has this name too, the
file says what is trained.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dreambooth_ms.cli.main import main
from dreambooth_ms.config.load import canonical
from dreambooth_ms.config.schema import schema_fields
from dreambooth_ms.config.train import TrainConfig

DEFAULTS = {"": {"method": "full"}}
"""Flag that must be there, or empty -> the script's defaults, where ours are others."""


def with_defaults(argv: Sequence[str], defaults: Mapping[str, Mapping[str, object]]) -> list[str]:
    """The flags of `dreambooth-ms train` that do what a script of these defaults does; with --config they are its."""
    names = [word.removeprefix("--").partition("=")[0].replace("-", "_") for word in argv if word.startswith("--")]
    if "config" in names:
        return list(argv)
    known = schema_fields(TrainConfig)
    given = {canonical(name, known) for name in names}
    if "validation_steps" in given:
        given.add("validation_epochs")
    added = [(name, value) for one in defaults if not one or one in given for name, value in defaults[one].items()]
    return [*(f"--{name}={value}" for name, value in added if name not in given), *argv]


if __name__ == "__main__":
    sys.exit(main(["train", *with_defaults(sys.argv[1:], DEFAULTS)]))
