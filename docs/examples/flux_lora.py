"""LoRA fine-tuning of a Flux transformer of diffusers with LayerSync, in a loop with accelerate.

Blocks of Flux carry image and text. LayerSync aligns the tokens of the image alone, across the two lists of blocks. A
narrow Flux, latents and text, all random, stand in, so that the example runs anywhere. In your code use

- the model `FluxTransformer2DModel.from_pretrained(folder, subfolder="transformer")`, with 19 and 38 blocks;
- the packed latents of your images, and the text embeddings, as the pipeline makes them;
- the pair of your run: `LayerSync.from_selection(transformer, "runs/flux")`.

Source of the call: examples/dreambooth/train_dreambooth_lora_flux.py of diffusers.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from diffusers import FluxTransformer2DModel
from peft import LoraConfig
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from layerprobe.layersync import LayerSync

PAIR = ("transformer_blocks.0", "single_transformer_blocks.2")
EDGE, WORDS = 4, 6  # tokens of the image along an edge, tokens of the text


def narrow_flux() -> Any:
    """Returns the transformer of Flux with 2 + 3 blocks of width 32 and random weights."""
    return FluxTransformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=3, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=12, pooled_projection_dim=10, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip


def flow_matching_loss(transformer: nn.Module, latents: Tensor, text: Tensor) -> Tensor:
    """Returns the loss for packed latents (B, tokens, 16) and text (B, words, 12)."""
    t, eps = torch.randn(len(latents)).sigmoid(), torch.randn_like(latents)
    rows, columns = torch.meshgrid(torch.arange(EDGE), torch.arange(EDGE), indexing="ij")
    velocity = transformer(
        torch.lerp(latents, eps, t.view(-1, 1, 1)), timestep=t, encoder_hidden_states=text,
        pooled_projections=text.mean(1)[:, :10], txt_ids=torch.zeros(WORDS, 3), return_dict=False,
        img_ids=torch.stack([torch.zeros(EDGE, EDGE), rows, columns], -1).flatten(0, 1),
    )[0]  # fmt: skip
    return F.mse_loss(velocity, eps - latents)


def fine_tune(*, weight: float = 0.3, steps: int = 12) -> tuple[Any, list[dict[str, float]]]:
    """Trains an adapter; returns the model with it, and the log of each step."""
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True)
    transformer = narrow_flux().requires_grad_(False)
    transformer.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    adapter = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    data = TensorDataset(torch.randn(8, EDGE * EDGE, 16), torch.randn(8, WORDS, 12))
    model, optimizer, loader = accelerator.prepare(
        transformer, torch.optim.AdamW(adapter, lr=1e-2), DataLoader(data, batch_size=4)
    )
    log: list[dict[str, float]] = []
    with LayerSync(model, [PAIR], weight=weight) as sync:
        while len(log) < steps:
            for latents, text in loader:
                loss = flow_matching_loss(model, latents, text)
                accelerator.backward(loss + sync.loss())
                log.append({"loss": loss.item()} | sync.logs())
                optimizer.step()
                optimizer.zero_grad()
    return accelerator.unwrap_model(model), log


if __name__ == "__main__":
    transformer, log = fine_tune()
    print(*log[:1], *log[-1:], sep="\n")
