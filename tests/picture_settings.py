"""What a sampled picture's file says of how it was made."""

import json

from PIL import Image

from dreambooth_ms.sampling.picture_file import SETTINGS_KEY


def read_settings(path):
    """The settings a picture was made with; empty if it holds none."""
    with Image.open(path) as image:
        return json.loads(getattr(image, "text", {}).get(SETTINGS_KEY, "{}"))
