"""Plans are checked, and their identity decides which runs may be resumed."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest

from layerprobe.layersync.options import SyncOptions
from layerprobe.training.plan import TrainingPlan

PLAN = TrainingPlan(steps=13, batch_size=5, learning_rate=1e-2, label_drop=0.25, ema_decay=0.8, seed=3)


def test_length_and_frequency_of_writing_are_not_part_of_the_identity() -> None:
    free = {"steps": 7, "checkpoint_every": 7, "log_every": 7, "accumulate": 5, "keep_last": 7}
    for name, value in free.items():
        assert replace(PLAN, **{name: value}).identity() == PLAN.identity()
    others = {
        "sync": SyncOptions(centered=True),
        "time_sampling": "logit-normal",
        "time_mean": 1.0,
        "time_std": 2.0,
        "loss_weighting": "min-snr",
        "snr_gamma": 1.0,
        "more_ema_decays": (0.5,),
    }
    assert {*PLAN.identity(), *free, *others} == {field.name for field in fields(TrainingPlan)}
    for name, value in others.items():
        assert set(replace(PLAN, **{name: value}).identity()) - set(PLAN.identity()) == {name}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"checkpoint_every": 0}, "checkpoint_every must be at least 1"),
        ({"log_every": 0}, "log_every must be at least 1"),
        ({"steps": -1}, "steps must be at least 1, got -1"),
        ({"learning_rate": 0.0}, "learning_rate > 0"),
        ({"learning_rate": float("nan")}, "learning_rate > 0"),
        ({"label_drop": 1.5}, "label_drop must be at most 1, got 1.5"),
        ({"ema_decay": 1.0}, r"ema_decay in \[0, 1\); got 0.01 and 1.0"),
        ({"warmup_steps": -1}, "warmup_steps must be at least 0, got -1"),
        ({"weight_decay": -0.1}, "weight_decay must be at least 0"),
        ({"clip_norm": -1.0}, "clip_norm must be at least 0, got -1.0"),
        ({"clip_norm": float("nan")}, "clip_norm must be at least 0, got nan"),
        ({"weight": float("inf")}, "the weight of the alignment must be finite, got inf"),
        ({"precision": "bf16"}, "unknown precision 'bf16'; use auto, float32, tf32 or bfloat16"),
        ({"seed": -1}, "seed must be between 0 and"),
        ({"accumulate": 0}, "accumulate must be at least 1, got 0"),
        ({"accumulate": 2}, "a batch of 5 cannot be cut into 2 equal parts; change accumulate"),
        ({"keep_last": 0}, "keep_last must be at least 1, got 0"),
        ({"time_sampling": "cosine"}, "unknown time_sampling 'cosine'; use uniform or logit-normal"),
        ({"loss_weighting": "snr"}, "unknown loss_weighting 'snr'; use none, min-snr, velocity or likelihood"),
        ({"time_std": 0.0}, "time_std must be above 0, got 0.0"),
        ({"time_mean": float("nan")}, "time_mean must be finite, got nan"),
        ({"snr_gamma": 0.0}, "snr_gamma must be above 0, got 0.0"),
        ({"more_ema_decays": (1.5,)}, r"averages need different decays in \[0, 1\), got 0.8, 1.5"),
        ({"more_ema_decays": (0.8,)}, "averages need different decays"),
    ],
)
def test_impossible_plans_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        replace(PLAN, **options)
    assert "\n" not in str(error.value)
