"""Sampling from a backbone by the probability-flow ODE or by an SDE, with classifier-free guidance.

All solvers integrate y = x_t / n, where n = alpha + sigma / scale. In every family y = (1 - level) x_0 + level scale
eps, which is the linear path. Equal steps of the noise level are good steps there, so one integrator serves all
families.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from layerprobe.backbones import Backbone
from layerprobe.capture import evaluating
from layerprobe.memory import BatchSize
from layerprobe.noise import END, NoiseSchedule, RandomStream
from layerprobe.sampling.plan import SamplingPlan

Velocity = Callable[[Tensor, Tensor, Tensor | None], Tensor]


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
    """Draws samples; sample i is the same in any batch, order and process up to rounding.

    Padding stays 0 throughout, and the real part of a sample does not depend on the amount of padding.

    Args:
        backbone: The model; averaged weights give better samples.
        indices: Indices of the samples, for instance range(100).
        labels: Class labels, shape (len(indices),); None for the null label.
        plan: Solver, steps, guidance and seed; None uses the defaults.
        batch_size: Number of samples per batch.
        mask: Positions that are not padding, shape (len(indices), *grid), bool; None means no padding.

    Returns:
        Samples, shape (len(indices), C, *grid), on the CPU.

    Raises:
        ValueError: If labels or mask do not match the indices or the model, or if guidance is used without labels.
    """
    plan = plan or SamplingPlan()
    _check_labels(backbone, indices, labels, plan)
    _check_mask(backbone, indices, mask)

    def draw(rows: range) -> Tensor:
        part = slice(rows.start, rows.stop)
        ids = torch.tensor(list(indices[part]))
        return _drawn(
            backbone, ids, None if labels is None else labels[part], None if mask is None else mask[part], plan
        )

    out = [torch.empty(0, *backbone.shape)]
    with evaluating(backbone.module):
        out += [x for _, x in BatchSize(batch_size).batches(len(indices), draw)]
    return torch.cat(out)


def _drawn(backbone: Backbone, ids: Tensor, labels: Tensor | None, mask: Tensor | None, plan: SamplingPlan) -> Tensor:
    """The samples of one batch, on the CPU."""
    schedule, level_range = backbone.schedule, sampling_range(backbone, plan)
    # At the highest level x_t is sigma eps, and y = x_t / n.
    start_std = level_range[1] * schedule.scale
    y = (RandomStream(plan.seed, "sampling").normal(ids, backbone.shape) * start_std).to(backbone.device)
    condition = None if labels is None else labels.to(backbone.device)
    real = None if mask is None else mask.to(backbone.device)
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
    # The SDE adds noise to the padding, too.
    return (y if real is None else y.masked_fill(~real.unsqueeze(1), 0.0)).cpu()


def sampling_range(backbone: Backbone, plan: SamplingPlan) -> tuple[float, float]:
    """Returns the lowest and highest noise level of the network's calls: the training range without unusable ends.

    At pure noise, eps and the score do not determine the velocity; at clean data, x_0 and the score do not. The SBDM
    diffusion is infinite at pure noise. SiT cuts off the same ends (arXiv:2401.08740).
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
    """Returns the velocity with classifier-free guidance inside an interval: v_null + guidance (v_label - v_null).

    Args:
        backbone: The model.
        guidance: Guidance scale; 1 means no guidance.
        interval: Lowest and highest noise level with guidance, both included.

    Source: Ho & Salimans 2022 (arXiv:2207.12598); Kynkaanniemi et al. 2024 (arXiv:2404.07724) for the interval.
    """

    def velocity(x_t: Tensor, level: Tensor, condition: Tensor | None) -> Tensor:
        if guidance == 1 or condition is None:
            return backbone(x_t, level, condition)
        if interval != (0, 1):
            inside = (level >= interval[0]) & (level <= interval[1])
            if not bool(inside.any()):
                return backbone(x_t, level, condition)
            if not bool(inside.all()):  # With dopri5, the samples of a batch are at different noise levels.
                parts = [velocity(x_t[rows], level[rows], condition[rows]) for rows in (inside, ~inside)]
                return torch.cat(parts)[torch.cat([inside.nonzero(), (~inside).nonzero()]).flatten().argsort()]
        null = backbone.null_condition(len(x_t), x_t.device)
        assert null is not None
        both = backbone(torch.cat([x_t, x_t]), torch.cat([level, level]), torch.cat([condition, null]))
        of_label, of_null = both.chunk(2)
        return of_null + guidance * (of_label - of_null)

    return velocity


def padded(backbone: Backbone, plan: SamplingPlan, labels: Tensor | None, mask: Tensor) -> Velocity:
    """Returns the velocity of padded samples with classifier-free guidance.

    Solvers and guidance may call it with some of the samples only. In place of labels, it therefore takes the rows of
    these samples in `labels` and `mask`, shape (B,), int64.

    Args:
        backbone: The model.
        plan: Guidance scale and interval.
        labels: Class labels of all samples, shape (n,), or None for the null label.
        mask: Positions of all samples that are not padding, shape (n, *grid), bool.
    """
    low, high = plan.guidance_interval

    def velocity(x_t: Tensor, level: Tensor, rows: Tensor | None) -> Tensor:
        assert rows is not None
        out, inside = torch.empty_like(x_t), (level >= low) & (level <= high)
        for part in (inside, ~inside):
            if bool(part.any()):
                part_rows = rows[part]
                part_velocity = guided(backbone.masked(mask[part_rows]), plan.guidance, plan.guidance_interval)
                out[part] = part_velocity(x_t[part], level[part], None if labels is None else labels[part_rows])
        return out

    return velocity


def straightened(velocity: Velocity, schedule: NoiseSchedule) -> Velocity:
    """Returns the velocity dy / dlevel of y = x_t / n, with n = alpha + sigma / scale, from the velocity of x_t.

    For x_t itself, equal steps of the noise level are not good steps: sigma of EDM falls from 80 to 5 within the first
    8 % of the levels. dy / dlevel = (velocity dpath_time / dlevel - n' y) / n.
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
    """Integrates dx = velocity dlevel in equal steps from the highest noise level down to 0.

    The last step is an Euler step from the lowest level of training (Karras et al. 2022, algorithm 1).
    """
    low, high = level_range
    if low > 0 and plan.steps > 1:
        levels = [*torch.linspace(high, low, plan.steps, dtype=torch.float64).tolist(), 0.0]
    else:
        levels = torch.linspace(high, 0, plan.steps + 1, dtype=torch.float64).tolist()
    for i, (level, next_level) in enumerate(itertools.pairwise(levels)):
        slope = velocity(x, x.new_full((len(x),), level), condition)
        if plan.solver == "heun" and i + 1 < plan.steps:
            ahead = x + (next_level - level) * slope
            slope = (slope + velocity(ahead, x.new_full((len(x),), next_level), condition)) / 2
        x = x + (next_level - level) * slope
    return x


# Coefficients of Dormand & Prince 1980: (time, weights) of each stage; fifth-order minus fourth-order weights.
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
    """Integrates dy = velocity dlevel by dopri5 with an adaptive step size for each sample.

    A common step size would make a sample depend on the others in its batch. So every sample has its own noise level
    and step size, and leaves the batch when it is finished. The last step is the Euler step of `integrate`.

    Args:
        velocity: Velocity dy / dlevel.
        y: Start at the highest noise level, shape (B, ...).
        condition: Labels, shape (B,), or None.
        level_range: Lowest and highest noise level at which to call the network.
        plan: Tolerances, and the number of steps that sets the first step size.
        filled: Share of each sample that is not padding, shape (B,), to which its error is related; None without
            padding.

    Raises:
        ValueError: If step sizes become vanishingly small, for instance because the network is not finite.

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
        accepted = excess <= 1
        if bool((~accepted & (step < 1e-9)).any()):
            raise ValueError(
                f"dopri5 does not get past noise level {float(level[~accepted][0]):.4g}: the network is not finite or "
                "not smooth there; use heun, or larger tolerances"
            )
        accepted_y = accepted.view(-1, *[1] * (y.ndim - 1))
        y, slope = torch.where(accepted_y, ahead, y), torch.where(accepted_y, slope_ahead, slope)
        level = torch.where(accepted, level - step, level)
        step = step * (0.9 * excess**-0.2).clamp(0.2, 10.0)
        finished = accepted & last
        if bool(finished.any()):
            out[rows[finished.cpu()]] = (y - low * slope)[finished]
            y, slope, level, step, rows = (part[~finished.to(part.device)] for part in (y, slope, level, step, rows))
            condition = None if condition is None else condition[~finished]
            filled = None if filled is None else filled[~finished]
    return out


def dopri5_step(
    velocity: Velocity, y: Tensor, level: Tensor, step: Tensor, slope: Tensor, condition: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes one step of Dormand and Prince towards data, for each sample from its own level by its own step size.

    Args:
        velocity: Velocity dy / dlevel.
        y: Samples, shape (B, ...).
        level: Noise levels, shape (B,), float64.
        step: Decrease of the noise level, shape (B,), float64.
        slope: Velocity at y, shape (B, ...).
        condition: Labels, shape (B,), or None.

    Returns:
        y at level - step to fifth order, the velocity there, and the difference from the fourth-order result, each of
        shape (B, ...).
    """
    move = -step.to(y.dtype).view(-1, *[1] * (y.ndim - 1))
    slopes, ahead = [slope], y
    for time, weights in _STAGES:
        ahead = y + move * sum(w * k for w, k in zip(weights, slopes, strict=True))
        slopes.append(velocity(ahead, (level - time * step).to(y.dtype), condition))
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
    """Integrates the reverse SDE by Euler-Maruyama, in equal steps of path time, with a last step without noise.

    For every w >= 0, dx = velocity ds + w score ds + sqrt(2 w) dW with decreasing s has the marginals of the ODE (SiT,
    arXiv:2401.08740). On the linear path this equals the sampler of SiT step by step.

    Args:
        velocity: Velocity dy / dlevel.
        y: Noise, shape (B, ...).
        ids: Indices of the samples, shape (B,); with the seed and the step they determine the noise.
        condition: Labels, shape (B,), or None.
        schedule: Noise schedule of the path.
        level_range: Lowest and highest noise level at which to call the network.
        plan: Steps, diffusion, last step and seed.
    """
    low, high = schedule.path_time(torch.tensor(level_range, dtype=torch.float64, device="cpu")).tolist()
    times = torch.linspace(high, max(plan.last_step_size, low), plan.steps, dtype=torch.float64)
    levels, stream = schedule.level_at(times), RandomStream(plan.seed, "sampling")
    for i, (time, level) in enumerate(zip(times, levels, strict=True)):
        last = i + 1 == plan.steps
        next_time = torch.zeros_like(time) if last else times[i + 1]
        next_level = torch.zeros_like(level) if last else levels[i + 1]
        slope = velocity(y, y.new_full((len(y),), float(level)), condition)
        eps = (y + float(1 - level) * slope) / schedule.scale
        y = y + float(next_level - level) * slope
        if last and plan.last_step == "tweedie":
            break
        w, sigma = diffusion(plan, schedule, level), schedule.sigma(level)
        n = schedule.alpha(level) + sigma / schedule.scale
        y = y - float((time - next_time) * w / (sigma * n)) * eps
        if not last:
            dw = stream.normal(ids, tuple(y.shape[1:]), draw=1 + i).to(y)
            y = y + float(torch.sqrt(2 * w * (time - next_time)) / n) * dw
    return y


def diffusion(plan: SamplingPlan, schedule: NoiseSchedule, level: Tensor) -> Tensor:
    """Computes the diffusion coefficient w of the SDE: 2 w is the variance added to x_t per unit of path time.

    The forms other than SBDM are published for data of scale 1; for other data they are multiplied by scale^2.

    Source: the samplers of SiT (arXiv:2401.08740). SBDM, (sigma^2)' / 2 - sigma^2 alpha' / alpha, is from Song et al.
    2021 (arXiv:2011.13456).
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
        raise ValueError(f"{backbone.name} is not conditioned on classes; sample without labels")
    if bool((labels < 0).any()) or bool((labels > backbone.num_classes).any()):
        raise ValueError(
            f"labels must lie between 0 and {backbone.num_classes - 1} (or {backbone.num_classes} for the null label), "
            f"got {labels.tolist()[:8]}"
        )


def _check_mask(backbone: Backbone, indices: Sequence[int], mask: Tensor | None) -> None:
    if mask is None:
        return
    shape = (len(indices), *backbone.shape[1:])
    if tuple(mask.shape) != shape or mask.dtype != torch.bool:
        raise ValueError(f"the mask is {mask.dtype} of shape {tuple(mask.shape)}; pass bool of shape {shape}")
    if not bool(mask.flatten(1).any(1).all()):
        raise ValueError("a sample consists of padding only; pass lengths of at least 1")
    if not backbone.takes_mask:
        raise ValueError(
            f"{backbone.name} takes no mask, all its samples have shape {backbone.shape}; leave out the mask"
        )
