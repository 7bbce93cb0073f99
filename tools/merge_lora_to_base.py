"""Merge LoRAs into a model, under the name of mindone's tool.

    python tools/merge_lora_to_base.py --weight_base BASE --weight_lora LORA --weight_merged TARGET

The flags are those of `dreambooth-ms merge`, which knows the old ones as other spellings.
"""

import sys

from dreambooth_ms.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["merge", *sys.argv[1:]]))
