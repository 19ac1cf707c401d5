"""Tiny models of diffusers with random weights, each with a call of its own class written out as its pipeline makes it.

Nothing here uses layerprobe: these calls are what its adapters are compared with.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from diffusers.models.transformers import transformer_cosmos
from torch import Tensor, nn

# (model, x_t, t as the scheduler counts it, one per row) -> what the pipeline hands to the scheduler.
Direct = Callable[[Any, Tensor, Tensor], Tensor]

DDIM = diffusers.DDIMScheduler
LINEAR = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear", "clip_sample": False}
SCALED = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}


@dataclass(frozen=True)
class Case:
    """One class, how it is built tiny, and what is known about it.

    `tokens` is (number, width) of the first layer and `blocks` the number of layers. `image` says, for the table, where
    blocks keep the image.
    """

    name: str
    config: Mapping[str, Any]
    direct: Direct
    shape: tuple[int, ...]
    tokens: tuple[int, int]
    blocks: int
    scheduler: Any = None
    modality: str = "image"
    tell_shape: bool = False
    num_classes: int | None = None
    image: str = "only stream"
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> str:
        return self.name + ("".join(f"-{k}" for k in self.options) if self.options else "")

    def build(self) -> Any:
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of diffusers about itself
            model = getattr(diffusers, self.name)(**self.config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                # Tables that start at zero, or uninitialized, would hide what they do; so would small norms.
                scale = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.2
                middle = 1.0 if parameter.ndim == 1 and name.endswith("weight") else 0.0
                parameter.copy_(middle + scale * torch.randn(parameter.shape))
        return model

    def save(self, folder: Path) -> nn.Module:
        """Writes a pipeline's folder with the model and a scheduler, and without any text encoder."""
        model = self.build()
        component = "unet" if "UNet" in self.name else "transformer"
        model.save_pretrained(folder / component)
        if isinstance(self.scheduler, dict):
            (folder / "scheduler").mkdir()
            (folder / "scheduler/scheduler_config.json").write_text(json.dumps(self.scheduler))
        elif self.scheduler is not None:
            self.scheduler.save_pretrained(folder / "scheduler")
        index = {"_class_name": "DiffusionPipeline", component: ["diffusers", self.name], "text_encoder": [None, None]}
        (folder / "model_index.json").write_text(json.dumps(index))
        opened: nn.Module = model
        return opened


if not hasattr(transformer_cosmos, "transforms"):  # Cosmos takes one function of torchvision, which CI has not.
    resize = SimpleNamespace(resize=lambda mask, size, interpolation: nn.functional.interpolate(mask, size))
    stand_in = SimpleNamespace(functional=resize, InterpolationMode=SimpleNamespace(NEAREST=None))
    transformer_cosmos.transforms = stand_in


def flow(**config: Any) -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(**config)


def ddim(**config: Any) -> Any:
    return DDIM(**{**LINEAR, **config})


def zeros(x: Tensor, *shape: int) -> Tensor:
    return torch.zeros(len(x), *shape)


def ones(x: Tensor, length: int) -> Tensor:
    return torch.ones(len(x), length)


def image_ids(height: int, width: int) -> Tensor:
    """As FluxPipeline makes them, for a grid of tokens."""
    ids = torch.zeros(height, width, 3)
    ids[..., 1] += torch.arange(height)[:, None]
    ids[..., 2] += torch.arange(width)[None]
    return ids.reshape(-1, 3)


def pack(x: Tensor) -> Tensor:
    """As FluxPipeline packs (B, C, H, W)."""
    b, c, h, w = x.shape
    return x.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h // 2 * (w // 2), 4 * c)


def unpack(tokens: Tensor, like: Tensor) -> Tensor:
    b, c, h, w = like.shape
    return tokens.view(b, h // 2, w // 2, c, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(b, c, h, w)


def dit(m: Any, x: Tensor, t: Tensor) -> Tensor:
    null = torch.full((len(x),), 10)
    return m(x, timestep=t, class_labels=null).sample[:, :4]


def pixart(m: Any, x: Tensor, t: Tensor) -> Tensor:
    conditions = {"resolution": None, "aspect_ratio": None}
    text, mask = zeros(x, 120, 12), ones(x, 120)
    return m(x, text, t, added_cond_kwargs=conditions, encoder_attention_mask=mask).sample[:, :4]


def pixart_sized(m: Any, x: Tensor, t: Tensor) -> Tensor:
    size = torch.tensor([[64.0, 64.0]]).repeat(len(x), 1)
    conditions = {"resolution": size, "aspect_ratio": size[:, :1] / size[:, 1:]}
    text, mask = zeros(x, 120, 12), ones(x, 120)
    return m(x, text, t, added_cond_kwargs=conditions, encoder_attention_mask=mask).sample[:, :4]


def sd3(m: Any, x: Tensor, t: Tensor) -> Tensor:
    text, pooled = zeros(x, 333, 12), zeros(x, 10)
    return m(hidden_states=x, timestep=t, encoder_hidden_states=text, pooled_projections=pooled).sample


def flux(m: Any, x: Tensor, t: Tensor) -> Tensor:
    output = m(
        hidden_states=pack(x),
        timestep=t / 1000,
        guidance=torch.ones(len(x)) if m.config.guidance_embeds else None,
        pooled_projections=zeros(x, 10),
        encoder_hidden_states=zeros(x, 512, 12),
        txt_ids=torch.zeros(512, 3),
        img_ids=image_ids(x.shape[2] // 2, x.shape[3] // 2),
    ).sample
    return unpack(output, x)


def chroma(m: Any, x: Tensor, t: Tensor) -> Tensor:
    grid = (x.shape[2] // 2, x.shape[3] // 2)
    output = m(
        hidden_states=pack(x),
        timestep=t / 1000,
        encoder_hidden_states=zeros(x, 512, 12),
        txt_ids=torch.zeros(512, 3),
        img_ids=image_ids(*grid),
        attention_mask=torch.ones(len(x), 512 + math.prod(grid), dtype=torch.bool),
    ).sample
    return unpack(output, x)


def qwen(m: Any, x: Tensor, t: Tensor) -> Tensor:
    output = m(
        hidden_states=pack(x),
        timestep=t / 1000,
        encoder_hidden_states=zeros(x, 64, 12),
        encoder_hidden_states_mask=ones(x, 64).bool(),
        img_shapes=[[(1, x.shape[2] // 2, x.shape[3] // 2)]] * len(x),
    ).sample
    return unpack(output, x)


def auraflow(m: Any, x: Tensor, t: Tensor) -> Tensor:
    return m(x, encoder_hidden_states=zeros(x, 256, 12), timestep=t / 1000).sample


def sana(m: Any, x: Tensor, t: Tensor) -> Tensor:
    time = t * m.config.timestep_scale
    return m(x, encoder_hidden_states=zeros(x, 300, 12), encoder_attention_mask=ones(x, 300), timestep=time).sample


def lumina2(m: Any, x: Tensor, t: Tensor) -> Tensor:
    time, mask = 1 - t / 1000, ones(x, 256).bool()
    return -m(
        hidden_states=x, timestep=time, encoder_hidden_states=zeros(x, 256, 12), encoder_attention_mask=mask
    ).sample


def hunyuan_dit(m: Any, x: Tensor, t: Tensor) -> Tensor:
    from diffusers.models.embeddings import get_2d_rotary_pos_embed
    from diffusers.pipelines.hunyuandit.pipeline_hunyuandit import get_resize_crop_region_for_grid

    crop = get_resize_crop_region_for_grid((4, 4), 32)
    output = m(
        x,
        t.to(x.dtype),
        encoder_hidden_states=zeros(x, 5, 12),
        text_embedding_mask=ones(x, 5),
        encoder_hidden_states_t5=zeros(x, 6, 16),
        text_embedding_mask_t5=ones(x, 6),
        image_meta_size=torch.tensor([[64.0, 64, 64, 64, 0, 0]]).repeat(len(x), 1),
        style=torch.zeros(len(x), dtype=torch.long),
        image_rotary_emb=get_2d_rotary_pos_embed(8, crop, (4, 4), output_type="pt"),
    ).sample
    return output.chunk(2, dim=1)[0]


def cogview3(m: Any, x: Tensor, t: Tensor) -> Tensor:
    size, crop = torch.tensor([[64.0, 64.0]]).repeat(len(x), 1), zeros(x, 2)
    text = zeros(x, 224, 12)
    return m(
        hidden_states=x,
        encoder_hidden_states=text,
        timestep=t,
        original_size=size,
        target_size=size,
        crop_coords=crop,
    ).sample


def unet(m: Any, x: Tensor, t: Tensor) -> Tensor:
    return m(x, t).sample


def unet_classes(m: Any, x: Tensor, t: Tensor) -> Tensor:
    return m(x, t, class_labels=torch.full((len(x),), 5)).sample


def sd(m: Any, x: Tensor, t: Tensor) -> Tensor:
    return m(x, t, encoder_hidden_states=zeros(x, 77, 12)).sample


def motion(m: Any, x: Tensor, t: Tensor) -> Tensor:
    text = zeros(x, 77, 12).repeat_interleave(x.shape[2], dim=0)
    return m(x, t, encoder_hidden_states=text).sample


def sdxl(m: Any, x: Tensor, t: Tensor) -> Tensor:
    ids = torch.tensor([[128.0, 128, 0, 0, 128, 128]]).repeat(len(x), 1)
    added = {"text_embeds": zeros(x, 10), "time_ids": ids}
    return m(x, t, encoder_hidden_states=zeros(x, 77, 12), added_cond_kwargs=added).sample


def unet1d(m: Any, x: Tensor, t: Tensor) -> Tensor:
    return m(x, t.float()).sample


def audioldm2(m: Any, x: Tensor, t: Tensor) -> Tensor:
    return m(
        x,
        t,
        encoder_hidden_states=zeros(x, 8, 12),
        encoder_hidden_states_1=zeros(x, 1, 14),
        encoder_attention_mask_1=ones(x, 1),
    ).sample


def stable_audio(m: Any, x: Tensor, t: Tensor) -> Tensor:
    from diffusers.models.embeddings import get_1d_rotary_pos_embed

    rotary = get_1d_rotary_pos_embed(4, x.shape[2] + 1, use_real=True, repeat_interleave_real=False)
    text, duration = zeros(x, 130, 12), zeros(x, 1, 14)
    return m(
        x, t, encoder_hidden_states=text, global_hidden_states=duration, rotary_embedding=rotary, return_dict=False
    )[0]


def wan(m: Any, x: Tensor, t: Tensor) -> Tensor:
    return m(hidden_states=x, timestep=t, encoder_hidden_states=zeros(x, 512, 12)).sample


def latte(m: Any, x: Tensor, t: Tensor) -> Tensor:
    return m(hidden_states=x, encoder_hidden_states=zeros(x, 120, 12), timestep=t).sample.chunk(2, dim=1)[0]


def cogvideox(m: Any, x: Tensor, t: Tensor) -> Tensor:
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

    rotary = None
    if m.config.use_rotary_positional_embeddings:
        rotary = get_3d_rotary_pos_embed(16, ((0, 0), (4, 4)), (4, 4), 3)
    frames = x.transpose(1, 2)
    output = m(hidden_states=frames, encoder_hidden_states=zeros(x, 6, 12), timestep=t, image_rotary_emb=rotary).sample
    return output.transpose(1, 2)


def hunyuan_video(m: Any, x: Tensor, t: Tensor) -> Tensor:
    return m(
        hidden_states=x,
        timestep=t,
        encoder_hidden_states=zeros(x, 256, 12),
        encoder_attention_mask=ones(x, 256),
        pooled_projections=zeros(x, 10),
        guidance=torch.full((len(x),), 1000.0),
    ).sample


def mochi(m: Any, x: Tensor, t: Tensor) -> Tensor:
    text, mask = zeros(x, 256, 16), ones(x, 256).bool()
    return m(hidden_states=x, encoder_hidden_states=text, timestep=t, encoder_attention_mask=mask).sample


def ltx(m: Any, x: Tensor, t: Tensor) -> Tensor:
    b, c, f, h, w = x.shape
    output = m(
        hidden_states=x.permute(0, 2, 3, 4, 1).reshape(b, f * h * w, c),
        encoder_hidden_states=zeros(x, 128, 12),
        timestep=t,
        encoder_attention_mask=ones(x, 128),
        num_frames=f,
        height=h,
        width=w,
        rope_interpolation_scale=(8 / 25, 32, 32),
    ).sample
    return output.reshape(b, f, h, w, c).permute(0, 4, 1, 2, 3)


def allegro(m: Any, x: Tensor, t: Tensor) -> Tensor:
    from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro

    *turns, ft, fh, fw = get_3d_rotary_pos_embed_allegro(
        12, ((0, 0), (4, 4)), (4, 4), 3, interpolation_scale=(1.0, 1.0, 1.0)
    )
    places = torch.cartesian_prod(ft.long(), fh.long(), fw.long()).reshape(-1, 3).transpose(0, 1).reshape(3, 1, -1)
    rotary = (tuple(turns), tuple(places.contiguous()))
    text, mask = zeros(x, 512, 12), ones(x, 512)
    return m(x, text, t, encoder_attention_mask=mask, image_rotary_emb=rotary).sample


def flux2(m: Any, x: Tensor, t: Tensor) -> Tensor:
    b, c, h, w = x.shape
    output = m(
        hidden_states=x.reshape(b, c, h * w).permute(0, 2, 1),
        timestep=t / 1000,
        guidance=torch.ones(b) if m.config.guidance_embeds else None,
        encoder_hidden_states=zeros(x, 512, 12),
        txt_ids=torch.cartesian_prod(torch.arange(1), torch.arange(1), torch.arange(1), torch.arange(512)),
        img_ids=torch.cartesian_prod(torch.arange(1), torch.arange(h), torch.arange(w), torch.arange(1)),
    ).sample
    return output.permute(0, 2, 1).reshape(x.shape)


def bria(m: Any, x: Tensor, t: Tensor) -> Tensor:
    output = m(
        hidden_states=pack(x),
        timestep=t,
        encoder_hidden_states=zeros(x, 128, 12),
        txt_ids=torch.zeros(128, 3),
        img_ids=image_ids(x.shape[2] // 2, x.shape[3] // 2),
        return_dict=False,
    )[0]
    return unpack(output, x)


def bria_fibo(m: Any, x: Tensor, t: Tensor) -> Tensor:
    b, c, h, w = x.shape
    output = m(
        hidden_states=x.permute(0, 2, 3, 1).reshape(b, h * w, c),
        timestep=t,
        encoder_hidden_states=zeros(x, 128, 12),
        text_encoder_layers=[zeros(x, 128, 10)] * (m.config.num_layers + m.config.num_single_layers),
        txt_ids=torch.zeros(128, 3),
        img_ids=image_ids(h, w),
        return_dict=False,
    )[0]
    return output.reshape(b, h, w, c).permute(0, 3, 1, 2)


def text_line(length: int) -> Tensor:
    ids = torch.zeros(length, 3)
    ids[:, 1] += torch.arange(length)
    ids[:, 2] += torch.arange(length)
    return ids


def ovis(m: Any, x: Tensor, t: Tensor) -> Tensor:
    output = m(
        hidden_states=pack(x),
        timestep=t / 1000,
        encoder_hidden_states=zeros(x, 256, 12),
        txt_ids=text_line(256),
        img_ids=image_ids(x.shape[2] // 2, x.shape[3] // 2),
    ).sample
    return unpack(output, x)


def longcat_image(m: Any, x: Tensor, t: Tensor) -> Tensor:
    from diffusers.pipelines.longcat_image.pipeline_longcat_image import prepare_pos_ids

    height, width = x.shape[2] // 2, x.shape[3] // 2
    output = m(
        hidden_states=pack(x),
        timestep=t / 1000,
        encoder_hidden_states=zeros(x, 512, 12),
        txt_ids=prepare_pos_ids(modality_id=0, type="text", start=(0, 0), num_token=512),
        img_ids=prepare_pos_ids(modality_id=1, type="image", start=(512, 512), height=height, width=width),
    ).sample
    return unpack(output, x)


def krea2(m: Any, x: Tensor, t: Tensor) -> Tensor:
    output = m(
        hidden_states=pack(x),
        timestep=t / 1000,
        encoder_hidden_states=zeros(x, 512, 2, 12),
        encoder_attention_mask=ones(x, 512).bool(),
        position_ids=torch.cat([torch.zeros(512, 3), image_ids(x.shape[2] // 2, x.shape[3] // 2)]),
    ).sample
    return unpack(output, x)


def hidream(m: Any, x: Tensor, t: Tensor) -> Tensor:
    return -m(
        hidden_states=x,
        timesteps=t,
        encoder_hidden_states_t5=zeros(x, 128, 12),
        encoder_hidden_states_llama3=torch.zeros(2, len(x), 128, 14),
        pooled_embeds=zeros(x, 10),
    ).sample


def hunyuan_image(m: Any, x: Tensor, t: Tensor) -> Tensor:
    return m(
        hidden_states=x,
        timestep=t,
        timestep_r=t if m.config.use_meanflow else None,
        encoder_hidden_states=zeros(x, 1000, 12),
        encoder_attention_mask=ones(x, 1000),
        encoder_hidden_states_2=zeros(x, 128, 14),
        encoder_attention_mask_2=zeros(x, 128),
        guidance=torch.full((len(x),), 1000.0) if m.config.guidance_embeds else None,
    ).sample


def z_image(m: Any, x: Tensor, t: Tensor) -> Tensor:
    images = list(x.unsqueeze(2).unbind(0))
    return -torch.stack(m(images, (1000 - t) / 1000, list(zeros(x, 32, 12))).sample).squeeze(2)


def prx(m: Any, x: Tensor, t: Tensor) -> Tensor:
    return m(x, timestep=t / 1000, encoder_hidden_states=zeros(x, 256, 12), attention_mask=ones(x, 256).bool()).sample


def omnigen(m: Any, x: Tensor, t: Tensor) -> Tensor:
    from diffusers.pipelines.omnigen.processor_omnigen import OmniGenCollator

    tokens, collate = x.shape[2] * x.shape[3] // 4, OmniGenCollator(hidden_size=32)
    no_text = torch.zeros(len(x), 0, dtype=torch.long)
    # The time is 0 at noise and 1 at data, as in the published scheduler, which has one training step.
    return m(
        hidden_states=x,
        timestep=1 - t / 1000,
        input_ids=None,
        input_img_latents=[],
        input_image_sizes={},
        attention_mask=collate.create_mask(no_text, [tokens] * len(x))[0],
        position_ids=collate.create_position(no_text, [tokens] * len(x)),
    ).sample


def lumina_next(m: Any, x: Tensor, t: Tensor) -> Tensor:
    from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina

    rotary = get_2d_rotary_pos_embed_lumina(8, 384, 384, linear_factor=1.0, ntk_factor=1.0)
    output = m(x, 1 - t / 1000, zeros(x, 256, 12), ones(x, 256), rotary, cross_attention_kwargs={}).sample
    return -output.chunk(2, dim=1)[0]


def kandinsky3(m: Any, x: Tensor, t: Tensor) -> Tensor:
    return m(x, t, encoder_hidden_states=zeros(x, 128, 12), encoder_attention_mask=ones(x, 128)).sample


def cogview4(m: Any, x: Tensor, t: Tensor) -> Tensor:
    size, crop = torch.tensor([[64.0, 64.0]]).repeat(len(x), 1), zeros(x, 2)
    sizes = {"original_size": size, "target_size": size, "crop_coords": crop}
    return m(hidden_states=x, encoder_hidden_states=zeros(x, 16, 12), timestep=t, **sizes).sample


def hunyuan_video15(m: Any, x: Tensor, t: Tensor) -> Tensor:
    return m(
        hidden_states=torch.cat([x, torch.zeros_like(x), torch.zeros_like(x[:, :1])], dim=1),
        image_embeds=zeros(x, 729, 8),
        timestep=t,
        encoder_hidden_states=zeros(x, 1000, 12),
        encoder_attention_mask=ones(x, 1000),
        encoder_hidden_states_2=zeros(x, 256, 14),
        encoder_attention_mask_2=zeros(x, 256),
    ).sample


def sana_video(m: Any, x: Tensor, t: Tensor) -> Tensor:
    return m(x, encoder_hidden_states=zeros(x, 300, 12), encoder_attention_mask=ones(x, 300), timestep=t).sample


def cosmos(m: Any, x: Tensor, t: Tensor) -> Tensor:
    masks = {"padding_mask": torch.zeros(1, 1, 64, 64)}
    if m.config.in_channels > 4:
        masks["condition_mask"] = torch.zeros_like(x[:, :1])
    fps = 30 if m.config.extra_pos_embed_type == "learnable" else None
    return m(x, timestep=t / 1000, encoder_hidden_states=zeros(x, 512, 12), fps=fps, **masks).sample


def easyanimate(m: Any, x: Tensor, t: Tensor) -> Tensor:
    return m(x, t, encoder_hidden_states=zeros(x, 256, 12)).sample


def kandinsky5(m: Any, x: Tensor, t: Tensor) -> Tensor:
    latents = x.permute(0, 2, 3, 4, 1)
    if m.config.visual_cond:
        latents = torch.cat([latents, torch.zeros_like(latents), torch.zeros_like(latents[..., :1])], dim=-1)
    output = m(
        hidden_states=latents,
        encoder_hidden_states=zeros(x, 512, 12),
        pooled_projections=zeros(x, 10),
        timestep=t,
        visual_rope_pos=[torch.arange(x.shape[2]), torch.arange(x.shape[3] // 2), torch.arange(x.shape[4] // 2)],
        text_rope_pos=torch.arange(512),
        scale_factor=(1.0, 1.0, 1.0) if x.shape[2] == 1 else (1, 3.16, 3.16),
    ).sample
    return output.permute(0, 4, 1, 2, 3)


def ltx2(m: Any, x: Tensor, t: Tensor) -> Tensor:
    b, c, f, h, w = x.shape
    output = m(
        hidden_states=x.permute(0, 2, 3, 4, 1).reshape(b, f * h * w, c),
        audio_hidden_states=zeros(x, 1, 6),
        encoder_hidden_states=zeros(x, 1024, 12),
        audio_encoder_hidden_states=zeros(x, 1024, 12),
        timestep=t,
        sigma=t,
        encoder_attention_mask=ones(x, 1024),
        audio_encoder_attention_mask=ones(x, 1024),
        num_frames=f,
        height=h,
        width=w,
        audio_num_frames=1,
        isolate_modalities=True,
    ).sample
    return output.reshape(b, f, h, w, c).permute(0, 4, 1, 2, 3)


UNET = {
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 4,
}
PLAIN = {"down_block_types": ("DownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "UpBlock2D")}
CROSS = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 12,
    "attention_head_dim": 4,
}
TINY = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 3}
SMALL = {"in_channels": 4, "sample_size": 8, "patch_size": 2}
FLUXES = {
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 12,
    "axes_dims_rope": (4, 4, 8),
}
DIT = {**TINY, **SMALL, "out_channels": 8, "num_embeds_ada_norm": 10}
PIXART = {**TINY, **SMALL, "out_channels": 8, "cross_attention_dim": 16, "caption_channels": 12}
HUNYUAN_VIDEO = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "num_refiner_layers": 1,
    "text_embed_dim": 12,
    "pooled_projection_dim": 10,
    "rope_axes_dim": (4, 4, 8),
}
COGVIDEOX = {
    **TINY,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 8,
    "text_embed_dim": 12,
    "sample_width": 8,
    "sample_height": 8,
    "sample_frames": 9,
    "max_text_seq_length": 6,
}
HUNYUAN_IMAGE = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "num_refiner_layers": 1,
    "patch_size": (2, 2),
    "text_embed_dim": 12,
    "text_embed_2_dim": 14,
    "rope_axes_dim": (8, 8),
}
COSMOS = {
    **TINY,
    "in_channels": 4,
    "out_channels": 4,
    "attention_head_dim": 12,
    "text_embed_dim": 12,
    "adaln_lora_dim": 4,
    "max_size": (4, 16, 16),
    "patch_size": (1, 2, 2),
}
KANDINSKY5 = {
    "in_visual_dim": 4,
    "out_visual_dim": 4,
    "in_text_dim": 12,
    "in_text_dim2": 10,
    "time_dim": 8,
    "model_dim": 16,
    "ff_dim": 32,
    "num_text_blocks": 1,
    "num_visual_blocks": 3,
    "axes_dims": (2, 2, 4),
}
# As published; the class itself needs one more package, so its configuration is written by hand.
EDM_AUDIO = {"_class_name": "CosineDPMSolverMultistepScheduler", "prediction_type": "v_prediction", "sigma_data": 1.0}
EDM_AUDIO |= {"sigma_min": 0.3, "sigma_max": 500}
COG = diffusers.CogVideoXDDIMScheduler(
    **SCALED, prediction_type="v_prediction", rescale_betas_zero_snr=True, snr_shift_scale=3.0
)

CASES = (
    Case("DiTTransformer2DModel", DIT, dit, (4, 8, 8), (16, 16), 3, ddim(), num_classes=10),
    Case("PixArtTransformer2DModel", PIXART, pixart, (4, 8, 8), (16, 16), 3, ddim()),
    Case(
        "PixArtTransformer2DModel",
        {**PIXART, "attention_head_dim": 12, "cross_attention_dim": 24, "use_additional_conditions": True},
        pixart_sized,
        (4, 8, 8),
        (16, 24),
        3,
        ddim(),
        options={"sizes": True},
    ),
    Case(
        "SD3Transformer2DModel",
        {**TINY, **SMALL, "out_channels": 4, "joint_attention_dim": 12, "caption_projection_dim": 16}
        | {"pooled_projection_dim": 10, "pos_embed_max_size": 8},
        sd3,
        (4, 8, 8),
        (16, 16),
        3,
        flow(shift=3.0),
        image="second of a pair",
    ),
    Case(
        "FluxTransformer2DModel",
        {**FLUXES, "pooled_projection_dim": 10},
        flux,
        (4, 8, 8),
        (16, 32),
        4,
        flow(shift=3.0),
        tell_shape=True,
        image="second of a pair",
    ),
    Case(
        "FluxTransformer2DModel",
        {**FLUXES, "pooled_projection_dim": 10, "guidance_embeds": True},
        flux,
        (4, 8, 12),
        (24, 32),
        4,
        flow(use_dynamic_shifting=False),
        tell_shape=True,
        image="second of a pair",
        options={"guidance": True},
    ),
    Case(
        "ChromaTransformer2DModel",
        {**FLUXES, "approximator_num_channels": 16, "approximator_hidden_dim": 16, "approximator_layers": 1},
        chroma,
        (4, 8, 8),
        (16, 32),
        4,
        flow(),
        tell_shape=True,
        image="second of a pair, then after the text",
    ),
    Case(
        "Flux2Transformer2DModel",
        {**FLUXES, "timestep_guidance_channels": 8, "axes_dims_rope": (4, 4, 4, 4)},
        flux2,
        (16, 4, 4),
        (16, 32),
        4,
        flow(shift=3.0),
        tell_shape=True,
        image="second of a pair, then after the text",
    ),
    Case(
        "BriaTransformer2DModel",
        FLUXES,
        bria,
        (4, 8, 8),
        (16, 32),
        4,
        flow(),
        tell_shape=True,
        image="second of a pair, then after the text",
    ),
    Case(
        "BriaFiboTransformer2DModel",
        {**FLUXES, "text_encoder_dim": 10},
        bria_fibo,
        (16, 4, 4),
        (16, 32),
        4,
        flow(),
        tell_shape=True,
        image="second of a pair, then after the text",
    ),
    Case(
        "OvisImageTransformer2DModel",
        {**FLUXES, "out_channels": 16},
        ovis,
        (4, 8, 8),
        (16, 32),
        4,
        flow(),
        tell_shape=True,
        image="second of a pair",
    ),
    Case(
        "LongCatImageTransformer2DModel",
        FLUXES,
        longcat_image,
        (4, 8, 8),
        (16, 32),
        4,
        flow(),
        tell_shape=True,
        image="second of a pair",
    ),
    Case(
        "Krea2Transformer2DModel",
        {"in_channels": 16, "num_layers": 3, "attention_head_dim": 16, "num_attention_heads": 2}
        | {"num_key_value_heads": 1, "intermediate_size": 32, "timestep_embed_dim": 8, "text_hidden_dim": 12}
        | {"num_text_layers": 2, "text_num_attention_heads": 2, "text_num_key_value_heads": 2}
        | {"text_intermediate_size": 16, "num_layerwise_text_blocks": 1, "num_refiner_text_blocks": 1}
        | {"axes_dims_rope": (4, 4, 8)},
        krea2,
        (4, 8, 8),
        (16, 32),
        3,
        flow(),
        tell_shape=True,
        image="after the text",
    ),
    Case(
        "HiDreamImageTransformer2DModel",
        {"patch_size": 2, "in_channels": 4, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16}
        | {"num_attention_heads": 2, "caption_channels": [12, 14], "text_emb_dim": 10, "num_routed_experts": 2}
        | {
            "num_activated_experts": 1,
            "axes_dims_rope": (4, 4, 8),
            "max_resolution": (8, 8),
            "llama_layers": [0, 1, 1, 1],
        },
        hidream,
        (4, 8, 8),
        (16, 32),
        4,
        flow(shift=3.0),
        tell_shape=True,
        image="first of a pair, then before the text",
    ),
    Case(
        "HunyuanImageTransformer2DModel",
        HUNYUAN_IMAGE,
        hunyuan_image,
        (4, 8, 8),
        (16, 32),
        4,
        flow(shift=5.0),
        tell_shape=True,
        image="first of a pair",
    ),
    Case(
        "HunyuanImageTransformer2DModel",
        {**HUNYUAN_IMAGE, "use_meanflow": True, "guidance_embeds": True},
        hunyuan_image,
        (4, 8, 8),
        (16, 32),
        4,
        flow(shift=5.0),
        tell_shape=True,
        image="first of a pair",
        options={"meanflow": True},
    ),
    Case(
        "ZImageTransformer2DModel",
        {"in_channels": 4, "dim": 32, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2}
        # A published scale of 1000 would show the rounding of the time.
        | {"t_scale": 10.0, "cap_feat_dim": 12, "axes_dims": [4, 4, 8], "axes_lens": [128, 16, 16]},
        z_image,
        (4, 8, 8),
        (16, 32),
        3,
        flow(shift=3.0),
        tell_shape=True,
        image="before padding and text",
    ),
    Case(
        "PRXTransformer2DModel",
        {"in_channels": 4, "patch_size": 2, "context_in_dim": 12, "hidden_size": 16, "num_heads": 2, "depth": 3}
        | {"mlp_ratio": 2.0, "axes_dim": [4, 4], "bottleneck_size": None},
        prx,
        (4, 8, 8),
        (16, 16),
        3,
        flow(),
        tell_shape=True,
    ),
    Case(
        "OmniGenTransformer2DModel",
        {"in_channels": 4, "patch_size": 2, "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
        | {"intermediate_size": 32, "num_layers": 3, "vocab_size": 8, "pad_token_id": 0, "time_step_dim": 8}
        | {"rope_scaling": {"short_factor": [1.0] * 8, "long_factor": [1.0] * 8}, "pos_embed_max_size": 8},
        omnigen,
        (4, 8, 8),
        (16, 32),
        3,
        flow(invert_sigmas=True, num_train_timesteps=1),
        tell_shape=True,
        image="after the time token",
    ),
    Case(
        "QwenImageTransformer2DModel",
        {**{k: v for k, v in FLUXES.items() if k != "num_single_layers"}, "out_channels": 4},
        qwen,
        (4, 8, 8),
        (16, 32),
        2,
        flow(),
        tell_shape=True,
        image="second of a pair",
    ),
    Case(
        "AuraFlowTransformer2DModel",
        {**SMALL, "num_mmdit_layers": 2, "num_single_dit_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2}
        | {"joint_attention_dim": 12, "caption_projection_dim": 16, "pos_embed_max_size": 16},
        auraflow,
        (4, 8, 8),
        (16, 16),
        4,
        flow(shift=1.73),
        image="second of a pair, then after the text",
    ),
    Case(
        "SanaTransformer2DModel",
        {**TINY, "in_channels": 4, "out_channels": 4, "sample_size": 4, "patch_size": 1, "caption_channels": 12}
        | {"num_cross_attention_heads": 2, "cross_attention_head_dim": 8, "cross_attention_dim": 16},
        sana,
        (4, 4, 4),
        (16, 16),
        3,
        flow(shift=3.0),
    ),
    Case(
        "Lumina2Transformer2DModel",
        {**SMALL, "hidden_size": 24, "num_layers": 2, "num_refiner_layers": 1, "num_attention_heads": 2}
        | {"num_kv_heads": 1, "multiple_of": 8, "axes_dim_rope": (4, 4, 4), "cap_feat_dim": 12},
        lumina2,
        (4, 8, 8),
        (16, 24),
        3,
        flow(),
        image="after the text",
    ),
    Case(
        "LuminaNextDiT2DModel",
        {**SMALL, "hidden_size": 16, "num_layers": 3, "num_attention_heads": 2, "num_kv_heads": 1, "multiple_of": 8}
        | {"cross_attention_dim": 12},
        lumina_next,
        (4, 8, 8),
        (16, 16),
        3,
        flow(),
    ),
    Case(
        "HunyuanDiT2DModel",
        {**TINY, **SMALL, "num_layers": 4, "hidden_size": 16, "cross_attention_dim": 12, "cross_attention_dim_t5": 16}
        | {"pooled_projection_dim": 10, "text_len": 5, "text_len_t5": 6},
        hunyuan_dit,
        (4, 8, 8),
        (16, 16),
        4,
        DDIM(**{**SCALED, "beta_end": 0.03}, prediction_type="v_prediction"),
    ),
    Case(
        "CogView3PlusTransformer2DModel",
        {**TINY, "in_channels": 4, "out_channels": 4, "patch_size": 2, "text_embed_dim": 12, "time_embed_dim": 8}
        | {"condition_dim": 4, "pos_embed_max_size": 8},
        cogview3,
        (4, 8, 8),
        (16, 16),
        3,
        COG,
        tell_shape=True,
        image="first of a pair",
    ),
    Case(
        "CogView4Transformer2DModel",
        {**TINY, "in_channels": 4, "out_channels": 4, "patch_size": 2, "text_embed_dim": 12, "time_embed_dim": 8}
        | {"condition_dim": 4, "rope_axes_dim": (8, 8)},
        cogview4,
        (4, 8, 8),
        (16, 16),
        3,
        flow(),
        tell_shape=True,
        image="first of a pair",
    ),
    Case("UNet2DModel", {**UNET, **PLAIN}, unet, (4, 16, 16), (64, 8), 5, ddim(beta_schedule="squaredcos_cap_v2")),
    Case(
        "UNet2DModel",
        {**UNET, **PLAIN, "num_class_embeds": 6},
        unet_classes,
        (4, 16, 16),
        (64, 8),
        5,
        ddim(prediction_type="sample"),
        num_classes=5,
        options={"num_classes": 5},
    ),
    Case("UNet2DConditionModel", {**UNET, **CROSS}, sd, (4, 16, 16), (64, 8), 5, DDIM(**SCALED)),
    Case(
        "UNet2DConditionModel",
        {**UNET, **CROSS, "addition_embed_type": "text_time", "addition_time_embed_dim": 4}
        | {"projection_class_embeddings_input_dim": 34},
        sdxl,
        (4, 16, 16),
        (64, 8),
        5,
        DDIM(**SCALED, prediction_type="v_prediction"),
        options={"sdxl": True},
    ),
    Case(
        "Kandinsky3UNet",
        {"in_channels": 4, "time_embedding_dim": 16, "groups": 4, "attention_head_dim": 4, "layers_per_block": 2}
        | {"block_out_channels": (16, 16, 16, 16), "cross_attention_dim": 12, "encoder_hid_dim": 12},
        kandinsky3,
        (4, 16, 16),
        (64, 16),
        8,
        ddim(),
        tell_shape=True,
    ),
    Case(
        "UNet1DModel",
        {"sample_size": 32, "in_channels": 4, "out_channels": 4, "time_embedding_type": "positional"}
        | {"use_timestep_embedding": True, "act_fn": "silu", "block_out_channels": (8, 16), "norm_num_groups": 4}
        | {"down_block_types": ("DownResnetBlock1D", "DownResnetBlock1D"), "out_block_type": "OutConv1DBlock"}
        | {"up_block_types": ("UpResnetBlock1D", "UpResnetBlock1D"), "mid_block_type": "MidResTemporalBlock1D"}
        | {"downsample_each_block": False},
        unet1d,
        (4, 32),
        (16, 8),
        5,
        ddim(),
        modality="sequence",
    ),
    Case(
        "AudioLDM2UNet2DConditionModel",
        {**UNET, **PLAIN, "cross_attention_dim": ((None, 12, 14), (None, 12, 14)), "attention_head_dim": 4}
        | {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D")}
        | {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")},
        audioldm2,
        (4, 16, 8),
        (32, 8),
        5,
        DDIM(**SCALED),
        modality="audio",
        tell_shape=True,
    ),
    Case(
        "StableAudioDiTModel",
        {**TINY, "sample_size": 16, "in_channels": 4, "out_channels": 4, "num_key_value_attention_heads": 1}
        | {"cross_attention_dim": 16, "cross_attention_input_dim": 12, "global_states_input_dim": 14}
        | {"time_proj_dim": 8},
        stable_audio,
        (4, 16),
        (16, 16),
        3,
        EDM_AUDIO,
        modality="audio",
        image="after one token",
    ),
    Case(
        "UNet3DConditionModel",
        {**UNET, "norm_num_groups": 4, "cross_attention_dim": 12, "attention_head_dim": 4, "sample_size": 8}
        | {"down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D")}
        | {"up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D")},
        sd,
        (4, 3, 8, 8),
        (48, 8),
        5,
        DDIM(**SCALED),
        modality="video",
        tell_shape=True,
        image="frames in the batch",
    ),
    Case(
        "UNetMotionModel",
        {**UNET, "norm_num_groups": 4, "cross_attention_dim": 12, "num_attention_heads": 2, "sample_size": 8}
        | {"motion_num_attention_heads": 2, "motion_max_seq_length": 8}
        | {"down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion")}
        | {"up_block_types": ("UpBlockMotion", "CrossAttnUpBlockMotion")},
        motion,
        (4, 3, 8, 8),
        (48, 8),
        5,
        ddim(),
        modality="video",
        tell_shape=True,
        image="frames in the batch",
    ),
    Case(
        "WanTransformer3DModel",
        {"patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "num_layers": 3}
        | {"out_channels": 4, "text_dim": 12, "freq_dim": 8, "ffn_dim": 16, "rope_max_seq_len": 32},
        wan,
        (4, 3, 8, 8),
        (48, 24),
        3,
        diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        modality="video",
        tell_shape=True,
    ),
    Case(
        "SkyReelsV2Transformer3DModel",
        {"patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "num_layers": 3}
        | {"out_channels": 4, "text_dim": 12, "freq_dim": 8, "ffn_dim": 16, "rope_max_seq_len": 32},
        wan,
        (4, 3, 8, 8),
        (48, 24),
        3,
        diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=8.0),
        modality="video",
        tell_shape=True,
    ),
    Case(
        "LatteTransformer3DModel",
        {**TINY, **SMALL, "out_channels": 8, "cross_attention_dim": 16, "caption_channels": 12, "video_length": 3}
        | {"norm_type": "ada_norm_single", "num_embeds_ada_norm": 1000, "norm_elementwise_affine": False},
        latte,
        (4, 3, 8, 8),
        (48, 16),
        6,
        ddim(),
        modality="video",
        image="frames or places in the batch",
    ),
    Case(
        "CogVideoXTransformer3DModel",
        COGVIDEOX,
        cogvideox,
        (4, 3, 8, 8),
        (48, 32),
        3,
        COG,
        modality="video",
        image="first of a pair",
    ),
    Case(
        "CogVideoXTransformer3DModel",
        {**COGVIDEOX, "use_rotary_positional_embeddings": True},
        cogvideox,
        (4, 3, 8, 8),
        (48, 32),
        3,
        COG,
        modality="video",
        image="first of a pair",
        options={"rotary": True},
    ),
    Case(
        "HunyuanVideoTransformer3DModel",
        HUNYUAN_VIDEO,
        hunyuan_video,
        (4, 3, 8, 8),
        (48, 32),
        4,
        flow(shift=7.0),
        modality="video",
        tell_shape=True,
        image="first of a pair",
    ),
    Case(
        "HunyuanVideo15Transformer3DModel",
        {"in_channels": 9, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2}
        | {"num_refiner_layers": 1, "text_embed_dim": 12, "text_embed_2_dim": 14, "image_embed_dim": 8}
        | {"rope_axes_dim": (4, 4, 8), "task_type": "t2v"},
        hunyuan_video15,
        (4, 3, 4, 4),
        (48, 32),
        2,
        flow(shift=5.0),
        modality="video",
        tell_shape=True,
        image="first of a pair",
    ),
    Case(
        "MochiTransformer3DModel",
        {**TINY, "num_attention_heads": 8, "patch_size": 2, "in_channels": 4, "text_embed_dim": 16}
        | {"pooled_projection_dim": 16, "time_embed_dim": 8, "max_sequence_length": 16},
        mochi,
        (4, 3, 8, 8),
        (48, 64),
        3,
        flow(invert_sigmas=True),
        modality="video",
        tell_shape=True,
        image="first of a pair",
    ),
    Case(
        "LTXVideoTransformer3DModel",
        {**TINY, "in_channels": 4, "out_channels": 4, "cross_attention_dim": 16, "caption_channels": 12},
        ltx,
        (4, 3, 4, 4),
        (48, 16),
        3,
        flow(),
        modality="video",
        tell_shape=True,
    ),
    Case(
        "LTX2VideoTransformer3DModel",
        {**TINY, "in_channels": 4, "out_channels": 4, "cross_attention_dim": 16, "caption_channels": 12}
        | {"audio_in_channels": 6, "audio_out_channels": 6, "audio_num_attention_heads": 2}
        | {"audio_attention_head_dim": 4, "audio_cross_attention_dim": 8},
        ltx2,
        (4, 3, 4, 4),
        (48, 16),
        3,
        flow(),
        modality="video",
        tell_shape=True,
        image="first of a pair",
    ),
    Case(
        "SanaVideoTransformer3DModel",
        {**TINY, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "patch_size": (1, 2, 2)}
        | {"num_cross_attention_heads": 2, "cross_attention_head_dim": 12, "cross_attention_dim": 24}
        | {"caption_channels": 12, "rope_max_seq_len": 32},
        sana_video,
        (4, 3, 8, 8),
        (48, 24),
        3,
        flow(shift=8.0),
        modality="video",
        tell_shape=True,
    ),
    Case(
        "CosmosTransformer3DModel",
        COSMOS,
        cosmos,
        (4, 3, 8, 8),
        (48, 24),
        3,
        flow(),
        modality="video",
        tell_shape=True,
    ),
    Case(
        "CosmosTransformer3DModel",
        {**COSMOS, "in_channels": 5, "extra_pos_embed_type": None, "use_crossattn_projection": True}
        | {"crossattn_proj_in_channels": 12, "encoder_hidden_states_channels": 12},
        cosmos,
        (4, 3, 8, 8),
        (48, 24),
        3,
        diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
        modality="video",
        tell_shape=True,
        options={"world": True},
    ),
    Case(
        "EasyAnimateTransformer3DModel",
        {**TINY, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "patch_size": 2, "mmdit_layers": 2}
        | {"sample_width": 8, "sample_height": 8, "time_embed_dim": 8, "text_embed_dim": 12},
        easyanimate,
        (4, 3, 8, 8),
        (48, 32),
        3,
        flow(),
        modality="video",
        tell_shape=True,
        image="first of a pair",
    ),
    Case(
        "Kandinsky5Transformer3DModel",
        KANDINSKY5,
        kandinsky5,
        (4, 3, 8, 8),
        (48, 16),
        3,
        flow(shift=5.0),
        modality="video",
        tell_shape=True,
    ),
    Case(
        "Kandinsky5Transformer3DModel",
        {**KANDINSKY5, "visual_cond": True},
        kandinsky5,
        (4, 1, 8, 8),
        (16, 16),
        3,
        flow(shift=5.0),
        modality="video",
        tell_shape=True,
        options={"visual_cond": True},
    ),
    Case(
        "AllegroTransformer3DModel",
        {**TINY, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "cross_attention_dim": 24}
        | {"sample_height": 8, "sample_width": 8, "sample_frames": 3, "caption_channels": 12}
        | {"interpolation_scale_h": 1.0, "interpolation_scale_w": 1.0, "interpolation_scale_t": 1.0},
        allegro,
        (4, 3, 8, 8),
        (48, 24),
        3,
        ddim(),
        modality="video",
    ),
)
