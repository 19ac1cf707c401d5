"""Samples from a backbone: the probability-flow ODE or an SDE from noise to data, with guidance.

All solvers work on y = x_t / n, n = alpha + sigma / scale. In every family y = (1 - level) x_0 + level scale eps, the
linear path, on which even steps of the level are good steps, so one integrator serves all.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from layerprobe.backbones import Backbone
from layerprobe.capture import evaluating
from layerprobe.noise import END, NoiseSchedule, RandomStream

Velocity = Callable[[Tensor, Tensor, Tensor | None], Tensor]
Solver = Literal["euler", "heun", "dopri5", "euler-maruyama"]
Diffusion = Literal["sigma", "sbdm", "constant", "linear", "decreasing", "increasing-decreasing"]
LastStep = Literal["mean", "tweedie"]


@dataclass(frozen=True)
class SamplingPlan:
    """How samples are drawn.

    Attributes:
        solver: Of the ODE "euler" (one evaluation a step), "heun" (two, second order) or "dopri5" (six, fifth order,
            with steps of its own size for each sample), of the SDE "euler-maruyama" (one).
        steps: Steps from noise to data; dopri5 tries the first of so many and goes on as its tolerances allow.
        guidance: Classifier-free guidance scale; 1 is none.
        seed: Sample i starts from the noise of (seed, i), whatever the batch; the SDE's noise is that of
            (seed, i, step).
        guidance_interval: Lowest and highest noise level at which there is guidance; without it elsewhere
            (Kynkaanniemi et al. 2024, arXiv:2404.07724).
        rtol: Of dopri5: error allowed in a step, relative to the sample's entries.
        atol: Of dopri5: error allowed besides.
        diffusion: Of the SDE: how much noise goes in and out at a time of the path; the names of SiT.
        diffusion_scale: Factor of that, SiT's diffusion norm.
        last_step: Of the SDE, from `last_step_size` to data without new noise: "mean" is a step like the others,
            "tweedie" the expected sample.
        last_step_size: Of the SDE, in the path's time.
    """

    solver: Solver = "heun"
    steps: int = 25
    guidance: float = 1.0
    seed: int = 0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    rtol: float = 1e-3
    atol: float = 1e-6
    diffusion: Diffusion = "sigma"
    diffusion_scale: float = 1.0
    last_step: LastStep = "mean"
    last_step_size: float = 0.04

    def __post_init__(self) -> None:
        for name, known in (("solver", Solver), ("diffusion", Diffusion), ("last_step", LastStep)):
            if getattr(self, name) not in get_args(known):
                what = name.replace("_", " ")
                raise ValueError(f"unknown {what} {getattr(self, name)!r}; use {_one_of(get_args(known))}")
        if self.steps < 1:
            raise ValueError(f"sampling takes at least 1 step, got {self.steps}")
        if self.solver == "euler-maruyama" and self.steps < 2:
            raise ValueError("euler-maruyama takes at least 2 steps, the last one without noise; pass more steps")
        low, high = self.guidance_interval
        if not 0 <= low <= high <= 1:
            raise ValueError(
                f"the guidance interval needs 0 <= low <= high <= 1 (noise levels), got {low:g} and {high:g}"
            )
        if not (0 < self.rtol < 1 and 0 < self.atol < math.inf):
            raise ValueError(f"tolerances lie above 0 and rtol below 1, got rtol {self.rtol:g} and atol {self.atol:g}")
        if not 0 <= self.diffusion_scale < math.inf or not 0 < self.last_step_size < 1:
            raise ValueError(
                f"need diffusion_scale >= 0 and last_step_size in (0, 1), got {self.diffusion_scale:g} and "
                f"{self.last_step_size:g}"
            )


@torch.inference_mode()
def sample(
    backbone: Backbone,
    indices: Sequence[int],
    *,
    labels: Tensor | None = None,
    plan: SamplingPlan | None = None,
    batch_size: int = 256,
    mask: Tensor | None = None,
) -> Tensor:
    """Draws samples; number i is the same in any batch, order and process up to rounding.

    Padding is 0 from beginning to end, and what is real does not depend on how much of it there is.

    Args:
        backbone: The model; averaged weights make better samples.
        indices: Which samples to draw, for instance range(100).
        labels: Class of each sample, shape (len(indices),); None samples without a class.
        plan: Solver, steps, guidance, seed.
        batch_size: Samples at a time.
        mask: What is to be no padding, shape (len(indices), *grid), bool; None fills every sample.

    Returns:
        Shape (len(indices), C, *grid), on the CPU.

    Raises:
        ValueError: If labels or mask do not match the indices or the model, or guidance is asked for without labels.
    """
    plan = plan or SamplingPlan()
    _check_labels(backbone, indices, labels, plan)
    _check_mask(backbone, indices, mask)
    schedule, level_range = backbone.schedule, sampling_range(backbone, plan)
    # x_t is sigma eps at the highest level, and is divided as `straightened` wants it.
    start_std = level_range[1] * schedule.scale
    out = [torch.empty(0, *backbone.shape)]
    with evaluating(backbone.module):
        for start in range(0, len(indices), batch_size):
            ids = torch.tensor(list(indices[start : start + batch_size]))
            noise = RandomStream(plan.seed, "sampling").normal(ids, backbone.shape) * start_std
            y = noise.to(backbone.device)
            part = slice(start, start + batch_size)
            condition = None if labels is None else labels[part].to(backbone.device)
            real = None if mask is None else mask[part].to(backbone.device)
            if real is None:
                velocity = straightened(guided(backbone, plan.guidance, plan.guidance_interval), schedule)
            else:
                velocity = straightened(padded(backbone, plan, condition, real), schedule)
                y, condition = y * real.unsqueeze(1), torch.arange(len(y), device=backbone.device)
            if plan.solver == "dopri5":
                filled = None if real is None else real.double().flatten(1).mean(1)
                y = integrate_adaptively(velocity, y, condition, level_range, plan, filled=filled)
            elif plan.solver == "euler-maruyama":
                y = diffuse(velocity, y, ids, condition, schedule, level_range, plan)
            else:
                y = integrate(velocity, y, condition, level_range, plan)
            # The SDE's noise goes everywhere.
            out.append((y if real is None else y.masked_fill(~real.unsqueeze(1), 0.0)).cpu())
    return torch.cat(out)


def sampling_range(backbone: Backbone, plan: SamplingPlan) -> tuple[float, float]:
    """The noise levels between which a plan asks the network: those of training, but for ends of no use.

    Pure noise says nothing through eps or the score, and clean data nothing through x_0 or the score; SBDM's
    diffusion is infinite where there is no data. SiT cuts off the same ends (arXiv:2401.08740).
    """
    schedule, prediction = backbone.schedule, backbone.prediction
    low, high = schedule.level_range
    near_low, near_high = schedule.level_at(torch.tensor([END, 1 - END], dtype=torch.float64, device="cpu")).tolist()
    if low == 0 and plan.solver == "dopri5" and prediction in ("x0", "score"):
        low = near_low
    sbdm = plan.solver == "euler-maruyama" and plan.diffusion == "sbdm"
    if high == 1 and (prediction in ("eps", "score") or sbdm):
        high = near_high
    return low, high


def guided(backbone: Backbone, guidance: float, interval: tuple[float, float] = (0.0, 1.0)) -> Velocity:
    """Classifier-free guidance at the noise levels of an interval: v_null + guidance (v_label - v_null).

    Source: Ho & Salimans 2022 (arXiv:2207.12598); Kynkaanniemi et al. 2024 (arXiv:2404.07724) for the interval.
    """

    def velocity(x_t: Tensor, level: Tensor, condition: Tensor | None) -> Tensor:
        if guidance == 1 or condition is None:
            return backbone(x_t, level, condition)
        if interval != (0, 1):
            inside = (level >= interval[0]) & (level <= interval[1])
            if not bool(inside.any()):
                return backbone(x_t, level, condition)
            if not bool(inside.all()):  # as where each sample has steps of its own
                parts = [velocity(x_t[rows], level[rows], condition[rows]) for rows in (inside, ~inside)]
                return torch.cat(parts)[torch.cat([inside.nonzero(), (~inside).nonzero()]).flatten().argsort()]
        null = backbone.null_condition(len(x_t), x_t.device)
        assert null is not None
        both = backbone(torch.cat([x_t, x_t]), torch.cat([level, level]), torch.cat([condition, null]))
        of_label, of_null = both.chunk(2)
        return of_null + guidance * (of_label - of_null)

    return velocity


def padded(backbone: Backbone, plan: SamplingPlan, labels: Tensor | None, mask: Tensor) -> Velocity:
    """The guided velocity of padded samples, whose condition is their row in labels (B,) and mask (B, *grid).

    Solvers and guidance ask for some of the samples at a time, and each brings its mask along.
    """
    low, high = plan.guidance_interval

    def velocity(x_t: Tensor, level: Tensor, rows: Tensor | None) -> Tensor:
        assert rows is not None
        out, inside = torch.empty_like(x_t), (level >= low) & (level <= high)
        for part in (inside, ~inside):
            if bool(part.any()):
                chosen = rows[part]
                of = guided(backbone.masked(mask[chosen]), plan.guidance, plan.guidance_interval)
                out[part] = of(x_t[part], level[part], None if labels is None else labels[chosen])
        return out

    return velocity


def straightened(velocity: Velocity, schedule: NoiseSchedule) -> Velocity:
    """The velocity dy / dlevel of y = x_t / n, n = alpha + sigma / scale, given that of x_t.

    In x_t even steps of the level are not good steps: the noise of EDM falls from 80 to 5 within the first 8 % of its
    levels. dy / dlevel = (velocity dpath_time / dlevel - n' y) / n.
    """

    def straight(y: Tensor, level: Tensor, condition: Tensor | None) -> Tensor:
        at = level.double()
        n = (schedule.alpha(at) + schedule.sigma(at) / schedule.scale).to(y.dtype).view(-1, *[1] * (y.ndim - 1))
        rate = schedule.alpha_rate(at) + schedule.sigma_rate(at) / schedule.scale
        per_level = velocity(n * y, level, condition) * schedule.path_rate(at).to(y.dtype).view(n.shape)
        return (per_level - rate.to(y.dtype).view(n.shape) * y) / n

    return straight


def integrate(
    velocity: Velocity, x: Tensor, condition: Tensor | None, level_range: tuple[float, float], plan: SamplingPlan
) -> Tensor:
    """Integrates dx = velocity dlevel in even steps from the highest level down to 0.

    The last step is an Euler step from the lowest level that the model knows (Karras et al. 2022, algorithm 1).
    """
    low, high = level_range
    if low > 0 and plan.steps > 1:
        levels = [*torch.linspace(high, low, plan.steps, dtype=torch.float64).tolist(), 0.0]
    else:
        levels = torch.linspace(high, 0, plan.steps + 1, dtype=torch.float64).tolist()
    for i, (now, then) in enumerate(itertools.pairwise(levels)):
        at_now = x.new_full((len(x),), now)
        slope = velocity(x, at_now, condition)
        if plan.solver == "heun" and i + 1 < plan.steps:
            ahead = velocity(x + (then - now) * slope, x.new_full((len(x),), then), condition)
            slope = (slope + ahead) / 2
        x = x + (then - now) * slope
    return x


# Dormand & Prince 1980: where a stage is, what it is made of, and what the fifth and fourth order differ by.
_STAGES = (
    (1 / 5, (1 / 5,)),
    (3 / 10, (3 / 40, 9 / 40)),
    (4 / 5, (44 / 45, -56 / 15, 32 / 9)),
    (8 / 9, (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729)),
    (1.0, (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656)),
    (1.0, (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84)),
)
_ERROR = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)


def integrate_adaptively(
    velocity: Velocity,
    y: Tensor,
    condition: Tensor | None,
    level_range: tuple[float, float],
    plan: SamplingPlan,
    *,
    filled: Tensor | None = None,
) -> Tensor:
    """Integrates dy = velocity dlevel by dopri5 with steps that each sample chooses for itself.

    One step for the whole batch would make a sample depend on its neighbors. So every sample has its own noise level
    and its own step, and leaves the batch when it has arrived; the last step is the Euler step of `integrate`.
    `filled`, shape (B,), is the share of each sample that is no padding, in which there is no error to speak of.

    Raises:
        ValueError: If steps become vanishingly small, as where the network gives no finite numbers.

    Source: Dormand & Prince 1980; step control of Hairer, Norsett & Wanner, Solving ODEs I, II.4.
    """
    low, high = level_range
    level = torch.full((len(y),), high, dtype=torch.float64, device=y.device)
    step, rows, out = torch.full_like(level, (high - low) / plan.steps), torch.arange(len(y)), torch.empty_like(y)
    slope = velocity(y, level.to(y.dtype), condition)
    while len(rows):
        last = step >= level - low
        step = torch.where(last, level - low, step)
        ahead, slope_ahead, error = dopri5_step(velocity, y, level, step, slope, condition)
        allowed = plan.atol + plan.rtol * torch.maximum(y.abs(), ahead.abs())
        squares = (error / allowed).double().square().flatten(1).mean(1)
        excess = (squares if filled is None else squares / filled).sqrt().nan_to_num(nan=math.inf)
        good = excess <= 1
        if bool((~good & (step < 1e-9)).any()):
            raise ValueError(
                f"dopri5 does not get past noise level {float(level[~good][0]):.4g}: the network is not finite or not "
                "smooth there; use heun, or larger tolerances"
            )
        wide = good.view(-1, *[1] * (y.ndim - 1))
        y, slope = torch.where(wide, ahead, y), torch.where(wide, slope_ahead, slope)
        level = torch.where(good, level - step, level)
        step = step * (0.9 * excess**-0.2).clamp(0.2, 10.0)
        arrived = good & last
        if bool(arrived.any()):
            out[rows[arrived.cpu()]] = (y - low * slope)[arrived]
            y, slope, level, step, rows = (part[~arrived.to(part.device)] for part in (y, slope, level, step, rows))
            condition = None if condition is None else condition[~arrived]
            filled = None if filled is None else filled[~arrived]
    return out


def dopri5_step(
    velocity: Velocity, y: Tensor, level: Tensor, step: Tensor, slope: Tensor, condition: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of Dormand and Prince towards data, for each sample from its own level by its own step.

    Args:
        velocity: dy / dlevel.
        y: Shape (B, ...).
        level: Shape (B,), float64.
        step: By how much the level falls, shape (B,), float64.
        slope: The velocity at y.
        condition: Labels, shape (B,), or None.

    Returns:
        y at level - step to fifth order, the velocity there, and the difference to fourth order; each like y.
    """
    move = -step.to(y.dtype).view(-1, *[1] * (y.ndim - 1))
    slopes, ahead = [slope], y
    for place, weights in _STAGES:
        ahead = y + move * sum(w * k for w, k in zip(weights, slopes, strict=True))
        slopes.append(velocity(ahead, (level - place * step).to(y.dtype), condition))
    return ahead, slopes[-1], move * sum(w * k for w, k in zip(_ERROR, slopes, strict=True))


def diffuse(
    velocity: Velocity,
    y: Tensor,
    ids: Tensor,
    condition: Tensor | None,
    schedule: NoiseSchedule,
    level_range: tuple[float, float],
    plan: SamplingPlan,
) -> Tensor:
    """The reverse SDE by Euler and Maruyama, in even steps of the path's time, and a last step without noise.

    dx = velocity ds + w score ds + sqrt(2 w) dW with s falling has the marginals of the ODE for every w >= 0 (SiT,
    arXiv:2401.08740). On the linear path this is SiT's sampler step by step.

    Args:
        velocity: dy / dlevel.
        y: Noise, shape (B, ...).
        ids: Indices of the samples, shape (B,), which with the seed and the step decide the noise.
        condition: Labels, shape (B,), or None.
        schedule: Of the path.
        level_range: Where the network may be asked.
        plan: Steps, diffusion, last step, seed.
    """
    low, high = schedule.path_time(torch.tensor(level_range, dtype=torch.float64, device="cpu")).tolist()
    times = torch.linspace(high, max(plan.last_step_size, low), plan.steps, dtype=torch.float64)
    levels, key = schedule.level_at(times), RandomStream(plan.seed, "sampling")
    for i, (time, level) in enumerate(zip(times, levels, strict=True)):
        last = i + 1 == plan.steps
        then = torch.zeros_like(time) if last else times[i + 1]
        level_then = torch.zeros_like(level) if last else levels[i + 1]
        slope = velocity(y, y.new_full((len(y),), float(level)), condition)
        eps = (y + float(1 - level) * slope) / schedule.scale
        y = y + float(level_then - level) * slope
        if last and plan.last_step == "tweedie":
            break
        w, sigma = diffusion(plan, schedule, level), schedule.sigma(level)
        n = schedule.alpha(level) + sigma / schedule.scale
        y = y - float((time - then) * w / (sigma * n)) * eps
        if not last:
            dw = key.normal(ids, tuple(y.shape[1:]), draw=1 + i).to(y)
            y = y + float(torch.sqrt(2 * w * (time - then)) / n) * dw
    return y


def diffusion(plan: SamplingPlan, schedule: NoiseSchedule, level: Tensor) -> Tensor:
    """The SDE's w at a noise level: 2 w is the variance that noise adds to x_t per time of the path.

    Source: the choices of SiT's samplers (arXiv:2401.08740); SBDM's, (sigma^2)' / 2 - sigma^2 alpha' / alpha, is that
    of Song et al. 2021 (arXiv:2011.13456). The others are for data of scale 1, and scaled for others.
    """
    sigma, time, factor = schedule.sigma(level), schedule.path_time(level), plan.diffusion_scale
    if plan.diffusion == "sbdm":
        alpha, rate = schedule.alpha(level), schedule.path_rate(level)
        return factor * sigma * (schedule.sigma_rate(level) - sigma * schedule.alpha_rate(level) / alpha) / rate
    forms = {
        "sigma": factor * sigma / schedule.scale,
        "constant": factor * torch.ones_like(level),
        "linear": factor * time,
        "decreasing": (1 - factor * torch.cos(math.pi * time)) ** 2 / 4,
        "increasing-decreasing": factor * torch.sin(math.pi * time) ** 2,
    }
    return forms[plan.diffusion] * schedule.scale**2


def _check_labels(backbone: Backbone, indices: Sequence[int], labels: Tensor | None, plan: SamplingPlan) -> None:
    if labels is None:
        if plan.guidance != 1:
            raise ValueError("guidance needs labels; pass labels, or guidance 1")
        return
    if len(labels) != len(indices):
        raise ValueError(f"{len(indices)} samples but {len(labels)} labels; pass one label per sample")
    if backbone.num_classes == 0:
        raise ValueError(f"{backbone.name} knows no classes; sample without labels")
    if bool((labels < 0).any()) or bool((labels > backbone.num_classes).any()):
        raise ValueError(
            f"labels lie between 0 and {backbone.num_classes - 1} (or {backbone.num_classes} for none), "
            f"got {labels.tolist()[:8]}"
        )


def _check_mask(backbone: Backbone, indices: Sequence[int], mask: Tensor | None) -> None:
    if mask is None:
        return
    wanted = (len(indices), *backbone.shape[1:])
    if tuple(mask.shape) != wanted or mask.dtype != torch.bool:
        raise ValueError(f"the mask is {mask.dtype} of shape {tuple(mask.shape)}; pass bool of shape {wanted}")
    if not bool(mask.flatten(1).any(1).all()):
        raise ValueError("a sample of nothing but padding cannot be drawn; pass lengths of at least 1")
    if not backbone.takes_mask:
        raise ValueError(f"{backbone.name} draws samples of one length only, {backbone.shape}; leave out the mask")


def _one_of(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"
