"""Write the subjects that methods are compared on with the embedded base, which has seen none of them.

    python -m tools.tiny_base.subject_set                 # into runs/tiny_subjects
    python -m tools.tiny_base.subject_set /tmp/subjects

A folder of five pictures of each, three others of each in held_out, and subjects.yaml with classes and prompts, as
`dreambooth-ms benchmark` reads them.
"""

import sys
from pathlib import Path

import yaml
from PIL import Image

from tools.tiny_base.world import INDIVIDUALS, free_backgrounds, individual_scenes, render

FOLDER = Path("runs/tiny_subjects")
GIVEN, HELD_OUT = 5, 3
"""Pictures of each."""
PROMPTS = (
    "a photo of a {{token}} {{class}} on a {} background",
    "a photo of a {{token}} {{class}} on a {} background",
    "a photo of a small {{token}} {{class}} on a {} background",
    "a photo of a {{token}} {{class}} on the left, on a {} background",
    "a photo of a {{token}} {{class}} at the top, on a {} background",
)
"""In the words that the base knows, with backgrounds that the subject's own colours stand out from."""


def write_set(folder: Path = FOLDER) -> Path:
    """Write it; returns the folder."""
    prompts = {}
    for name, one in INDIVIDUALS.items():
        scenes = individual_scenes(name, GIVEN + HELD_OUT)
        for place, own in ((folder / name, scenes[:GIVEN]), (folder / "held_out" / name, scenes[GIVEN:])):
            place.mkdir(parents=True, exist_ok=True)
            for number, scene in enumerate(own, start=1):
                Image.fromarray(render(scene)).save(place / f"{number}.png")
        backgrounds = free_backgrounds(one)[::-1]
        own_prompts = (text.format(colour) for text, colour in zip(PROMPTS, backgrounds, strict=False))
        prompts[name] = [text.replace(" a orange", " an orange") for text in own_prompts]
    classes = {name: one.shape for name, one in INDIVIDUALS.items()}
    text = yaml.safe_dump({"classes": classes, "prompts": prompts}, sort_keys=False, width=120)
    (folder / "subjects.yaml").write_text(text, encoding="utf-8")
    return folder


if __name__ == "__main__":
    print(write_set(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER))
