"""Convert weights, under the name and with the flags of mindone's tool.

    python tools/convert_weight.py SOURCE TARGET                 # as `dreambooth-ms convert`
    python tools/convert_weight.py --task st_to_ms --weight_safetensors A.safetensors --weight_ms B.ckpt

Formats are recognised; of the old flags only the direction and the two files are read.
"""

import sys
from collections.abc import Sequence

from dreambooth_ms.cli.main import main

OLD_FILES = {"--weight_safetensors": "torch", "--weight_torch": "torch", "--weight_ms": "ms"}
OLD_NAME_LISTS = ("--key_torch", "--key_ms")


def translated(argv: Sequence[str]) -> list[str]:
    """The arguments of `dreambooth-ms convert` for those of the old tool; others are left as they are."""
    flags = [part for argument in argv for part in argument.split("=", 1)] if "--weight_ms" in " ".join(argv) else []
    if not flags:
        return list(argv)
    values = dict(zip(flags[::2], flags[1::2], strict=False))
    files = {kind: values.pop(flag) for flag, kind in OLD_FILES.items() if flag in values}
    for flag in OLD_NAME_LISTS:
        values.pop(flag, None)
    to_mindspore = values.pop("--task", "st_to_ms").endswith("_ms")
    order = ("torch", "ms") if to_mindspore else ("ms", "torch")
    return [*(files[kind] for kind in order if kind in files), *(text for pair in values.items() for text in pair)]


if __name__ == "__main__":
    sys.exit(main(["convert", *translated(sys.argv[1:])]))
