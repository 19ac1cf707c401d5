"""Names of what a block computes inside: its attention, the queries, keys and values, and its MLP.

`blocks.5.attn`, `blocks.5.attn.q`, `.k`, `.v`, `.out` and `blocks.5.mlp` name the same things in every network, also
where the submodules have other names (`attn1`, `to_q`, `ff`), or where one projection gives all three of q, k and v. A
name of the network itself always means that submodule.

q, k and v are the outputs of their projections, (B, T, heads * width of a head), before any norm of queries and keys
and before rotary positions. `attn` is what the attention returns, before gates, and `out` its last projection, mostly
the same.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

# Names of a block's parts in published networks, the self-attention before others.
_OTHER_NAMES: Mapping[str, tuple[str, ...]] = {
    "attn": ("attn1", "self_attn", "attention", "self_attention", "block.attn1", "block.attn"),
    "mlp": ("ff", "ffn", "feed_forward", "img_mlp", "block.ff_i", "linear2", "down_proj"),
    "q": ("to_q", "q_proj", "to_query", "query"),
    "k": ("to_k", "k_proj", "to_key", "key"),
    "v": ("to_v", "v_proj", "to_value", "value"),
    "out": ("to_out.0", "to_out", "proj", "out_proj", "out_layer"),
}
_THIRDS = ("q", "k", "v")
# Projections whose output holds q, k and v one after the other, by class of the attention. In other classes the order
# is not known: EDM's has the three beside each other in every channel.
_FUSED: Mapping[str, str] = {
    "layerprobe.backbones.sit.Attention": "qkv",
    "layerprobe.backbones.lightningdit.Attention": "qkv",
    "timm.layers.attention.Attention": "qkv",
    "timm.models.vision_transformer.Attention": "qkv",
    "diffusers.models.transformers.transformer_prx.PRXAttention": "img_qkv_proj",
    "diffusers.models.transformers.transformer_flux2.Flux2ParallelSelfAttention": "to_qkv_mlp_proj",
}
_JOINED = ("qkv", "to_qkv", "qkv_proj", "img_qkv_proj", "to_qkv_mlp_proj", "in_proj")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")
# Norms inside an attention get heads side by side with tokens, in an order that differs.
_HEAD_NORMS = ("q_norm", "k_norm", "norm_q", "norm_k")


# What can be named in a block, in the order in which it runs.
NAMES = ("attn.q", "attn.k", "attn.v", "attn.out", "attn", "mlp")


@dataclass(frozen=True, eq=False)
class Part:
    """Where the value of a name is found.

    Attributes:
        layer: Name of the submodule that computes it.
        take: Function (submodule, its arguments by position and by name, its output) -> value; None for the whole
            output.
    """

    layer: str
    take: Callable[[nn.Module, tuple[Any, ...], Mapping[str, Any], Any], Any] | None = None


def find_part(module: nn.Module, name: str) -> Part | None:
    """Returns where a name is computed; None if it names nothing in the module.

    Raises:
        ValueError: If the layer returns heads, or one projection gives q, k and v in an order that is not known.
    """
    parent, _, last = name.rpartition(".")
    if _submodule(module, name) is not None:
        if last in _HEAD_NORMS:
            raise ValueError(
                f"{name} returns heads and tokens in an order of its own; name {parent}.q or {parent}.k, which are "
                "before this norm"
            )
        return Part(name)
    found = find_part(module, parent) if last else None
    if found is None or found.take is not None:
        return None
    owner = module.get_submodule(found.layer)
    if _submodule(owner, last) is not None:
        return find_part(module, _below(found.layer, last))
    joined = next((joined for joined in _JOINED if _submodule(owner, joined) is not None), None)
    if last in _THIRDS and joined is not None and _class_name(owner) not in _FUSED:
        raise ValueError(
            f"{found.layer}.{joined} gives q, k and v together, in an order that is not known for "
            f"{type(owner).__name__}; name {found.layer}.{joined}, or pass tokens=... that takes its {last}"
        )
    return next((part for other, part in _parts(owner, found.layer) if other == last), None)


def part_names(module: nn.Module) -> dict[str, str]:
    """Returns the names of parts that no submodule has, with the name of the submodule that computes each."""
    names: dict[str, str] = {}
    for name, owner in module.named_modules():
        for last, part in _parts(owner, name) if name else ():
            names[f"{name}.{last}"] = part.layer
            if last == "attn":
                attention = module.get_submodule(part.layer)
                names |= {f"{name}.attn.{inner}": of.layer for inner, of in _parts(attention, part.layer)}
    return names


def nameable(module: nn.Module) -> dict[str, list[str]]:
    """Returns what of `NAMES` can be named in blocks, by the pattern of their names, such as "blocks.*"."""
    found: dict[str, dict[str, None]] = {}
    for name, owner in module.named_modules():
        if name and _is_block(owner):
            inside = [part for part in NAMES if _finds(module, f"{name}.{part}")]
            found.setdefault(_NUMBER.sub("*", name), {}).update(dict.fromkeys(inside))
    return {pattern: list(names) for pattern, names in found.items() if names}


def _finds(module: nn.Module, name: str) -> bool:
    try:
        return find_part(module, name) is not None
    except ValueError:
        return False


def _parts(owner: nn.Module, name: str) -> Iterator[tuple[str, Part]]:
    """Yields the parts of one submodule that it does not name so itself."""
    if isinstance(owner, nn.MultiheadAttention):
        if owner.in_proj_weight is not None:
            yield from ((third, Part(name, partial(_projected, i))) for i, third in enumerate(_THIRDS))
        yield "out", Part(name)
        return
    is_block, is_attention = _is_block(owner), _is_attention(owner)
    for part, others in _OTHER_NAMES.items():
        if _submodule(owner, part) is None and (is_block if part in ("attn", "mlp") else is_attention):
            other = next((other for other in others if _submodule(owner, other) is not None), None)
            if other is not None:
                yield part, Part(_below(name, other))
    joined = _FUSED.get(_class_name(owner))
    if joined is not None and _submodule(owner, joined) is not None:
        width = _query_width(owner, joined)
        yield from ((third, Part(_below(name, joined), partial(_third, i, width))) for i, third in enumerate(_THIRDS))


def _is_block(owner: nn.Module) -> bool:
    return any(_submodule(owner, name) is not None for name in ("attn", *_OTHER_NAMES["attn"]))


def _is_attention(owner: nn.Module) -> bool:
    """Whether a submodule has projections of queries, under a name of their own or together with others."""
    return any(_submodule(owner, name) is not None for name in ("q", *_OTHER_NAMES["q"], *_JOINED))


def _query_width(owner: nn.Module, joined: str) -> int:
    """The width of the queries: behind the three, Flux 2 has the input of an MLP."""
    inner, features = getattr(owner, "inner_dim", None), owner.get_submodule(joined).out_features
    return int(inner if isinstance(inner, int) else features // 3)  # type: ignore[operator]


def _third(
    index: int, width: int, layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any
) -> Tensor:
    third: Tensor = output[..., index * width : (index + 1) * width]
    return third


def _projected(index: int, layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Tensor:
    """Repeats one projection of PyTorch's attention, which is no submodule of its own."""
    assert isinstance(layer, nn.MultiheadAttention) and layer.in_proj_weight is not None
    inputs = dict(zip(("query", "key", "value"), args, strict=False)) | dict(kwargs)
    bias = None if layer.in_proj_bias is None else layer.in_proj_bias.chunk(3)[index]
    return F.linear(inputs[("query", "key", "value")[index]], layer.in_proj_weight.chunk(3)[index], bias)


def _below(name: str, inner: str) -> str:
    return f"{name}.{inner}" if name else inner


def _class_name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _submodule(module: nn.Module, name: str) -> nn.Module | None:
    try:
        return module.get_submodule(name)
    except AttributeError:
        return None
