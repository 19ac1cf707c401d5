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

from layerprobe.backbones.diffusers.diffusers_class import Config, DiffusersClass, Shape, Text
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


def _flux_ids(shape: Shape, text: Text) -> Mapping[str, Any]:
    rows, columns = torch.meshgrid(*[torch.arange(edge // 2) for edge in shape[1:]], indexing="ij")
    image = torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(-1, 3)
    words = torch.zeros(text.tokens.shape[1], 3)
    return {"img_ids": lambda x: image.to(x), "txt_ids": lambda x: words.to(x)}


def _flux(c: Config, shape: Shape, text: Text) -> Mapping[str, Any]:
    guidance = {"guidance": torch.ones(1)} if c.guidance_embeds else {}
    return {**_sd3(c, shape, text), **_flux_ids(shape, text), **guidance}


def _chroma(c: Config, shape: Shape, text: Text) -> Mapping[str, Any]:
    image = torch.ones(1, math.prod(shape[1:]) // 4, dtype=torch.bool)
    mask = torch.cat([text.mask, image], 1)
    return {"encoder_hidden_states": text.tokens, "attention_mask": mask, **_flux_ids(shape, text)}


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


def _hunyuan_video(c: Config, shape: Shape, text: Text) -> Mapping[str, Any]:
    guidance = {"guidance": torch.full((1,), 1000.0)} if c.guidance_embeds else {}
    return {**_masked_text(c, shape, text), "pooled_projections": text.pooled, **guidance}


def _ltx(c: Config, shape: Shape, text: Text) -> Mapping[str, Any]:
    frames, height, width = (edge // p for edge, p in zip(shape[1:], _patch3d(c), strict=True))
    # The published VAE at 25 frames per second: 8 frames and 32 pixels per latent.
    scale = (8 / 25, 32, 32)
    grid = {"num_frames": lambda x: frames, "height": lambda x: height, "width": lambda x: width}
    return {**_masked_text(c, shape, text), **grid, "rope_interpolation_scale": lambda x: scale}


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
    "FluxTransformer2DModel": DiffusersClass(
        layers=_DOUBLE_SINGLE,
        patch=lambda c: (2, 2),
        text=lambda c: (512, c.joint_attention_dim, c.pooled_projection_dim),
        arguments=_flux,
        second=_DOUBLE_SINGLE_NAMES,
        packed=True,
        times=(0, 1),
        trained=_FLOW,
    ),
    "ChromaTransformer2DModel": DiffusersClass(
        layers=_DOUBLE_SINGLE,
        patch=lambda c: (2, 2),
        text=lambda c: (512, c.joint_attention_dim, 0),
        arguments=_chroma,
        second=_DOUBLE_SINGLE_NAMES,
        packed=True,
        times=(0, 1),
        trained=_FLOW,
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
    ),
    "UNet2DModel": DiffusersClass(layers=_STAGES, patch=_halvings, size=_square),
    "UNet2DConditionModel": DiffusersClass(
        layers=_STAGES, patch=_halvings, size=_square, text=_unet_text, arguments=_unet
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
        frames_before_channels=True,
    ),
    "HunyuanVideoTransformer3DModel": DiffusersClass(
        layers=_DOUBLE_SINGLE,
        patch=_patch3d,
        text=lambda c: (256, c.text_embed_dim, c.pooled_projection_dim),
        arguments=_hunyuan_video,
        first=_DOUBLE_SINGLE_NAMES,
        trained=_FLOW,
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
    "AllegroTransformer3DModel": DiffusersClass(
        layers=_BLOCKS,
        patch=_patch3d,
        size=lambda c: (c.in_channels, c.sample_frames, c.sample_height, c.sample_width),
        text=lambda c: (512, c.caption_channels, 0),
        arguments=_allegro,
    ),
}
