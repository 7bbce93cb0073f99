"""What a picture's file says of how it was made: our settings, as JSON, and the text that A1111 and its relatives write
and read. Either becomes the values of flags again."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from dreambooth_ms import __version__
from dreambooth_ms.config.choices import read_table
from dreambooth_ms.config.sample import SampleConfig
from dreambooth_ms.config.schema import schema_fields
from dreambooth_ms.data.second_stage import ENLARGED
from dreambooth_ms.errors import DataError, near, show_names

SETTINGS_KEY, PARAMETERS_KEY = "dreambooth_ms", "parameters"
"""The text chunks of a PNG."""

_TABLE = read_table(Path(__file__).with_suffix(".yaml"))
_TEXT = re.compile(r"(.*?)(?:(?:^|\n)Negative prompt:(.*?))?(?:^|\n)(Steps: [^\n]*)", re.DOTALL)
_PAIR = re.compile(r'\s*([A-Za-z][^:,"]*): *("(?:[^"\\]|\\.)*"|[^,]*)(?:,|$)')
_TAG = re.compile(r"\s*<(?:lora|lyco|hypernet):[^>]*>")


class PictureText(NamedTuple):
    """How a picture was made: by these values of flags, with notes for the user."""

    values: dict[str, Any]
    notes: list[str]
    number: int = 0
    """Its own, on which its noise depends, as on the purpose."""
    purpose: str = "sample"


def parameters_of(settings: Mapping[str, Any]) -> str:
    """Settings as A1111 writes them: the prompt with its adapters, the negative prompt, and a line of names and values.
    Layers left out at the end of the text encoders count from 1 there."""
    paths, scales = settings.get("lora") or [], settings.get("lora_scale") or [1.0]
    adapters, scales = [*map(_title, paths)], scales * len(paths) if len(scales) == 1 else scales
    sides = settings.get("width"), settings.get("height")
    sampler = _TABLE["samplers"].get(settings.get("scheduler"), (None, None))
    hashes = zip(adapters, settings.get("lora_hashes") or (), strict=False)
    values = {
        **{name: settings.get(own) for name, own in _TABLE["written"].items()},
        **dict(zip(("Sampler", "Schedule type"), sampler, strict=True)),
        "Size": "{}x{}".format(*sides) if all(sides) else None,
        "Model": _title(settings.get("pretrained_model_name_or_path") or "") or None,
        "Clip skip": settings["clip_skip"] + 1 if settings.get("clip_skip") else None,
        "Lora hashes": ", ".join(f"{name}: {own[:12]}" for name, own in hashes if own) or None,
        "Version": f"dreambooth-ms {__version__}",
    }
    tags = [f"<lora:{name}:{scale:g}>" for name, scale in zip(adapters, scales, strict=False)]
    negative = [f"Negative prompt: {settings['negative_prompt']}"] if settings.get("negative_prompt") else []
    told = ", ".join(f"{name}: {_quoted(str(values[name]))}" for name in _TABLE["order"] if values[name] is not None)
    return "\n".join([" ".join([settings["prompt"], *tags]), *negative, told])


def read_picture_text(path: Path) -> PictureText:
    """How a picture of ours was made, or one of A1111's kind. DataError if its file does not say it, or is damaged."""
    try:
        with Image.open(path) as image:
            image.load()
            texts = dict(getattr(image, "text", {}))
    except FileNotFoundError as error:
        raise DataError(f"--like {path}: no such file{near(path)}") from error
    except (OSError, ValueError, SyntaxError) as error:
        raise DataError(f"--like {path}: cannot be read ({error}); name a PNG file that `sample` wrote") from error
    try:
        if SETTINGS_KEY in texts:
            return _of_ours(json.loads(texts[SETTINGS_KEY]))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DataError(f"--like {path}: its settings are damaged ({error}); name another picture") from error
    if found := _TEXT.fullmatch(texts.get(PARAMETERS_KEY, "").strip()):
        return _of_a1111(*(part or "" for part in found.groups()))
    raise DataError(
        f"--like {path}: does not say how it was made; name a PNG file as `sample` or A1111 wrote it: what saves a "
        "picture anew leaves that out"
    )


def _of_ours(settings: dict[str, Any]) -> PictureText:
    for size, sides in _TABLE["sizes"].items():
        settings |= dict(zip(sides, settings.get(size) or (None, None), strict=True))
    if settings.get("super_resolution"):
        # Their sides are the enlarged picture's.
        settings |= {side: settings[side] // ENLARGED for side in ("width", "height")}
    said = {_TABLE["renamed"].get(name, name): value for name, value in settings.items() if value not in (None, [])}
    step, known, notes = said.pop("step", None), schema_fields(SampleConfig).keys(), []
    if unknown := said.keys() - known - {*_TABLE["no_flags"]}:
        notes.append(f"this version does not know {show_names(sorted(unknown))} of it: the picture may differ")
    if "pretrained_model_name_or_path" not in said:
        notes.append("its base is not in it; name that with --pretrained_model_name_or_path")
    if step is not None:
        notes.append(f"is of a training, after step {step}: name what was learnt then with --lora (checkpoint-{step})")
    if (number := int(settings.get("number", 0))) < 0:
        raise ValueError(f"its number is {number}")
    values = {name: value for name, value in said.items() if name in known and name not in _TABLE["no_flags"]}
    return PictureText(values, notes, number, str(settings.get("purpose", "sample")))


def _of_a1111(prompt: str, negative: str, told: str) -> PictureText:
    pairs = {found[1].strip(): _unquoted(found[2]) for found in _PAIR.finditer(told)}
    notes = ["another program drew its noise, so the picture will be another one, of the base that you name"]
    if model := pairs.get("Model"):
        notes[0] += f" (its own was {model})"
    if tags := [tag.strip() for tag in _TAG.findall(prompt)]:
        notes.append(f"{show_names(tags)} left out of its prompt; name adapters with --lora")
    values = {flag: pairs[name] for name, flag in _TABLE["read"].items() if name in pairs}
    values |= {"prompt": _TAG.sub("", prompt).strip(), "negative_prompt": negative.strip()}
    if sides := re.fullmatch(r"(\d+)x(\d+)", pairs.get("Size", "")):
        values |= dict(zip(("width", "height"), sides.groups(), strict=True))
    # Of this one sampler Karras' levels are what A1111 chooses by itself.
    style = pairs.get("Schedule type")
    if (pairs.get("Sampler"), style) == ("DPM++ 2M", "Automatic"):
        style = "Karras"
    if style in _TABLE["styles"] and "scheduler" in values:
        values["scheduler"] += f" {style}"
    return PictureText({name: value for name, value in values.items() if value}, notes)


def _title(path: str) -> str:
    """What A1111 calls a file or folder."""
    return re.sub(r"\.(?:safetensors|ckpt|bin|pth?)$", "", Path(path).name)


def _quoted(text: str) -> str:
    """A value, as a JSON string where it holds what stands between values."""
    return json.dumps(text, ensure_ascii=False) if re.search(r"[,:\n]", text) else text


def _unquoted(text: str) -> str:
    try:
        return str(json.loads(text)) if text.startswith('"') else text.strip()
    except ValueError:
        return text
