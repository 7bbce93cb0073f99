"""Custom Diffusion, with the flags and by the defaults of diffusers' train_custom_diffusion.py.

    python tools/train_custom_diffusion.py --pretrained_model_name_or_path sd15 --instance_data_dir photographs/cat \
        --instance_prompt "a photo of a <new1> cat" --modifier_token "<new1>" --max_train_steps 500 --hflip

It is `dreambooth-ms train --method custom_diffusion`, and as below.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dreambooth_ms.cli.main import main
from tools.train_dreambooth import with_defaults

DEFAULTS: dict[str, dict[str, object]] = {
    "": {"method": "custom_diffusion", "seed": 42, "checkpointing_steps": 250},
    "with_prior_preservation": {"num_class_images": 200},
    "validation_prompt": {"num_validation_images": 2, "validation_steps": 50},
}

if __name__ == "__main__":
    sys.exit(main(["train", *with_defaults(sys.argv[1:], DEFAULTS)]))
