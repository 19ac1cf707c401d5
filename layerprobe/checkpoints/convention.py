"""Checks with a few forward passes on real samples whether the declared convention fits the weights.

SiT, DiT and LayerSync files have the same names and shapes, but differ in the meaning of time, its direction and the
prediction target. A network under the wrong convention still returns plausible numbers, and all later results are
silently wrong. Therefore real samples are corrupted at five signal-to-noise ratios, the output is converted to an
estimate of the clean sample under every known convention, and its squared error is compared with that of the best
shift-invariant linear denoiser (the Wiener filter), which knows only the power spectrum of the data. A trained network
beats this denoiser under its own convention only.

The squared error of the prediction itself is not suitable: errors of different prediction targets are not comparable,
and an eps network read as a velocity network can have the smaller one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from layerprobe.backbones import Backbone
from layerprobe.capture import evaluating
from layerprobe.data import Batch, Samples
from layerprobe.noise import DDPM_BETAS, Prediction, RandomStream, convert_prediction, schedule_from_name

LOG_SNRS = (4.0, 2.0, 0.0, -2.0, -4.0)
# Predictions that are commonly trained with each schedule, by the schedule's name on the command line.
KNOWN: dict[str, tuple[Prediction, ...]] = {
    "sit": ("velocity", "x0", "eps"),
    "flow": ("velocity", "x0", "eps"),
    "flow-1000": ("velocity", "x0", "eps"),
    **{f"ddpm-{betas}": ("eps", "x0", "v") for betas in DDPM_BETAS},
    "edm": ("x0",),
}
# Rarely used paths; tried if the declared convention is not plausible.
CURVED: dict[str, tuple[Prediction, ...]] = dict.fromkeys(("sit-gvp", "sit-vp"), ("velocity", "x0", "eps"))
# Factors for latents that were not scaled or scaled twice (Stable Diffusion 1/2 and XL), and for pixels in [0, 1].
SCALES = (0.18215, 0.13025, 0.5, 2.0, 1 / 0.18215, 1 / 0.13025)
# A fit is judged by the mean over levels of log(error / error of the linear denoiser).
PLAUSIBLE = 0.0  # above this the network is no better than a linear denoiser
MARGIN = 0.03  # nats; one convention is better than another by more than this and by more than four standard errors


@dataclass(frozen=True, eq=False)
class Fit:
    """The fit of one convention to a network.

    Ratios and scores are infinite if the network cannot be called under the convention.

    Attributes:
        schedule: Name of the schedule on the command line.
        prediction: Prediction target.
        scale: Factor on the data; 1 for unchanged data.
        ratios: Squared error over that of the linear denoiser at each of `LOG_SNRS`; below 1 is better than linear.
        scores: Mean over levels of the log ratio of each sample, shape (n,).
    """

    schedule: str
    prediction: Prediction
    scale: float
    ratios: tuple[float, ...]
    scores: Tensor

    @property
    def score(self) -> float:
        """The mean score; 0 is as good as the linear denoiser, lower is better."""
        return float(self.scores.mean())


LabelCaution = Literal["true labels no better than wrong ones", "null label worse than a wrong one"]


@dataclass(frozen=True, eq=False)
class ConventionCheck:
    """The result of a convention check.

    Attributes:
        declared: Fit of the backbone's own convention.
        fits: Fits of all conventions, the best first.
        condition: Mean log ratio under the declared convention by condition: "null", and for data with labels also
            "true labels" and "wrong labels".
        verdict: "fits"; "misfit" if another convention is plausible and clearly better; "unclear" if no convention is
            plausible, as for an untrained network or for data of another kind.
    """

    declared: Fit
    fits: tuple[Fit, ...]
    condition: dict[str, float]
    verdict: str

    @property
    def cautions(self) -> tuple[LabelCaution, ...]:
        """What the labels do against expectation."""
        cautions: list[LabelCaution] = []
        if "true labels" in self.condition and self.condition["true labels"] > self.condition["wrong labels"] - 0.002:
            cautions.append("true labels no better than wrong ones")
        if self.condition.get("null", 0.0) > self.condition.get("wrong labels", math.inf) + 0.05:
            cautions.append("null label worse than a wrong one")
        return tuple(cautions)

    def to_dict(self) -> dict[str, Any]:
        """Returns the result as a JSON-compatible dict."""
        return {
            "verdict": self.verdict,
            "cautions": list(self.cautions),
            "log_snr": list(LOG_SNRS),
            "condition": self.condition,
            "fits": [
                {
                    "schedule": fit.schedule,
                    "prediction": fit.prediction,
                    "scale": fit.scale,
                    "declared": fit is self.declared,
                    "score": fit.score,
                    "error_over_linear": list(fit.ratios),
                }
                for fit in self.fits
            ],
        }

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> ConventionCheck:
        """Reads what `to_dict` returned; the scores of single samples are not kept."""
        fits = tuple(
            Fit(
                fit["schedule"],
                fit["prediction"],
                fit["scale"],
                tuple(fit["error_over_linear"]),
                torch.tensor([fit["score"]], dtype=torch.float64),
            )
            for fit in record["fits"]
        )
        declared = next(fit for fit, of in zip(fits, record["fits"], strict=True) if of["declared"])
        return cls(declared, fits, record["condition"], record["verdict"])


def check_convention(backbone: Backbone, samples: Samples, *, num_samples: int = 64, seed: int = 0) -> ConventionCheck:
    """Compares the declared schedule and prediction with all other known ones, under the null condition.

    The check needs five forward passes for each of about seven schedules. If no convention fits, the declared one is
    also tried on the data times the factors of `SCALES`.

    Args:
        backbone: Model with its weights.
        samples: Real data of the model's shape; the first `num_samples` are used.
        num_samples: Number of samples, at least 8, so that differences have a standard error.
        seed: Seed of the noise.

    Raises:
        ValueError: If the data has fewer than 8 samples.
    """
    n = min(num_samples, len(samples))
    if n < 8:
        raise ValueError(f"the convention check needs 8 samples or more, got {n}; pass more data")
    batch = samples.batch(range(n))
    eps = RandomStream(seed).normal(batch.ids, backbone.shape)
    backbone = backbone.masked(batch.mask)
    with torch.inference_mode(), evaluating(backbone.module):
        declared, *others = _fits(backbone, KNOWN, batch.x, eps)
        if declared.score > PLAUSIBLE or declared.schedule in CURVED:
            others += _fits(backbone, CURVED, batch.x, eps)[1:]
        if min(fit.score for fit in (declared, *others)) > PLAUSIBLE:
            for scale in SCALES:
                others += _schedule_fits(backbone, declared.schedule, [declared.prediction], batch.x, eps, scale)
        condition = _by_condition(backbone, batch, eps) if declared.score < math.inf else {}
    fits = tuple(sorted((declared, *others), key=lambda fit: fit.score))
    return ConventionCheck(declared, fits, condition, _verdict(declared, fits[0]))


def _verdict(declared: Fit, best: Fit) -> str:
    if best.score > PLAUSIBLE:
        return "unclear"
    advantage = declared.scores - best.scores
    standard_error = float(advantage.std()) / math.sqrt(len(advantage))
    clear = declared.score == math.inf or float(advantage.mean()) > max(MARGIN, 4 * standard_error)
    return "misfit" if clear else "fits"


def _fits(
    backbone: Backbone, predictions_by_schedule: Mapping[str, tuple[Prediction, ...]], x: Tensor, eps: Tensor
) -> list[Fit]:
    """Returns a fit for each convention under which the network can be called, the declared one first."""
    others = {name: (schedule_from_name(name), predictions) for name, predictions in predictions_by_schedule.items()}
    config = backbone.schedule.to_config()
    declared = next((name for name, (schedule, _) in others.items() if schedule.to_config() == config), None)
    predictions = (backbone.prediction, *(others.pop(declared)[1] if declared is not None else ()))
    first = (declared or backbone.schedule.name, backbone.schedule, tuple(dict.fromkeys(predictions)))
    fits = []
    for name, schedule, predictions in (first, *((name, *rest) for name, rest in others.items())):
        try:
            fits += _schedule_fits(replace(backbone, schedule=schedule), name, predictions, x, eps)
        except (RuntimeError, IndexError, TypeError):
            # For example, a network with a table of 1000 times fails at time 0.5: that is not its convention.
            if not fits:
                ratios = (math.inf,) * len(LOG_SNRS)
                fits = [Fit(name, backbone.prediction, 1.0, ratios, torch.full((len(x),), math.inf))]
    return fits


def _schedule_fits(
    backbone: Backbone, name: str, predictions: Sequence[Prediction], x: Tensor, eps: Tensor, scale: float = 1.0
) -> list[Fit]:
    errors = _errors(backbone, predictions, x * scale, eps, None)
    return [Fit(name, p, scale, tuple(e.mean(1).tolist()), e.log().mean(0)) for p, e in errors.items()]


def _errors(
    backbone: Backbone, predictions: Sequence[Prediction], x: Tensor, eps: Tensor, labels: Tensor | None
) -> dict[Prediction, Tensor]:
    """Returns the error of the clean sample over the linear denoiser's, shape (levels, n), for each prediction."""
    schedule, device = backbone.schedule, backbone.device
    errors: dict[Prediction, list[Tensor]] = {prediction: [] for prediction in predictions}
    power = _power(x)
    for level in schedule.level_of_log_snr(torch.tensor(LOG_SNRS, dtype=torch.float64)):
        levels = level.clamp(*schedule.level_range).expand(len(x))
        x_t = schedule.corrupt(x, eps, levels)
        condition = None if labels is None else labels.to(device)
        output = replace(backbone, prediction="eps").predict(x_t.to(device), levels.to(device).float(), condition)
        linear = _wiener_error(power, schedule.sigma(levels[0]) / schedule.alpha(levels[0]))
        for prediction in predictions:
            # The same output, read as another prediction; `predict` handles the sign of a velocity.
            reread = replace(backbone, prediction=prediction, forward=lambda *_, output=output: output)
            estimate = convert_prediction(
                reread.predict(x_t, levels.float()).cpu().double(),
                x_t.double(),
                levels,
                schedule,
                source=prediction,
                to="x0",
            )
            residual = estimate - x
            if backbone.mask is not None:
                residual = residual.masked_fill(~backbone.mask.unsqueeze(1), 0.0)
            error = residual.square().flatten(1).mean(1) / linear
            errors[prediction].append(error.nan_to_num(nan=1e9, posinf=1e9).clamp(1e-9, 1e9))
    return {prediction: torch.stack(rows) for prediction, rows in errors.items()}


def _power(x: Tensor) -> Tensor:
    """Power spectrum of the data around its mean, shape (C, *grid), float64."""
    centered = x.double() - x.double().mean(0)
    spectrum = torch.fft.fftn(centered, dim=tuple(range(2, x.ndim)), norm="ortho")
    power: Tensor = spectrum.abs().square().mean(0) * len(x) / (len(x) - 1)
    return power


def _wiener_error(power: Tensor, noise_to_signal: Tensor) -> Tensor:
    """Mean squared error per value of the best shift-invariant linear estimate of x from x + s eps."""
    s2 = noise_to_signal.double() ** 2
    return (power * s2 / (power + s2)).mean()


def _by_condition(backbone: Backbone, batch: Batch, eps: Tensor) -> dict[str, float]:
    conditions: dict[str, Tensor | None] = {"null": None}
    labels = batch.labels
    if labels is not None and backbone.num_classes and 1 < int(labels.max()) + 1 <= backbone.num_classes:
        conditions |= {"true labels": labels, "wrong labels": (labels + 1) % (int(labels.max()) + 1)}
    return {
        name: float(_errors(backbone, [backbone.prediction], batch.x, eps, labels)[backbone.prediction].log().mean())
        for name, labels in conditions.items()
    }
