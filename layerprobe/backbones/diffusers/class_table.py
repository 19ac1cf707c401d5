"""The table of diffusers classes: how each one is called, and where its outputs hold the image.

Every entry follows the call in the class's own pipeline in diffusers 0.42. `diffusers_class` defines the terms.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from layerprobe.backbones.diffusers.diffusers_class import (
    CHANNELS_LAST,
    FRAMES_FIRST,
    LISTED_FRAMES,
    Config,
    DiffusersClass,
    Shape,
    Text,
)
from layerprobe.noise import Prediction


def _pair(size: Any) -> Shape:
    return (size, size) if isinstance(size, int) else tuple(size)


def _square(c: Config) -> Shape | None:
    return None if c.sample_size is None else (c.in_channels, *_pair(c.sample_size))


def _patch2d(c: Config) -> Shape:
    return (c.patch_size, c.patch_size)


def _patch3d(c: Config) -> Shape:
    return (c.get("patch_size_t") or 1, c.patch_size, c.patch_size)


def _halvings(c: Config) -> Shape:
    edge = 2 ** (len(c.down_block_types) - 1)
    return (edge, edge)


def _only_text(c: Config, shape: Shape, text: Text) -> Mapping[str, Any]:
    return {"encoder_hidden_states": text.tokens}


def _masked_text(c: Config, shape: Shape, text: Text) -> Mapping[str, Any]:
    return {"encoder_hidden_states": text.tokens, "encoder_attention_mask": text.mask}


def _pixart(c: Config, shape: Shape, text: Text) -> Mapping[str, Any]:
    # The class itself decides with these two settings.
    extended = c.sample_size == 128 if c.use_additional_conditions is None else c.use_additional_conditions
    edges = torch.tensor([[8.0 * edge for edge in shape[1:]]])
    size = {"resolution": edges, "aspect_ratio": edges[:, :1] / edges[:, 1:]}
    return {
        **_masked_text(c, shape, text),
        "added_cond_kwargs": size if extended else dict.fromkeys(size),
    }


def _sd3(c: Config, shape: Shape, text: Text) -> Mapping[str, Any]:
    return {"encoder_hidden_states": text.tokens, "pooled_projections": text.pooled}


def _grid(*edges: int) -> Tensor:
    """Places of the tokens of a grid, row-major, shape (T, axes)."""
    return torch.stack(torch.meshgrid(*map(torch.arange, edges), indexing="ij"), -1).flatten(0, -2)


def _on_device(tensor: Tensor) -> Any:
    """An argument without a row for each sample."""
    return lambda x: tensor.to(x)


def _flux_ids(shape: Shape, text: Text, *, text_axes: tuple[int, ...] = (), offset: Shape = (0, 0, 0)) -> Any:
    """Places of the image (0, row, column) plus an offset, and of the text: 0, or its number along some axes."""
    image = _grid(1, *[edge // 2 for edge in shape[1:]]) + torch.tensor(offset)
    words = torch.zeros(text.tokens.shape[1], 3)
    words[:, list(text_axes)] = torch.arange(float(len(words)))[:, None]
    return {"img_ids": _on_device(image), "txt_ids": _on_device(words)}


def _flux(c: Config, shape: Shape, text: Text) -> Mapping[str, Any]:
    guidance = {"guidance": torch.ones(1)} if c.guidance_embeds else {}
    return {**_sd3(c, shape, text), **_flux_ids(shape, text), **guidance}


def _chroma(c: Config, shape: Shape, text: Text) -> Mapping[str, Any]:
    image = torch.ones(1, math.prod(shape[1:]) // 4, dtype=torch.bool)
    mask = torch.cat([text.mask, image], 1)
    return {"encoder_hidden_states": text.tokens, "attention_mask": mask, **_flux_ids(shape, text)}


def _bria(c: Config, shape: Shape, text: Text) -> Mapping[str, Any]:
    return {"encoder_hidden_states": text.tokens, **_flux_ids(shape, text)}


def _bria_fibo(c: Config, shape: Shape, text: Text) -> Mapping[str, Any]:
    image, words = _grid(1, *shape[1:]), torch.zeros(text.tokens.shape[1], 3)
    layers = torch.zeros(1, len(words), c.text_encoder_dim)
    return {
        "encoder_hidden_states": text.tokens,
        "text_encoder_layers": lambda x: [layers.to(x).expand(len(x), -1, -1)] * (c.num_layers + c.num_single_layers),
        "img_ids": _on_device(image),
        "txt_ids": _on_device(words),
    }


def _ovis(c: Config, shape: Shape, text: Text) -> Mapping[str, Any]:
    return {"encoder_hidden_states": text.tokens, **_flux_ids(shape, text, text_axes=(1, 2))}


def _longcat_image(c: Config, shape: Shape, text: Text) -> Mapping[str, Any]:
    # The image is of the second modality, and placed behind the longest text.
    ids = _flux_ids(shape, text, text_axes=(1, 2), offset=(1, 512, 512))
    return {"encoder_hidden_states": text.tokens, **ids}


def _flux2(c: Config, shape: Shape, text: Text) -> Mapping[str, Any]:
    guidance = {"guidance": torch.ones(1)} if c.guidance_embeds else {}
    ids = {"img_ids": _grid(1, *shape[1:], 1), "txt_ids": _grid(1, 1, 1, text.tokens.shape[1])}
    return {"encoder_hidden_states": text.tokens, **{k: _on_device(v) for k, v in ids.items()}, **guidance}


def _krea2(c: Config, shape: Shape, text: Text) -> Mapping[str, Any]:
    places = torch.cat([torch.zeros(text.tokens.shape[1], 3), _grid(1, *[edge // 2 for edge in shape[1:]])])
    layers = text.tokens.view(*text.tokens.shape[:2], c.num_text_layers, c.text_hidden_dim)
    return {
        "encoder_hidden_states": layers,
        "encoder_attention_mask": text.mask,
        "position_ids": _on_device(places),
    }


def _hidream(c: Config, shape: Shape, text: Text) -> Mapping[str, Any]:
    llama = (max(c.llama_layers) + 1, *text.tokens.shape[:2], c.caption_channels[1])
    return {
        "encoder_hidden_states_t5": text.tokens,
        "encoder_hidden_states_llama3": lambda x: x.new_zeros(llama).expand(-1, len(x), -1, -1),
        "pooled_embeds": text.pooled,
    }


def _z_image(c: Config, shape: Shape, text: Text) -> Mapping[str, Any]:
    return {"cap_feats": lambda x: [text.tokens[0, text.mask[0]].to(x)] * len(x)}


def _prx(c: Config, shape: Shape, text: Text) -> Mapping[str, Any]:
    return {"encoder_hidden_states": text.tokens, "attention_mask": text.mask}


def _lumina_next(c: Config, shape: Shape, text: Text) -> Mapping[str, Any]:
    from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina

    rotary = get_2d_rotary_pos_embed_lumina(
        c.hidden_size // c.num_attention_heads, 384, 384, linear_factor=1.0, ntk_factor=1.0
    )
    return {
        "encoder_hidden_states": text.tokens,
        "encoder_mask": text.mask,
        "image_rotary_emb": lambda x: rotary.to(x.device),
        "cross_attention_kwargs": lambda x: {},
    }


def _omnigen(c: Config, shape: Shape, text: Text) -> Mapping[str, Any]:
    length = 1 + math.prod(shape[1:]) // c.patch_size**2
    # The time token sees itself alone, the image everything.
    mask = torch.ones(1, length, length)
    mask[:, 0, 1:] = 0
    return {
        "input_ids": None,
        "input_img_latents": None,
        "input_image_sizes": lambda x: {},
        "attention_mask": mask,
        "position_ids": torch.arange(length)[None],
    }


def _qwen(c: Config, shape: Shape, text: Text) -> Mapping[str, Any]:
    grid = (1, shape[1] // 2, shape[2] // 2)
    return {
        "encoder_hidden_states": text.tokens,
        "encoder_hidden_states_mask": text.mask,
        "img_shapes": lambda x: [[grid]] * len(x),
    }


def _sana(c: Config, shape: Shape, text: Text) -> Mapping[str, Any]:
    guidance = {"guidance": torch.full((1,), float(c.guidance_embeds_scale))} if c.get("guidance_embeds") else {}
    return {**_masked_text(c, shape, text), **guidance}


def _unet_text(c: Config) -> tuple[int, int, int]:
    width = c.get("encoder_hid_dim") or c.cross_attention_dim
    # SDXL: the pooled text has the part of this width that the embedded sizes leave.
    sizes = c.get("projection_class_embeddings_input_dim") or 0
    pooled = sizes - 6 * (c.get("addition_time_embed_dim") or 0) if c.get("addition_embed_type") == "text_time" else 0
    return 77, width if isinstance(width, int) else width[0], pooled


def _unet(c: Config, shape: Shape, text: Text) -> Mapping[str, Any]:
    arguments: dict[str, Any] = {"encoder_hidden_states": text.tokens}
    if c.get("addition_embed_type") == "text_time":
        height, width = (8.0 * edge for edge in shape[1:])
        sizes = torch.tensor([[height, width, 0.0, 0.0, height, width]])
        arguments["added_cond_kwargs"] = {"text_embeds": text.pooled, "time_ids": sizes}
    return arguments


def _motion(c: Config, shape: Shape, text: Text) -> Mapping[str, Any]:
    # Unlike UNet3DConditionModel, this class needs the text once per frame.
    return {"encoder_hidden_states": lambda x: text.tokens.to(x).expand(len(x) * shape[1], -1, -1)}


def _cogvideox_size(c: Config) -> Shape:
    frames = (c.sample_frames - 1) // c.temporal_compression_ratio + 1
    patch = c.patch_size_t or 1
    return (c.in_channels, -(-frames // patch) * patch, c.sample_height, c.sample_width)


def _cogvideox(c: Config, shape: Shape, text: Text) -> Mapping[str, Any]:
    if not c.use_rotary_positional_embeddings:
        return _only_text(c, shape, text)
    from diffusers.models.embeddings import get_3d_rotary_pos_embed
    from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid

    frames, height, width = (edge // p for edge, p in zip(shape[1:], _patch3d(c), strict=True))
    base = (c.sample_height // c.patch_size, c.sample_width // c.patch_size)
    position: dict[str, Any] = (
        {"crops_coords": get_resize_crop_region_for_grid((height, width), base[1], base[0])}
        if c.patch_size_t is None
        else {"crops_coords": None, "grid_type": "slice", "max_size": base}
    )
    rotary = get_3d_rotary_pos_embed(c.attention_head_dim, grid_size=(height, width), temporal_size=frames, **position)
    return {**_only_text(c, shape, text), "image_rotary_emb": lambda x: tuple(part.to(x.device) for part in rotary)}


def _cosmos(c: Config, shape: Shape, text: Text) -> Mapping[str, Any]:
    from diffusers.models.transformers import transformer_cosmos

    if c.concat_padding_mask and not hasattr(transformer_cosmos, "transforms"):
        raise ModuleNotFoundError("Cosmos resizes a mask with torchvision, which is not installed; install torchvision")
    height, width = shape[2:]
    arguments: dict[str, Any] = {
        "encoder_hidden_states": text.tokens,
        "padding_mask": lambda x: x.new_zeros(1, 1, height, width),
    }
    if c.extra_pos_embed_type == "learnable":  # Cosmos 1; only its pipeline and the next one tell the frame rate.
        arguments["fps"] = lambda x: 30
    elif c.in_channels > c.out_channels and not c.use_crossattn_projection:
        arguments["fps"] = lambda x: 16
    if c.in_channels > c.out_channels:
        arguments["condition_mask"] = torch.zeros(1, 1, *shape[1:])
    return arguments


def _kandinsky5(c: Config, shape: Shape, text: Text) -> Mapping[str, Any]:
    if c.attention_type != "regular":
        raise ValueError(
            f"this Kandinsky 5 has {c.attention_type} attention, which needs settings of its pipeline; open one with "
            "regular attention, or wrap the module yourself"
        )
    frames, *pixels = (edge // p for edge, p in zip(shape[1:], c.patch_size, strict=True))
    places = [torch.arange(edge) for edge in (frames, *pixels)]
    small = all(480 <= 8 * edge <= 854 for edge in shape[2:])
    scale = (1.0, 1.0, 1.0) if frames == 1 else (1, 2, 2) if small else (1, 3.16, 3.16)
    words = torch.arange(text.tokens.shape[1])
    return {
        **_sd3(c, shape, text),
        "visual_rope_pos": lambda x: [axis.to(x.device) for axis in places],
        "text_rope_pos": lambda x: words.to(x.device),
        "scale_factor": lambda x: scale,
    }


def _hunyuan_second(text: Text, length: int, width: int | None) -> Mapping[str, Any]:
    """The second text, of glyphs to draw; without any, all of it is padding."""
    if width is None:
        return {}
    return {
        "encoder_hidden_states_2": torch.zeros(1, length, width),
        "encoder_attention_mask_2": torch.zeros(1, length, dtype=torch.bool),
    }


def _hunyuan_image(c: Config, shape: Shape, text: Text) -> Mapping[str, Any]:
    guidance = {"guidance": torch.full((1,), 1000.0)} if c.guidance_embeds else {}
    return {**_masked_text(c, shape, text), **_hunyuan_second(text, 128, c.text_embed_2_dim), **guidance}


def _hunyuan_video15(c: Config, shape: Shape, text: Text) -> Mapping[str, Any]:
    return {
        **_masked_text(c, shape, text),
        **_hunyuan_second(text, 256, c.text_embed_2_dim),
        "image_embeds": torch.zeros(1, 729, c.image_embed_dim),
    }


def _hunyuan_video(c: Config, shape: Shape, text: Text) -> Mapping[str, Any]:
    guidance = {"guidance": torch.full((1,), 1000.0)} if c.guidance_embeds else {}
    return {**_masked_text(c, shape, text), "pooled_projections": text.pooled, **guidance}


def _ltx(c: Config, shape: Shape, text: Text) -> Mapping[str, Any]:
    frames, height, width = (edge // p for edge, p in zip(shape[1:], _patch3d(c), strict=True))
    # The published VAE at 25 frames per second: 8 frames and 32 pixels per latent.
    scale = (8 / 25, 32, 32)
    grid = {"num_frames": lambda x: frames, "height": lambda x: height, "width": lambda x: width}
    return {**_masked_text(c, shape, text), **grid, "rope_interpolation_scale": lambda x: scale}


def _ltx2(c: Config, shape: Shape, text: Text) -> Mapping[str, Any]:
    grid = _ltx(c, shape, text)
    width = c.caption_channels if c.use_prompt_embeddings else c.audio_cross_attention_dim
    return {
        **{name: grid[name] for name in ("num_frames", "height", "width")},
        **_masked_text(c, shape, text),
        "audio_hidden_states": torch.zeros(1, 1, c.audio_in_channels),
        "audio_num_frames": lambda x: 1,
        "audio_encoder_hidden_states": torch.zeros(1, text.tokens.shape[1], width),
        "audio_encoder_attention_mask": text.mask,
        "isolate_modalities": lambda x: True,
    }


def _allegro(c: Config, shape: Shape, text: Text) -> Mapping[str, Any]:
    from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro

    frames, height, width = (edge // p for edge, p in zip(shape[1:], _patch3d(c), strict=True))
    scales = (c.interpolation_scale_t, c.interpolation_scale_h, c.interpolation_scale_w)
    *rotations, t, h, w = get_3d_rotary_pos_embed_allegro(
        c.attention_head_dim, ((0, 0), (height, width)), (height, width), frames, interpolation_scale=scales
    )
    positions = torch.cartesian_prod(t.long(), h.long(), w.long()).T.reshape(3, 1, -1).contiguous()

    def rotary(x: Tensor) -> Any:
        moved = tuple(tuple(part.to(x.device) for part in axis) for axis in rotations)
        return moved, tuple(axis.to(x.device) for axis in positions)

    return {**_masked_text(c, shape, text), "image_rotary_emb": rotary}


def _stable_audio(c: Config, shape: Shape, text: Text) -> Mapping[str, Any]:
    from diffusers.models.embeddings import get_1d_rotary_pos_embed

    # One token before the audio carries time and duration.
    rotary = get_1d_rotary_pos_embed(
        c.attention_head_dim // 2, shape[1] + 1, use_real=True, repeat_interleave_real=False
    )
    return {
        "encoder_hidden_states": text.tokens,
        "global_hidden_states": text.pooled[:, None],
        "rotary_embedding": lambda x: tuple(part.to(x.device) for part in rotary),
    }


def _audioldm2_widths(c: Config) -> tuple[int, int]:
    width = c.cross_attention_dim
    inner = width[0] if isinstance(width, (tuple, list)) and isinstance(width[0], (tuple, list)) else width
    widths = [w for w in ([inner] if isinstance(inner, int) else inner) if w is not None]
    return widths[0], widths[-1]


def _audioldm2(c: Config, shape: Shape, text: Text) -> Mapping[str, Any]:
    second = torch.zeros(1, 1, _audioldm2_widths(c)[1])
    mask = torch.ones(1, 1, dtype=torch.bool)
    return {
        "encoder_hidden_states": text.tokens,
        "encoder_hidden_states_1": second,
        "encoder_attention_mask_1": mask,
    }


def _hunyuan_dit(c: Config, shape: Shape, text: Text) -> Mapping[str, Any]:
    from diffusers.models.embeddings import get_2d_rotary_pos_embed
    from diffusers.pipelines.hunyuandit.pipeline_hunyuandit import get_resize_crop_region_for_grid

    grid = (shape[1] // c.patch_size, shape[2] // c.patch_size)
    crop = get_resize_crop_region_for_grid(grid, 512 // 8 // c.patch_size)
    rotary = get_2d_rotary_pos_embed(c.attention_head_dim, crop, grid, output_type="pt")
    pixels = [8.0 * edge for edge in shape[1:]]
    sizes = torch.tensor([[*pixels, *pixels, 0.0, 0.0]])
    return {
        "encoder_hidden_states": text.tokens,
        "text_embedding_mask": text.mask,
        # The class takes views of these two, so their rows cannot share memory.
        "encoder_hidden_states_t5": lambda x: x.new_zeros(len(x), c.text_len_t5, c.cross_attention_dim_t5),
        "text_embedding_mask_t5": torch.ones(1, c.text_len_t5, dtype=torch.bool),
        "image_meta_size": lambda x: sizes.to(x).repeat(len(x), 1),
        "style": torch.zeros(1, dtype=torch.long),
        "image_rotary_emb": lambda x: tuple(part.to(x.device) for part in rotary),
    }


def _cogview(c: Config, shape: Shape, text: Text) -> Mapping[str, Any]:
    pixels = torch.tensor([[8.0 * edge for edge in shape[1:]]])
    sizes = {"original_size": pixels, "target_size": pixels, "crop_coords": torch.zeros(1, 2)}
    return {"encoder_hidden_states": text.tokens, **sizes}


_FLOW: tuple[str, Prediction] = ("flow", "velocity")
_DDPM: tuple[str, Prediction] = ("ddpm-linear", "eps")
_STAGES = ("down_blocks.*", "mid_block", "up_blocks.*")
_STAGE_NAMES = ("down_blocks", "mid_block", "up_blocks")
_BLOCKS = ("transformer_blocks.*",)
_DOUBLE_SINGLE = ("transformer_blocks.*", "single_transformer_blocks.*")
_DOUBLE_SINGLE_NAMES = ("transformer_blocks", "single_transformer_blocks")

_MEAN_FLOW = "the network's second time is equal to the first, so that it gives the velocity at that time"


def _second_time(c: Config) -> tuple[str, ...]:
    return ("timestep_r",) if c.use_meanflow else ()


_FLUX = DiffusersClass(
    layers=_DOUBLE_SINGLE,
    patch=lambda c: (2, 2),
    text=lambda c: (512, c.joint_attention_dim, c.pooled_projection_dim),
    arguments=_flux,
    second=_DOUBLE_SINGLE_NAMES,
    packed=True,
    times=(0, 1),
    trained=_FLOW,
)
_WAN = DiffusersClass(
    layers=("blocks.*",),
    patch=lambda c: tuple(c.patch_size),
    text=lambda c: (512, c.text_dim, 0),
    arguments=_only_text,
    trained=_FLOW,
)
_VIDEO_UNET = DiffusersClass(
    layers=_STAGES,
    patch=lambda c: (1, *_halvings(c)),
    text=_unet_text,
    arguments=_only_text,
    frames=_STAGE_NAMES,
)

CLASSES: dict[str, DiffusersClass] = {
    "DiTTransformer2DModel": DiffusersClass(layers=_BLOCKS, patch=_patch2d, size=_square, trained=_DDPM),
    "PixArtTransformer2DModel": DiffusersClass(
        layers=_BLOCKS,
        patch=_patch2d,
        size=_square,
        text=lambda c: (120, c.caption_channels or c.cross_attention_dim, 0),
        arguments=_pixart,
        trained=_DDPM,
    ),
    "SD3Transformer2DModel": DiffusersClass(
        layers=_BLOCKS,
        patch=_patch2d,
        size=_square,
        text=lambda c: (333, c.joint_attention_dim, c.pooled_projection_dim),
        arguments=_sd3,
        second=("transformer_blocks",),
        trained=_FLOW,
    ),
    "FluxTransformer2DModel": _FLUX,
    "Flux2Transformer2DModel": replace(
        _FLUX, patch=lambda c: (1, 1), text=lambda c: (512, c.joint_attention_dim, 0), arguments=_flux2
    ),
    "ChromaTransformer2DModel": replace(_FLUX, text=lambda c: (512, c.joint_attention_dim, 0), arguments=_chroma),
    "BriaTransformer2DModel": replace(
        _FLUX, text=lambda c: (128, c.joint_attention_dim, 0), arguments=_bria, times=(0, 1000)
    ),
    "BriaFiboTransformer2DModel": replace(
        _FLUX,
        patch=lambda c: (1, 1),
        text=lambda c: (128, c.joint_attention_dim, 0),
        arguments=_bria_fibo,
        times=(0, 1000),
        zeros_as_text=True,
    ),
    "OvisImageTransformer2DModel": replace(_FLUX, text=lambda c: (256, c.joint_attention_dim, 0), arguments=_ovis),
    "LongCatImageTransformer2DModel": replace(
        _FLUX, text=lambda c: (512, c.joint_attention_dim, 0), arguments=_longcat_image
    ),
    "Krea2Transformer2DModel": replace(
        _FLUX,
        layers=_BLOCKS,
        text=lambda c: (512, c.num_text_layers * c.text_hidden_dim, 0),
        arguments=_krea2,
        second=("transformer_blocks",),
        zeros_as_text=True,
    ),
    "HiDreamImageTransformer2DModel": DiffusersClass(
        layers=("double_stream_blocks.*", "single_stream_blocks.*"),
        patch=_patch2d,
        text=lambda c: (128, c.caption_channels[0], c.text_emb_dim),
        arguments=_hidream,
        first=("double_stream_blocks", "single_stream_blocks"),
        negated=True,
        zeros_as_text=True,
        trained=_FLOW,
    ),
    "HunyuanImageTransformer2DModel": DiffusersClass(
        layers=_DOUBLE_SINGLE,
        patch=lambda c: tuple(c.patch_size),
        text=lambda c: (1000, c.text_embed_dim, 0),
        arguments=_hunyuan_image,
        first=_DOUBLE_SINGLE_NAMES,
        more_times=_second_time,
        trained=_FLOW,
        assumes=lambda c: _MEAN_FLOW if c.use_meanflow else "",
    ),
    "ZImageTransformer2DModel": DiffusersClass(
        layers=("noise_refiner.*", "layers.*"),
        patch=lambda c: (c.all_patch_size[0],) * 2,
        text=lambda c: (32, c.cap_feat_dim, 0),
        arguments=_z_image,
        first=("noise_refiner", "layers"),
        layout=LISTED_FRAMES,
        times=(1, 0),
        trained=_FLOW,
    ),
    "PRXTransformer2DModel": DiffusersClass(
        layers=("blocks.*",),
        patch=_patch2d,
        text=lambda c: (256, c.context_in_dim, 0),
        arguments=_prx,
        times=(0, 1),
        trained=_FLOW,
    ),
    "OmniGenTransformer2DModel": DiffusersClass(
        layers=("layers.*",),
        patch=_patch2d,
        arguments=_omnigen,
        second=("layers",),
        times=(1, 0),
        trained=_FLOW,
        assumes=lambda c: "the network gets no prompt at all, not the empty prompt of its pipeline",
    ),
    "QwenImageTransformer2DModel": DiffusersClass(
        layers=_BLOCKS,
        patch=lambda c: (2, 2),
        text=lambda c: (64, c.joint_attention_dim, 0),
        arguments=_qwen,
        second=("transformer_blocks",),
        packed=True,
        times=(0, 1),
        trained=_FLOW,
    ),
    "AuraFlowTransformer2DModel": DiffusersClass(
        layers=("joint_transformer_blocks.*", "single_transformer_blocks.*"),
        patch=_patch2d,
        size=_square,
        text=lambda c: (256, c.joint_attention_dim, 0),
        arguments=_only_text,
        second=("joint_transformer_blocks", "single_transformer_blocks"),
        times=(0, 1),
        trained=_FLOW,
    ),
    "SanaTransformer2DModel": DiffusersClass(
        layers=_BLOCKS,
        patch=_patch2d,
        size=_square,
        text=lambda c: (300, c.caption_channels, 0),
        arguments=_sana,
        trained=_FLOW,
    ),
    "Lumina2Transformer2DModel": DiffusersClass(
        layers=("noise_refiner.*", "layers.*"),
        patch=_patch2d,
        size=_square,
        text=lambda c: (256, c.cap_feat_dim, 0),
        arguments=_masked_text,
        second=("layers",),
        text_mask="encoder_attention_mask",
        times=(1, 0),
        trained=_FLOW,
    ),
    "LuminaNextDiT2DModel": DiffusersClass(
        layers=("layers.*",),
        patch=_patch2d,
        size=_square,
        text=lambda c: (256, c.cross_attention_dim, 0),
        arguments=_lumina_next,
        times=(1, 0),
        trained=_FLOW,
        assumes=lambda c: "positions are those of the trained size; its pipeline stretches them for other sizes",
    ),
    "HunyuanDiT2DModel": DiffusersClass(
        layers=("blocks.*",),
        patch=_patch2d,
        size=_square,
        text=lambda c: (c.text_len, c.cross_attention_dim, 0),
        arguments=_hunyuan_dit,
        float_time=True,
        zeros_as_text=True,
    ),
    "CogView3PlusTransformer2DModel": DiffusersClass(
        layers=_BLOCKS,
        patch=_patch2d,
        text=lambda c: (224, c.text_embed_dim, 0),
        arguments=_cogview,
        first=("transformer_blocks",),
        text_first_inside=True,
    ),
    "CogView4Transformer2DModel": DiffusersClass(
        layers=_BLOCKS,
        patch=_patch2d,
        text=lambda c: (16, c.text_embed_dim, 0),
        arguments=_cogview,
        first=("transformer_blocks",),
        text_first_inside=True,
        trained=_FLOW,
    ),
    "UNet2DModel": DiffusersClass(layers=_STAGES, patch=_halvings, size=_square),
    "UNet2DConditionModel": DiffusersClass(
        layers=_STAGES, patch=_halvings, size=_square, text=_unet_text, arguments=_unet
    ),
    "Kandinsky3UNet": DiffusersClass(
        layers=("down_blocks.*", "up_blocks.*"),
        patch=lambda c: (2 ** (len(c.block_out_channels) - 1),) * 2,
        text=lambda c: (128, c.encoder_hid_dim, 0),
        arguments=_masked_text,
    ),
    "UNet1DModel": DiffusersClass(
        layers=_STAGES,
        patch=lambda c: (1,),
        size=lambda c: (c.in_channels, c.sample_size),
        channels_first=True,
        float_time=True,
    ),
    "UNet3DConditionModel": _VIDEO_UNET,
    "UNetMotionModel": replace(_VIDEO_UNET, arguments=_motion),
    "AudioLDM2UNet2DConditionModel": DiffusersClass(
        layers=_STAGES,
        patch=_halvings,
        text=lambda c: (8, _audioldm2_widths(c)[0], 0),
        arguments=_audioldm2,
        zeros_as_text=True,
    ),
    "StableAudioDiTModel": DiffusersClass(
        layers=_BLOCKS,
        patch=lambda c: (1,),
        size=lambda c: (c.in_channels, c.sample_size),
        text=lambda c: (130, c.cross_attention_input_dim, c.global_states_input_dim),
        arguments=_stable_audio,
        second=("transformer_blocks",),
        zeros_as_text=True,
    ),
    "WanTransformer3DModel": _WAN,
    "SkyReelsV2Transformer3DModel": _WAN,
    "LatteTransformer3DModel": DiffusersClass(
        layers=("transformer_blocks.*", "temporal_transformer_blocks.*"),
        patch=lambda c: (1, *_patch2d(c)),
        size=lambda c: (c.in_channels, c.video_length, *_pair(c.sample_size)),
        text=lambda c: (120, c.caption_channels, 0),
        arguments=_only_text,
        frames=("transformer_blocks",),
        columns=("temporal_transformer_blocks",),
        interleaved=True,
        trained=_DDPM,
    ),
    "CogVideoXTransformer3DModel": DiffusersClass(
        layers=_BLOCKS,
        patch=_patch3d,
        size=_cogvideox_size,
        text=lambda c: (c.max_text_seq_length, c.text_embed_dim, 0),
        arguments=_cogvideox,
        first=("transformer_blocks",),
        text_first_inside=True,
        layout=FRAMES_FIRST,
    ),
    "HunyuanVideoTransformer3DModel": DiffusersClass(
        layers=_DOUBLE_SINGLE,
        patch=_patch3d,
        text=lambda c: (256, c.text_embed_dim, c.pooled_projection_dim),
        arguments=_hunyuan_video,
        first=_DOUBLE_SINGLE_NAMES,
        trained=_FLOW,
    ),
    "HunyuanVideo15Transformer3DModel": DiffusersClass(
        layers=_BLOCKS,
        patch=_patch3d,
        text=lambda c: (1000, c.text_embed_dim, 0),
        arguments=_hunyuan_video15,
        first=("transformer_blocks",),
        # The noisy sample, an image of as many channels, and a mask.
        noisy=lambda c: (c.in_channels - 1) // 2,
        blank=lambda c: c.in_channels - (c.in_channels - 1) // 2,
        more_times=_second_time,
        trained=_FLOW,
        assumes=lambda c: _MEAN_FLOW if c.use_meanflow else "",
    ),
    "MochiTransformer3DModel": DiffusersClass(
        layers=_BLOCKS,
        patch=lambda c: (1, *_patch2d(c)),
        text=lambda c: (256, c.text_embed_dim, 0),
        arguments=_masked_text,
        first=("transformer_blocks",),
        times=(1000, 0),
        trained=_FLOW,
    ),
    "LTXVideoTransformer3DModel": DiffusersClass(
        layers=_BLOCKS,
        patch=_patch3d,
        text=lambda c: (128, c.caption_channels, 0),
        arguments=_ltx,
        packed=True,
        trained=_FLOW,
    ),
    "LTX2VideoTransformer3DModel": DiffusersClass(
        layers=_BLOCKS,
        patch=_patch3d,
        text=lambda c: (1024, c.caption_channels if c.use_prompt_embeddings else c.cross_attention_dim, 0),
        arguments=_ltx2,
        first=("transformer_blocks",),
        packed=True,
        more_times=lambda c: ("sigma",),
        zeros_as_text=True,
        trained=_FLOW,
        assumes=lambda c: "there is no sound: the video does not attend to it, as in its pipeline's isolated guidance",
    ),
    "SanaVideoTransformer3DModel": DiffusersClass(
        layers=_BLOCKS,
        patch=lambda c: tuple(c.patch_size),
        text=lambda c: (300, c.caption_channels, 0),
        arguments=_sana,
        trained=_FLOW,
    ),
    "CosmosTransformer3DModel": DiffusersClass(
        layers=_BLOCKS,
        patch=lambda c: tuple(c.patch_size),
        text=lambda c: (512, c.crossattn_proj_in_channels if c.use_crossattn_projection else c.text_embed_dim, 0),
        arguments=_cosmos,
        noisy=lambda c: c.out_channels,
        times=(0, 1),
        assumes=lambda c: "no frame is given: the mask of given frames is 0" if c.in_channels > c.out_channels else "",
    ),
    "EasyAnimateTransformer3DModel": DiffusersClass(
        layers=_BLOCKS,
        patch=lambda c: (1, *_patch2d(c)),
        text=lambda c: (256, c.text_embed_dim, 0),
        arguments=_only_text,
        first=("transformer_blocks",),
        trained=_FLOW,
    ),
    "Kandinsky5Transformer3DModel": DiffusersClass(
        layers=("visual_transformer_blocks.*",),
        patch=lambda c: tuple(c.patch_size),
        text=lambda c: (512, c.in_text_dim, c.in_text_dim2),
        arguments=_kandinsky5,
        layout=CHANNELS_LAST,
        noisy=lambda c: c.in_visual_dim,
        blank=lambda c: c.in_visual_dim + 1 if c.visual_cond else 0,
        trained=_FLOW,
    ),
    "AllegroTransformer3DModel": DiffusersClass(
        layers=_BLOCKS,
        patch=_patch3d,
        size=lambda c: (c.in_channels, c.sample_frames, c.sample_height, c.sample_width),
        text=lambda c: (512, c.caption_channels, 0),
        arguments=_allegro,
    ),
}
