"""Every format of models and adapters: containers of tensors (`files`), names (`naming`), configurations."""
