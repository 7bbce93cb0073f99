"""The public names and shapes of every network's parameters, from its spec alone: no network is built for it.

Shapes: O output and I input channels of a layer, K side of a convolution's kernel.
"""

from collections.abc import Iterator

from dreambooth_ms.models.specs import ClipTextSpec, ModelSpec, UNetSpec, VaeSpec

Shape = tuple[int, ...]
Named = Iterator[tuple[str, Shape]]


def model_shapes(model: ModelSpec) -> dict[str, Shape]:
    """Every parameter of a model. Names begin with the network: "unet.", "vae.", "text_encoder.", "text_encoder_2."."""
    networks = {"unet": unet_shapes(model.unet), "vae": vae_shapes(model.vae)}
    if model.text_encoder:
        networks["text_encoder"] = clip_text_shapes(model.text_encoder)
    if model.text_encoder_2:
        networks["text_encoder_2"] = clip_text_shapes(model.text_encoder_2)
    return {f"{part}.{name}": shape for part, shapes in networks.items() for name, shape in shapes.items()}


def unet_shapes(spec: UNetSpec) -> dict[str, Shape]:
    """The parameters of diffusers' UNet2DConditionModel."""
    return dict(_unet(spec))


def vae_shapes(spec: VaeSpec) -> dict[str, Shape]:
    """The parameters of diffusers' AutoencoderKL."""
    return dict(_vae(spec))


def clip_text_shapes(spec: ClipTextSpec) -> dict[str, Shape]:
    """The parameters of transformers' CLIPTextModel, or of CLIPTextModelWithProjection if the spec has a projection."""
    return dict(_clip_text(spec))


def _unet(spec: UNetSpec) -> Named:
    channels, layers = spec.block_out_channels, spec.layers_per_block
    time_width = 4 * channels[0]
    yield from _convolution("conv_in", channels[0], spec.in_channels)
    yield from _two_linears("time_embedding", time_width, channels[0])
    if spec.projection_class_embeddings_input_dim:
        yield from _two_linears("add_embedding", time_width, spec.projection_class_embeddings_input_dim)
    width, skips = channels[0], [channels[0]]
    for level, out in enumerate(channels):
        block = f"down_blocks.{level}"
        for i in range(layers):
            yield from _resnet(f"{block}.resnets.{i}", out, width, time_width)
            if spec.has_attention[level]:
                yield from _transformer(f"{block}.attentions.{i}", spec, level)
            width = out
            skips.append(out)
        if level < len(channels) - 1:
            yield from _convolution(f"{block}.downsamplers.0.conv", out, out)
            skips.append(out)
    yield from _resnet("mid_block.resnets.0", width, width, time_width)
    yield from _transformer("mid_block.attentions.0", spec, len(channels) - 1)
    yield from _resnet("mid_block.resnets.1", width, width, time_width)
    for index, level in enumerate(reversed(range(len(channels)))):
        block, out = f"up_blocks.{index}", channels[level]
        for i in range(layers + 1):
            yield from _resnet(f"{block}.resnets.{i}", out, width + skips.pop(), time_width)
            if spec.has_attention[level]:
                yield from _transformer(f"{block}.attentions.{i}", spec, level)
            width = out
        if level > 0:
            yield from _convolution(f"{block}.upsamplers.0.conv", out, out)
    yield from _norm("conv_norm_out", channels[0])
    yield from _convolution("conv_out", spec.out_channels, channels[0])


def _transformer(path: str, spec: UNetSpec, level: int) -> Named:
    width, context = spec.block_out_channels[level], spec.cross_attention_dim
    yield from _norm(f"{path}.norm", width)
    yield from _projection(f"{path}.proj_in", spec, width)
    for i in range(spec.transformer_layers(level)):
        block = f"{path}.transformer_blocks.{i}"
        for norm, attention, source in (("norm1", "attn1", width), ("norm2", "attn2", context)):
            yield from _norm(f"{block}.{norm}", width)
            yield from _attention(f"{block}.{attention}", width, source, bias=False)
        yield from _norm(f"{block}.norm3", width)
        yield from _linear(f"{block}.ff.net.0.proj", 8 * width, width)
        yield from _linear(f"{block}.ff.net.2", width, 4 * width)
    yield from _projection(f"{path}.proj_out", spec, width)


def _projection(path: str, spec: UNetSpec, width: int) -> Named:
    return _linear(path, width, width) if spec.use_linear_projection else _convolution(path, width, width, kernel=1)


def _vae(spec: VaeSpec) -> Named:
    channels, layers, latents = spec.block_out_channels, spec.layers_per_block, spec.latent_channels
    yield from _convolution("encoder.conv_in", channels[0], spec.in_channels)
    width = channels[0]
    for level, out in enumerate(channels):
        block = f"encoder.down_blocks.{level}"
        for i in range(layers):
            yield from _resnet(f"{block}.resnets.{i}", out, width)
            width = out
        if level < len(channels) - 1:
            yield from _convolution(f"{block}.downsamplers.0.conv", out, out)
    yield from _vae_middle("encoder", width)
    yield from _norm("encoder.conv_norm_out", width)
    yield from _convolution("encoder.conv_out", 2 * latents, width)
    yield from _convolution("quant_conv", 2 * latents, 2 * latents, kernel=1)
    yield from _convolution("post_quant_conv", latents, latents, kernel=1)
    yield from _convolution("decoder.conv_in", width, latents)
    yield from _vae_middle("decoder", width)
    for index, out in enumerate(reversed(channels)):
        block = f"decoder.up_blocks.{index}"
        for i in range(layers + 1):
            yield from _resnet(f"{block}.resnets.{i}", out, width)
            width = out
        if index < len(channels) - 1:
            yield from _convolution(f"{block}.upsamplers.0.conv", out, out)
    yield from _norm("decoder.conv_norm_out", width)
    yield from _convolution("decoder.conv_out", spec.in_channels, width)


def _vae_middle(side: str, width: int) -> Named:
    yield from _resnet(f"{side}.mid_block.resnets.0", width, width)
    yield from _norm(f"{side}.mid_block.attentions.0.group_norm", width)
    yield from _attention(f"{side}.mid_block.attentions.0", width, width, bias=True)
    yield from _resnet(f"{side}.mid_block.resnets.1", width, width)


def _clip_text(spec: ClipTextSpec) -> Named:
    tower = spec.transformer
    width = tower.hidden_size
    yield "text_model.embeddings.token_embedding.weight", (spec.vocab_size, width)
    yield "text_model.embeddings.position_embedding.weight", (spec.max_position_embeddings, width)
    for i in range(tower.num_hidden_layers):
        yield from _clip_layer(f"text_model.encoder.layers.{i}", width, tower.intermediate_size)
    yield from _norm("text_model.final_layer_norm", width)
    if spec.projection_dim:
        yield from _linear("text_projection", spec.projection_dim, width, bias=False)


def _clip_layer(path: str, width: int, inner_width: int) -> Named:
    yield from _norm(f"{path}.layer_norm1", width)
    for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
        yield from _linear(f"{path}.self_attn.{projection}", width, width)
    yield from _norm(f"{path}.layer_norm2", width)
    yield from _linear(f"{path}.mlp.fc1", inner_width, width)
    yield from _linear(f"{path}.mlp.fc2", width, inner_width)


def _resnet(path: str, out: int, in_: int, time_width: int | None = None) -> Named:
    yield from _norm(f"{path}.norm1", in_)
    yield from _convolution(f"{path}.conv1", out, in_)
    if time_width:
        yield from _linear(f"{path}.time_emb_proj", out, time_width)
    yield from _norm(f"{path}.norm2", out)
    yield from _convolution(f"{path}.conv2", out, out)
    if in_ != out:
        yield from _convolution(f"{path}.conv_shortcut", out, in_, kernel=1)


def _attention(path: str, width: int, source: int, bias: bool) -> Named:
    yield from _linear(f"{path}.to_q", width, width, bias)
    yield from _linear(f"{path}.to_k", width, source, bias)
    yield from _linear(f"{path}.to_v", width, source, bias)
    yield from _linear(f"{path}.to_out.0", width, width)


def _two_linears(path: str, out: int, in_: int) -> Named:
    yield from _linear(f"{path}.linear_1", out, in_)
    yield from _linear(f"{path}.linear_2", out, out)


def _linear(path: str, out: int, in_: int, bias: bool = True) -> Named:
    yield f"{path}.weight", (out, in_)
    if bias:
        yield f"{path}.bias", (out,)


def _convolution(path: str, out: int, in_: int, kernel: int = 3) -> Named:
    yield f"{path}.weight", (out, in_, kernel, kernel)
    yield f"{path}.bias", (out,)


def _norm(path: str, width: int) -> Named:
    yield f"{path}.weight", (width,)
    yield f"{path}.bias", (width,)
