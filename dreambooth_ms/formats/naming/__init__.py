"""Which name and layout in which format means which public parameter: rules, each read in both directions.

The public name of a parameter is the network's part, a dot, and the name in diffusers' or transformers' module:
`unet.conv_in.weight`, `text_encoder_2.text_projection.weight`. A rule is a function from a public name to the slot that
a format keeps it in. It is inverted by applying it to every public name that the model has, so no rule is written twice
and none guesses. What is told by names alone (kinds, methods, families) is a table of patterns.

    plan          names and shapes of a file -> what is read from where, and how; public names -> what is written where
    formats       the naming of a model in a format
    recognise     names and shapes -> format, family, sizes, naming; or the name of what it is instead
    lora_formats  how each format names the factors of a LoRA; the same two directions for these
"""

from pathlib import Path

from dreambooth_ms.models.specs import read_table

TABLES = read_table(Path(__file__).with_name("names.yaml"))
"""What formats and programs call things: the data of the rules, by the name of the table."""
