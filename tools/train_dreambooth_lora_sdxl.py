"""Train a LoRA of SDXL, with the flags and by the defaults of diffusers' and mindone's train_dreambooth_lora_sdxl.py.

    python tools/train_dreambooth_lora_sdxl.py --pretrained_model_name_or_path sdxl \
        --instance_data_dir photographs/dog --instance_prompt "a photo of sks dog" --max_train_steps 500

It is `dreambooth-ms train --resolution 1024 --learning_rate 1e-4`, and as below.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dreambooth_ms.cli.main import main
from tools.train_dreambooth import with_defaults

DEFAULTS: dict[str, dict[str, object]] = {
    "": {"resolution": 1024, "learning_rate": 1e-4, "adam_weight_decay": 1e-4},
    "train_text_encoder": {"text_encoder_lr": 5e-6, "adam_weight_decay_text_encoder": 1e-3},
    "validation_prompt": {"validation_epochs": 50},
}

if __name__ == "__main__":
    sys.exit(main(["train", *with_defaults(sys.argv[1:], DEFAULTS)]))
