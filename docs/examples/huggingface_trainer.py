"""LayerSync in the Trainer of transformers: a subclass whose `compute_loss` adds the alignment."""

from __future__ import annotations

from typing import Any

from plain_loop import Denoiser, digits, flow_matching_loss
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments, set_seed

from layerprobe.layersync import LayerSync


class AlignedTrainer(Trainer):
    """A Trainer that aligns layers of its model during training; evaluation does not change."""

    def __init__(self, *args: Any, pairs: list[tuple[str, str]], weight: float, **options: Any) -> None:
        super().__init__(*args, **options)
        self.sync = LayerSync(self.model, pairs, weight=weight)
        self.statistics: dict[str, float] = {}

    def train(self, *args: Any, **options: Any) -> Any:
        with self.sync:
            return super().train(*args, **options)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **options: Any
    ) -> Any:
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **options)
        if model.training:
            loss = loss + self.sync.loss()
            if (self.state.global_step + 1) % self.state.logging_steps == 0:
                self.statistics = self.sync.statistics()
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any) -> None:
        super().log(logs | self.statistics if "loss" in logs else logs, *args)


class Model(nn.Module):
    """A model as the Trainer expects it: `forward` returns the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.network = Denoiser()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"loss": flow_matching_loss(self.network, x)}


def train(folder: str, *, weight: float, steps: int = 30, **options: Any) -> AlignedTrainer:
    """Trains and returns the trainer; `trainer.state.log_history` contains the losses and the alignment."""
    set_seed(0)
    arguments = TrainingArguments(
        folder, max_steps=steps, per_device_train_batch_size=32, learning_rate=1e-3, logging_steps=10,
        save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False, **options,
    )  # fmt: skip
    trainer = AlignedTrainer(
        Model(), arguments, train_dataset=[{"x": x} for x in digits()],
        pairs=[("network.blocks.1", "network.blocks.4")], weight=weight,
    )  # fmt: skip
    trainer.train()
    return trainer


if __name__ == "__main__":
    trainer = train("runs/huggingface", weight=0.3)
