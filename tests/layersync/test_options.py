"""What may differ from the paper: the schedule against its formula, and what is refused."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from typing import Any

import pytest
import torch

from layerprobe.layersync.options import SyncOptions, check_noise_levels


def test_the_defaults_are_the_papers() -> None:
    options = SyncOptions()
    assert not (
        options.scheduled or options.ranged or options.second_pass or options.centered or options.projector_width
    )
    assert [options.factor(step) for step in (0, 1, 10**6)] == [1, 1, 1]


def test_options_survive_json() -> None:
    options = SyncOptions((0.5, 2.0), 10, "cosine", 100, (0.2, 0.9), True, 64, 0.99, 0.2)
    assert SyncOptions(**json.loads(json.dumps(asdict(options)))) == options


@pytest.mark.parametrize(
    ("decay", "wanted"),
    [
        ("constant", [0.25, 0.5, 0.75, 1, 1, 1, 1, 0, 0]),
        ("linear", [0.25, 0.5, 0.75, 1, 0.75, 0.5, 0.25, 0, 0]),
        ("cosine", [0.25, 0.5, 0.75, 1, *((1 + math.cos(math.pi * part / 4)) / 2 for part in (1, 2, 3)), 0, 0]),
    ],
)
def test_weight_rises_falls_and_stops(decay: Any, wanted: list[float]) -> None:
    options = SyncOptions(warmup_steps=3, decay=decay, stop_step=7)
    assert options.scheduled
    assert [options.factor(step) for step in range(9)] == pytest.approx(wanted)


def test_a_stop_without_a_warm_up_and_a_warm_up_without_a_stop() -> None:
    assert [SyncOptions(stop_step=2).factor(step) for step in range(4)] == [1, 1, 0, 0]
    assert [SyncOptions(warmup_steps=1).factor(step) for step in range(4)] == [0.5, 1, 1, 1]
    assert [SyncOptions(decay="linear", stop_step=2).factor(step) for step in range(3)] == [1, 0.5, 0]


def test_teacher_sees_at_most_the_gap_less_noise_and_never_less_than_none() -> None:
    level, draw = torch.tensor([0.9, 0.5, 0.1, 0.0]), torch.tensor([0.0, 0.5, 0.99, 0.5])
    torch.testing.assert_close(
        SyncOptions(noise_gap=0.2).teacher_level(level, draw), torch.tensor([0.9, 0.4, 0.0, 0.0])
    )
    assert torch.equal(SyncOptions(teacher_decay=0.9).teacher_level(level, draw), level)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pair_weights": (1.0, math.nan)}, r"^the weights of the pairs must be finite, got \(1.0, nan\)$"),
        ({"decay": "exponential", "stop_step": 5}, "^unknown decay 'exponential'; use constant, linear or cosine$"),
        ({"decay": "linear"}, "^a linear decay ends at the stop step; pass stop_step$"),
        ({"warmup_steps": -1}, "^need warmup_steps and projector_width of at least 0, got -1, 0$"),
        ({"projector_width": -2}, "^need warmup_steps and projector_width of at least 0, got 0, -2$"),
        ({"warmup_steps": 5, "stop_step": 5}, "^the stop step 5 is not after the warm-up of 5 steps$"),
        ({"stop_step": 0}, "^the stop step 0 is not after the warm-up of 0 steps$"),
        ({"noise_range": (0.5, 0.5)}, r"^the noise range must be two rising levels in \[0, 1\], got \(0.5, 0.5\)$"),
        ({"noise_range": (0.0, 1.5)}, "^the noise range must be two rising levels"),
        ({"noise_range": (0.1,)}, "^the noise range must be two rising levels"),
        ({"noise_range": (math.nan, 1.0)}, "^the noise range must be two rising levels"),
        ({"teacher_decay": 1.0}, r"^need teacher_decay in \[0, 1\) and noise_gap in \[0, 1\], got 1.0, 0.0$"),
        ({"noise_gap": math.nan}, r"^need teacher_decay in \[0, 1\) and noise_gap in \[0, 1\], got 0.0, nan$"),
    ],
)
def test_options_that_mean_nothing_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SyncOptions(**options)


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        (torch.tensor([0, 999]), "^the noise levels are of torch.int64, like the times of a scheduler; pass sigma"),
        (torch.tensor([0.5, 1.5]), r"^a noise level is 1.5, which is outside \[0, 1\]; pass sigma"),
        (torch.tensor([-0.25]), "^a noise level is -0.25, which is outside"),
        (torch.tensor([float("nan")]), "^a noise level is nan, which is outside"),
    ],
)
def test_noise_levels_are_numbers_from_0_to_1(levels: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_noise_levels(levels)
    with pytest.raises(ValueError, match=message):
        SyncOptions(noise_gap=0.2).teacher_level(levels, torch.zeros(len(levels)))
    check_noise_levels(torch.tensor([0.0, 1.0], dtype=torch.bfloat16))
