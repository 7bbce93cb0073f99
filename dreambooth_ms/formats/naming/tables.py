"""The tables of `names.yaml`: what formats and programs call things."""

from importlib.resources import files
from typing import Any

import yaml

TABLES: dict[str, Any] = yaml.safe_load(files(__package__).joinpath("names.yaml").read_text("utf-8"))
"""By the name of the table, in the order of the file."""
