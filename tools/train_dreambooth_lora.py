"""Train a LoRA of SD 1.x or 2.x, with the flags and by the defaults of diffusers' train_dreambooth_lora.py.

    python tools/train_dreambooth_lora.py --pretrained_model_name_or_path sd15 --instance_data_dir photographs/dog \
        --instance_prompt "a photo of sks dog" --resolution 512 --max_train_steps 400

It is `dreambooth-ms train`, which has the same defaults but for the time between validations.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dreambooth_ms.cli.main import main
from tools.train_dreambooth import with_defaults

DEFAULTS = {"validation_prompt": {"validation_epochs": 50}}

if __name__ == "__main__":
    sys.exit(main(["train", *with_defaults(sys.argv[1:], DEFAULTS)]))
