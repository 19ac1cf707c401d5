"""LoRA fine-tuning of a Wan video transformer of diffusers with LayerSync, block 8 <- block 16, weight 0.002.

A narrow Wan, latents and text, all random, stand in, so that the example runs anywhere. In your code use

- the model `WanTransformer3DModel.from_pretrained(folder, subfolder="transformer")`, which has 30 blocks;
- the latents of your videos from the pipeline's VAE, normalized as in the pipeline;
- the embeddings of your captions from the pipeline's text encoder.

Source of pair and weight: the LoRA code of LayerSync (arXiv:2510.12581), which has no stop-gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import WanTransformer3DModel
from peft import LoraConfig
from torch import Tensor, nn
from torch.nn import functional as F

from layerprobe.layersync import LayerSync

PAIRS = [("blocks.8", "blocks.16")]
SHIFT = 5.0  # Wan's flow shift: more of the high noise levels


def narrow_wan() -> Any:
    """Returns the transformer of Wan 2.1 with 18 blocks of width 24 and random weights."""
    return WanTransformer3DModel(
        num_layers=18, num_attention_heads=2, attention_head_dim=12, ffn_dim=48, freq_dim=8, text_dim=12,
        in_channels=4, out_channels=4, rope_max_seq_len=32,
    )  # fmt: skip


def flow_matching_loss(transformer: nn.Module, latents: Tensor, text: Tensor) -> Tensor:
    """Returns the loss for latents (B, C, frames, height, width) and text (B, tokens, width)."""
    t, eps = torch.rand(len(latents)), torch.randn_like(latents)
    t = SHIFT * t / (1 + (SHIFT - 1) * t)
    x_t = torch.lerp(latents, eps, t.view(-1, 1, 1, 1, 1))
    velocity = transformer(x_t, timestep=1000 * t, encoder_hidden_states=text, return_dict=False)[0]
    return F.mse_loss(velocity, eps - latents)


def fine_tune(folder: str, *, weight: float = 0.002, steps: int = 12) -> tuple[Any, list[float], list[float]]:
    """Trains and saves an adapter; returns the model with it, and the loss and the cosine of each step."""
    torch.manual_seed(0)
    transformer = narrow_wan().requires_grad_(False)
    transformer.add_adapter(LoraConfig(r=8, lora_alpha=8, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    transformer.enable_gradient_checkpointing()  # non-reentrant, as LayerSync requires
    transformer.train()
    adapter = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(adapter, lr=1e-2)
    latents, text = torch.randn(2, 4, 2, 4, 4), torch.randn(2, 8, 12)
    losses, cosines = [], []
    with LayerSync(transformer, PAIRS, weight=weight) as sync:
        for step in range(steps):
            loss = flow_matching_loss(transformer, latents, text)
            (loss + sync.loss()).backward()
            losses.append(loss.item())
            cosines.append(sync.cosines[sync.pairs[0]].item())
            optimizer.step()
            optimizer.zero_grad()
            if step % 4 == 0 or step == steps - 1:
                print(f"step {step:3}  loss {losses[-1]:.3f}  cosine {cosines[-1]:.4f}")
    transformer.save_lora_adapter(folder)
    print(f"adapter with {sum(p.numel() for p in adapter)} parameters saved in {folder}")
    return transformer, losses, cosines


if __name__ == "__main__":
    transformer, losses, cosines = fine_tune("wan-lora")
