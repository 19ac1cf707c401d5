"""LayerSync in Lightning: training_step adds the loss; a callback places and removes the hooks, and logs."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import lightning
import torch
from plain_loop import PAIRS, Denoiser, digits, flow_matching_loss
from torch import Tensor
from torch.utils.data import DataLoader

from layerprobe.layersync import LayerSync


class Model(lightning.LightningModule):
    """Any Lightning module; the network inside it is aligned."""

    def __init__(self, *, weight: float) -> None:
        super().__init__()
        self.network = Denoiser()
        self.sync = LayerSync(self.network, PAIRS, weight=weight)

    def training_step(self, x: Tensor) -> Tensor:
        loss = flow_matching_loss(self.network, x)
        self.log("loss", loss)
        return loss + self.sync.loss()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.network.parameters(), lr=1e-3)


class HoldHooks(lightning.Callback):
    """Keeps a module's `sync` active during `fit`, removes the hooks after a failure too, and logs statistics."""

    def __init__(self) -> None:
        self._stack = ExitStack()

    def on_fit_start(self, trainer: lightning.Trainer, module: Any) -> None:
        self._stack.enter_context(module.sync)

    def on_train_batch_end(self, trainer: lightning.Trainer, module: Any, *_: Any) -> None:
        if trainer.global_step % 10 == 0:
            module.log_dict(module.sync.statistics())
            cosine = module.sync.cosines[module.sync.pairs[0]]
            print(f"step {trainer.global_step:3}  loss {trainer.callback_metrics['loss']:.3f}  cosine {cosine:.4f}")

    def on_fit_end(self, trainer: lightning.Trainer, module: Any) -> None:
        self._stack.close()

    def on_exception(self, trainer: lightning.Trainer, module: Any, exception: BaseException) -> None:
        self._stack.close()


def train(*, weight: float, steps: int = 30, **options: Any) -> tuple[Model, lightning.Trainer]:
    """Trains and returns the module and the trainer; `options` are passed to the trainer."""
    lightning.seed_everything(0, verbose=False)
    model = Model(weight=weight)
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = lightning.Trainer(
        accelerator="cpu", devices=1, max_steps=steps, callbacks=[HoldHooks()], **quiet, **options
    )
    trainer.fit(model, DataLoader(digits(), batch_size=32, shuffle=True, drop_last=True))
    return model, trainer


if __name__ == "__main__":
    model, trainer = train(weight=0.3)
