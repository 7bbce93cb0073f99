"""Which name and layout in which format means which public parameter: rules, each read in both directions.

The public name of a parameter is the network's part, a dot, and the name in diffusers' or transformers' module:
`unet.conv_in.weight`, `text_encoder_2.text_projection.weight`. A rule is a function from a public name to the slot that
a format keeps it in. It is inverted by applying it to every public name that the model has, so no rule is written twice
and none guesses. What is told by names alone (kinds, methods, families) is a table of patterns.

    tables        what formats and programs call things: the data of the rules, `names.yaml`
    slots         layouts, and what a slot makes of a tensor
    plan          names and shapes of a file -> what is read from where; public names -> what is written where
    report        what does not fit
    stability     single files of Stable Diffusion (LDM) and SDXL (SGM)
    mindone       MindSpore checkpoints of the mindone examples
    formats       the naming of a model in a format
    infer         names and shapes -> the sizes of the networks
    recognise     names and shapes -> format, family, naming; or the name of what it is instead
    lora_formats  how each format names the factors of a LoRA
    lora          the same two directions for LoRAs
    lora_settings rank and alpha as peft and diffusers keep them beside the tensors
"""
