"""The public names and shapes of every network's parameters, from its spec alone: no network is built for it.

A module is a tree of the modules in it, by name, down to the shapes of parameters.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from dreambooth_ms.models.layout import Layer, LayerKind, time_width, unet_layout, vae_layout
from dreambooth_ms.models.specs import ClipTextSpec, ModelSpec, RobertaSpec, T5Spec, TextSpec, UNetSpec, VaeSpec

Shape = tuple[int, ...]
Tree = dict[str, Any]


def model_shapes(model: ModelSpec) -> dict[str, Shape]:
    """Every parameter of a model. Names begin with the network: "unet.", "vae.", "text_encoder.", "text_encoder_2."."""
    kinds = {"unet": unet_shapes, "vae": vae_shapes}
    networks = {part: kinds.get(part, text_shapes)(spec) for part, spec in model.networks.items()}
    return {f"{part}.{name}": shape for part, shapes in networks.items() for name, shape in shapes.items()}


def unet_shapes(spec: UNetSpec) -> dict[str, Shape]:
    """The parameters of diffusers' UNet2DConditionModel."""
    return _layers("", unet_layout(spec), spec)


def vae_shapes(spec: VaeSpec) -> dict[str, Shape]:
    """The parameters of diffusers' AutoencoderKL."""
    sides, latents = vae_layout(spec), spec.latent_channels
    between = {"quant_conv": _conv(2 * latents, 2 * latents, 1), "post_quant_conv": _conv(latents, latents, 1)}
    encoder, decoder = (_layers(side, layers) for side, layers in sides.items())
    return encoder | dict(_named("", between)) | decoder


def text_shapes(spec: TextSpec) -> dict[str, Shape]:
    """The parameters of a text encoder."""
    tree = {ClipTextSpec: _clip, T5Spec: _t5, RobertaSpec: _roberta}[type(spec)]
    return dict(_named("", tree(spec)))


def _clip(spec: ClipTextSpec) -> Tree:
    """transformers' CLIPTextModel, or CLIPTextModelWithProjection if the spec has a projection."""
    tower, width = spec.transformer, spec.transformer.hidden_size
    layer = {
        "layer_norm1": _norm(width),
        "self_attn": {name: _linear(width, width) for name in ("q_proj", "k_proj", "v_proj", "out_proj")},
        "layer_norm2": _norm(width),
        "mlp": {"fc1": _linear(width, tower.intermediate_size), "fc2": _linear(tower.intermediate_size, width)},
    }
    model = {
        "embeddings": {
            "token_embedding": {"weight": (spec.vocab_size, width)},
            "position_embedding": {"weight": (spec.max_position_embeddings, width)},
        },
        "encoder": {"layers": {str(i): layer for i in range(tower.num_hidden_layers)}},
        "final_layer_norm": _norm(width),
    }
    projection = {"text_projection": _linear(width, spec.projection_dim, bias=False)} if spec.projection_dim else {}
    return {"text_model": model, **projection}


def _t5(spec: T5Spec) -> Tree:
    """transformers' T5EncoderModel."""
    width, heads, norm = spec.d_model, spec.num_heads, {"layer_norm": {"weight": (spec.d_model,)}}
    inner = {name: _linear(width, heads * spec.d_kv, bias=False) for name in "qkv"}
    attention = inner | {"o": _linear(heads * spec.d_kv, width, bias=False)}
    # All layers attend with the bias of the first.
    biased = attention | {"relative_attention_bias": {"weight": (spec.relative_attention_num_buckets, heads)}}
    gate = {name: _linear(width, spec.d_ff, bias=False) for name in ("wi_0", "wi_1")}
    feed_forward = {"DenseReluDense": gate | {"wo": _linear(spec.d_ff, width, bias=False)}} | norm
    blocks = {
        str(i): {"layer": {"0": {"SelfAttention": attention if i else biased} | norm, "1": feed_forward}}
        for i in range(spec.num_layers)
    }
    encoder = {"block": blocks, "final_layer_norm": {"weight": (width,)}}
    return {"shared": {"weight": (spec.vocab_size, width)}, "encoder": encoder}


def _roberta(spec: RobertaSpec) -> Tree:
    """FlagAI's RobertaSeriesModelWithTransformation."""
    width, inner = spec.transformer.hidden_size, spec.transformer.intermediate_size
    counts = {"word": spec.vocab_size, "position": spec.max_position_embeddings, "token_type": spec.type_vocab_size}
    tables = {f"{name}_embeddings": {"weight": (count, width)} for name, count in counts.items()}
    layer = {
        "attention": {
            "self": {name: _linear(width, width) for name in ("query", "key", "value")},
            "output": {"dense": _linear(width, width), "LayerNorm": _norm(width)},
        },
        "intermediate": {"dense": _linear(width, inner)},
        "output": {"dense": _linear(inner, width), "LayerNorm": _norm(width)},
    }
    layers = {str(i): layer for i in range(spec.transformer.num_hidden_layers)}
    tree = {"roberta": {"embeddings": tables | {"LayerNorm": _norm(width)}, "encoder": {"layer": layers}}}
    projections = ("transformation", *("transformation_pre",) * spec.has_pre_transformation)
    before = {"pre_LN": _norm(width)} if spec.has_pre_transformation else {}
    return tree | {name: _linear(width, spec.project_dim) for name in projections} | before


def _named(path: str, part: Tree | Shape) -> Iterator[tuple[str, Shape]]:
    if isinstance(part, tuple):
        yield path, part
        return
    for name, inner in part.items():
        yield from _named(f"{path}.{name}" if path else name, inner)


def _layers(root: str, layers: Iterable[Layer], spec: UNetSpec | None = None) -> dict[str, Shape]:
    """The parameters of layers within a module; `spec`: of a UNet."""
    return dict(pair for layer in layers for pair in _named(f"{root}.{layer.name}".strip("."), _layer(layer, spec)))


def _layer(layer: Layer, spec: UNetSpec | None) -> Tree:
    in_, out = layer.in_channels, layer.out_channels
    match layer.kind:
        case LayerKind.CONV | LayerKind.UNET_INPUT:
            return _conv(in_, out)
        case LayerKind.NORM:
            return _norm(out)
        case LayerKind.DOWNSAMPLER | LayerKind.UPSAMPLER:
            return {"conv": _conv(in_, out)}
        case LayerKind.RESNET | LayerKind.SKIP_RESNET | LayerKind.RESNET_DOWNSAMPLER | LayerKind.RESNET_UPSAMPLER:
            return _resnet(in_, out, spec)
        case LayerKind.PIXEL_ATTENTION:
            return {"group_norm": _norm(out), **_attention(out, out, bias=True)}
        case LayerKind.TEXT:
            return {name: _linear(in_, out) for name in layer.parts}
        case LayerKind.UNET_OUTPUT:
            return {"conv_norm_out": _norm(in_), "conv_out": _conv(in_, out)}
    if layer.kind is LayerKind.TIME_EMBEDDING:
        widths = dict.fromkeys(layer.parts, in_) | {"add_embedding": spec.projection_class_embeddings_input_dim}
        trees = {name: {"linear_1": _linear(w, out), "linear_2": _linear(out, out)} for name, w in widths.items() if w}
        return trees | ({"add_embedding": _pooled(spec.text_width, out)} if spec.addition_embed_type == "text" else {})
    if layer.kind is LayerKind.TEXT_AND_PIXEL_ATTENTION:
        return _text_and_pixel_attention(out, spec)
    projection = _linear(out, out) if spec.use_linear_projection else _conv(out, out, 1)
    entrance, block, exit_ = {"norm": _norm(out), "proj_in": projection}, _block(out, spec), {"proj_out": projection}
    return {
        LayerKind.TRANSFORMER: entrance | {"transformer_blocks.0": block} | exit_,
        LayerKind.TRANSFORMER_INPUT: entrance,
        LayerKind.TRANSFORMER_BLOCK: block,
        LayerKind.TRANSFORMER_OUTPUT: exit_,
    }[layer.kind]


def _resnet(in_: int, out: int, spec: UNetSpec | None) -> Tree:
    tree = {"norm1": _norm(in_), "conv1": _conv(in_, out)}
    if spec:
        tree["time_emb_proj"] = _linear(time_width(spec), out * (1 + (spec.resnet_time_scale_shift == "scale_shift")))
    tree |= {"norm2": _norm(out), "conv2": _conv(out, out)}
    return tree | ({} if in_ == out else {"conv_shortcut": _conv(in_, out, 1)})


def _block(width: int, spec: UNetSpec) -> Tree:
    return {
        "norm1": _norm(width),
        "attn1": _attention(width, width, bias=False),
        "norm2": _norm(width),
        "attn2": _attention(width, spec.cross_attention_dim, bias=False),
        "norm3": _norm(width),
        "ff.net": {"0": {"proj": _linear(width, 8 * width)}, "2": _linear(4 * width, width)},
    }


def _text_and_pixel_attention(width: int, spec: UNetSpec) -> Tree:
    context, tree = spec.cross_attention_dim, {"group_norm": _norm(width), **_attention(width, width, bias=True)}
    if spec.only_cross_attention:
        del tree["to_k"], tree["to_v"]
    norm = {"norm_cross": _norm(context)} if spec.cross_attention_norm else {}
    return tree | norm | {name: _linear(context, width) for name in ("add_k_proj", "add_v_proj")}


def _pooled(width: int, time: int) -> Tree:
    pool = {"positional_embedding": (1, width)} | {f"{x}_proj": _linear(width, width) for x in "qkv"}
    return {"norm1": _norm(width), "pool": pool, "proj": _linear(width, time), "norm2": _norm(time)}


def _attention(width: int, source: int, bias: bool) -> Tree:
    inputs = {"to_q": width, "to_k": source, "to_v": source}
    return {name: _linear(in_, width, bias) for name, in_ in inputs.items()} | {"to_out.0": _linear(width, width)}


def _linear(in_: int, out: int, bias: bool = True) -> Tree:
    return {"weight": (out, in_), "bias": (out,)} if bias else {"weight": (out, in_)}


def _conv(in_: int, out: int, kernel: int = 3) -> Tree:
    return {"weight": (out, in_, kernel, kernel), "bias": (out,)}


def _norm(width: int) -> Tree:
    return {"weight": (width,), "bias": (width,)}
