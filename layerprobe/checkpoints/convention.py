"""Checks with a few forward passes on real samples whether the declared convention fits the weights.

SiT, DiT and LayerSync files have the same names and shapes, but differ in the meaning of time, its direction and the
prediction target. A network under the wrong convention still returns plausible numbers, and all later results are
silently wrong. Therefore real samples are corrupted at five signal-to-noise ratios, the output is converted to an
estimate of the clean sample under every known convention, and its squared error is compared with that of the best
shift-invariant linear denoiser (the Wiener filter), which knows only the power spectrum of the data. A trained network
beats this denoiser under its own convention only. Other value ranges of the data and other numbers of attention heads
are tried in the same way, if the shapes of the weights do not exclude them.

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

from layerprobe.backbones import Backbone, checked, in_batches, with_heads
from layerprobe.capture import evaluating
from layerprobe.data import Batch, Samples, Subset, keyed_order
from layerprobe.noise import DDPM_BETAS, Prediction, RandomStream, convert_prediction, schedule_from_name
from layerprobe.ranks import ALONE, Ranks

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
# What -1 and 1 of the data may be to a network, as `Backbone.with_value_range` takes it: pixels that are not scaled to
# [-1, 1], and latents that were not scaled or scaled twice (Stable Diffusion 1/2, XL and 3, FLUX).
VALUE_RANGES: tuple[tuple[float, ...], ...] = (
    (-1, 1),
    (0, 1),
    (0, 255),
    (-0.5, 0.5),
    (-2, 2),
    (-3, 1),  # the network takes [-1, 1], the data is in [0, 1]
    *((-factor, factor) for factor in (0.18215, 0.13025, 5.49, 7.6775)),
    (-1.6237, 1.4373),
    (-0.40295, 0.31925),
)
# Pixels in [0, 1], less the mean and over the standard deviation: of MNIST; of CIFAR-10 and of ImageNet.
GRAY_RANGES = ((-0.4242, 2.8215),)
COLOR_RANGES = (
    (-1.9895, 2.0591, -1.9803, 2.1265, -1.7068, 2.1158),
    (-2.1179, 2.2489, -2.0357, 2.4286, -1.8044, 2.64),
)
PIXELS = ("image", "video")  # modalities whose networks are trained on other value ranges
FIRST = 8  # samples on which everything is tried
SHARED = 16  # samples in a forward pass at the most, so that several processes have a part each
# A fit is judged by the mean over levels of log(error / error of the linear denoiser).
PLAUSIBLE = 0.0  # above this the network is no better than a linear denoiser
CLEAR_LABELS = 0.1  # nats between true and wrong labels, from which on the null label can be judged
NULL_SHARE = 0.25  # of these nats, which a null label gains on wrong labels at the least
# A barely trained network can gain a little from inputs of another size.
RANGES_MARGIN = 0.2
HEADS_MARGIN = 0.01  # nats between two numbers of heads, whose outputs differ less than those of two conventions
MARGIN = 0.03  # nats; one convention is better than another by more than this and by more than four standard errors
# What rules a convention out on the first samples alone.
EARLY_MARGIN, EARLY_ERRORS = 0.2, 6.0


@dataclass(frozen=True, eq=False)
class Fit:
    """The fit of one convention to a network.

    Ratios and scores are infinite if the network cannot be called under the convention.

    Attributes:
        schedule: Name of the schedule on the command line.
        prediction: Prediction target.
        num_heads: Number of attention heads; None if the network does not tell.
        value_range: What the values -1 and 1 of the data are to the network.
        ratios: Squared error over that of the linear denoiser at each of `LOG_SNRS`; below 1 is better than linear.
        scores: Mean over levels of the log ratio of each sample, shape (n,); n is `FIRST` for a convention that these
            samples rule out, and 1 for the mean from a record.
        recorded_samples: Number of samples behind a mean from a record.
    """

    schedule: str
    prediction: Prediction
    num_heads: int | None
    value_range: tuple[float, ...]
    ratios: tuple[float, ...]
    scores: Tensor
    recorded_samples: int | None = None

    @property
    def score(self) -> float:
        """The mean score; 0 is as good as the linear denoiser, lower is better."""
        return float(self.scores.mean())


FitCaution = Literal[
    "true labels no better than wrong ones",
    "null label worse than a wrong one",
    "null label like a wrong one",
    "more classes in the data",
    "another number of heads fits as well",
]


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
        classes: Number of classes of the network and of the data; 0 without classes.
    """

    declared: Fit
    fits: tuple[Fit, ...]
    condition: dict[str, float]
    verdict: str
    classes: tuple[int, int] = (0, 0)

    @property
    def rival_heads(self) -> int | None:
        """Another number of heads under which the declared convention fits about as well or better; None without."""
        declared = self.declared
        for fit in self.fits:
            same = (fit.schedule, fit.prediction, fit.value_range) == (
                declared.schedule,
                declared.prediction,
                declared.value_range,
            )
            if same and fit.num_heads != declared.num_heads and fit.score < declared.score + HEADS_MARGIN:
                return fit.num_heads
        return None

    @property
    def cautions(self) -> tuple[FitCaution, ...]:
        """What speaks against the declared heads and labels without deciding against them."""
        cautions: list[FitCaution] = []
        if self.verdict == "fits" and self.rival_heads is not None:
            cautions.append("another number of heads fits as well")
        of_network, of_data = self.classes
        if 0 < of_network < of_data:
            cautions.append("more classes in the data")
        if "true labels" not in self.condition:
            return tuple(cautions)
        true, wrong, null = (self.condition[name] for name in ("true labels", "wrong labels", "null"))
        if true > wrong - 0.002:
            cautions.append("true labels no better than wrong ones")
        if null > wrong + 0.05:
            cautions.append("null label worse than a wrong one")
        elif wrong - true > CLEAR_LABELS and wrong - null < NULL_SHARE * (wrong - true):
            cautions.append("null label like a wrong one")
        return tuple(cautions)

    def to_dict(self) -> dict[str, Any]:
        """Returns the result as a JSON-compatible dict."""
        return {
            "verdict": self.verdict,
            "cautions": list(self.cautions),
            "log_snr": list(LOG_SNRS),
            "condition": self.condition,
            "classes": list(self.classes),
            "fits": [
                {
                    "schedule": fit.schedule,
                    "prediction": fit.prediction,
                    "num_heads": fit.num_heads,
                    "value_range": list(fit.value_range),
                    "declared": fit is self.declared,
                    "samples": fit.recorded_samples or len(fit.scores),
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
                fit.get("num_heads"),
                tuple(fit.get("value_range", (-1.0, 1.0))),
                tuple(fit["error_over_linear"]),
                torch.tensor([fit["score"]], dtype=torch.float64),
                fit.get("samples"),
            )
            for fit in record["fits"]
        )
        declared = next(fit for fit, of in zip(fits, record["fits"], strict=True) if of["declared"])
        return cls(declared, fits, record["condition"], record["verdict"], tuple(record.get("classes", (0, 0))))


def check_convention(
    backbone: Backbone,
    samples: Samples,
    *,
    num_samples: int = 64,
    seed: int = 0,
    batch_size: int = 16,
    ranks: Ranks = ALONE,
) -> ConventionCheck:
    """Compares the declared schedule and prediction with all other known ones, under the null condition.

    Every convention is tried on `FIRST` samples, drawn from those that are used, at five noise levels. The declared
    one, and those that these samples do not rule out, are tried on all. The best, or the declared one if none is
    clearly better, is also tried with other value ranges of the data, and then with the other numbers of heads that the
    weights allow.

    Args:
        backbone: Model with its weights.
        samples: Real data of the model's shape; the first `num_samples` are used.
        num_samples: Number of samples, at least 8, so that differences have a standard error.
        seed: Seed of the noise.
        batch_size: Number of samples in a forward pass, at most; more than `SHARED` are not needed.
        ranks: Processes that share the forward passes; all of them must call this function.

    Raises:
        ValueError: If the data has fewer than 8 samples, or the network can be called under no convention.
    """
    n = min(num_samples, len(samples))
    if n < FIRST:
        raise ValueError(f"the convention check needs {FIRST} samples or more, got {n}; pass more data")
    used = Subset(samples, range(n), name="convention")
    batch = used.batch(keyed_order(used, seed=seed).tolist())  # Those on which all is tried stand for all.
    eps = RandomStream(seed).normal(batch.ids, backbone.shape)
    forward = in_batches(checked(backbone.forward, backbone.schedule), batch_size)
    backbone = replace(backbone, forward=forward)
    passes = _Passes(batch, eps, _power(batch.x), batch_size, ranks)
    with torch.inference_mode(), evaluating(backbone.module):
        tried = _on_all(_conventions(backbone, KNOWN, passes), passes)
        declared = tried[0][1]
        if declared.score > PLAUSIBLE or declared.schedule in CURVED:
            tried = _on_all([*tried, *_conventions(backbone, CURVED, passes)[1:]], passes)
        if all(fit.score == math.inf for _, fit in tried):
            passes.fits([_Reading(backbone, declared.schedule, (declared.prediction,))], FIRST)  # It raises.
        leading = _leading(tried)
        for others, margin in ((_other_ranges, RANGES_MARGIN), (_other_heads, HEADS_MARGIN)):
            if others is _other_ranges and samples.modality not in PIXELS:
                continue  # Audio and motion have statistics of their own.
            found = _best_of(leading, others(leading[0]), passes)
            tried += found
            leading = next((each for each in found if _replaces(each, leading, passes, margin)), leading)
        condition = _by_condition(backbone, declared, passes) if declared.score < math.inf else {}
    fits = sorted((fit for _, fit in tried), key=_order)
    if fits[0].score > PLAUSIBLE:
        verdict = "unclear"
        fits.sort(key=lambda fit: fit.score)  # All are ruled out, most of them on few samples.
    else:
        verdict = "fits" if leading[1] is declared else "misfit"
        # Scores of different value ranges are of different noise, so the first is not always the one that fits.
        fits.sort(key=lambda fit: fit is not leading[1] if verdict == "misfit" else False)
    return ConventionCheck(declared, tuple(fits), condition, verdict, (backbone.num_classes, samples.num_classes))


_Tried = tuple[Backbone, Fit]  # a network under one convention, and its fit


@dataclass(frozen=True, eq=False)
class _Reading:
    """A network under a schedule, whose output is read as one or several predictions.

    The offset is added to the log signal-to-noise ratios. Labels are None for the null condition.
    """

    backbone: Backbone
    schedule: str
    predictions: tuple[Prediction, ...]
    offset: float = 0.0
    labels: Tensor | None = None

    @classmethod
    def like(cls, fit: Fit, backbone: Backbone, offset: float = 0.0) -> _Reading:
        """Reads a network under the convention of a fit."""
        return cls(backbone, fit.schedule, (fit.prediction,), offset)


@dataclass(frozen=True, eq=False)
class _Passes:
    """The samples of a check with their noise, and the forward passes on them, which the processes share."""

    batch: Batch
    eps: Tensor
    power: Tensor
    batch_size: int
    ranks: Ranks

    def fits(self, readings: Sequence[_Reading], n: int) -> list[Fit]:
        """Returns the fits of all predictions of all readings on the first n samples, in order.

        Raises:
            ValueError: If a network cannot be called.
        """
        return [fit for found in self.attempts(readings, n) for fit in _raised(found)]

    def attempts(self, readings: Sequence[_Reading], n: int) -> list[list[Fit] | ValueError]:
        """Returns the fits of each reading on the first n samples, or the error of a network that cannot be called."""
        return [
            errors
            if isinstance(errors, ValueError)
            else [
                Fit(
                    reading.schedule,
                    prediction,
                    reading.backbone.num_heads,
                    reading.backbone.value_range,
                    tuple(error.mean(1).tolist()),
                    error.log().mean(0),
                )
                for prediction, error in zip(reading.predictions, errors, strict=True)
            ]
            for reading, errors in zip(readings, self._errors(readings, n), strict=True)
        ]

    def _errors(self, readings: Sequence[_Reading], n: int) -> list[Tensor | ValueError]:
        """Returns errors of the clean sample over the linear denoiser's for each reading: (predictions, levels, n)."""
        size = min(self.batch_size, SHARED)
        starts = range(0, n, size)
        parts = [
            (reading, level, range(start, min(start + size, n)))
            for reading in readings
            for level in range(len(LOG_SNRS))
            for start in starts
        ]
        done = iter(self.ranks.whole([self._attempt(*part) for part in self.ranks.mine(parts)]))
        found: list[Tensor | ValueError] = []
        for _ in readings:
            by_level = [[next(done) for _ in starts] for _ in LOG_SNRS]
            failed = [part for level in by_level for part in level if isinstance(part, ValueError)]
            found.append(failed[0] if failed else torch.stack([torch.cat(level, 1) for level in by_level], 1))  # type: ignore[arg-type]
        return found

    def _attempt(self, reading: _Reading, level: int, rows: range) -> Tensor | ValueError:
        try:
            return self._errors_of_batch(reading, level, rows)
        except ValueError as error:
            # For example, a network with a table of 1000 times fails at time 0.5: that is not its convention.
            return error

    def _errors_of_batch(self, reading: _Reading, level: int, rows: range) -> Tensor:
        """Returns the errors at one of `LOG_SNRS`, shape (predictions, rows)."""
        part = slice(rows.start, rows.stop)
        x, eps, mask, labels = (
            None if each is None else each[part] for each in (self.batch.x, self.eps, self.batch.mask, reading.labels)
        )
        assert x is not None and eps is not None
        backbone = reading.backbone.masked(mask)
        schedule, device = backbone.schedule, backbone.device
        log_snrs = torch.tensor(LOG_SNRS, dtype=torch.float64) + reading.offset
        levels = schedule.level_of_log_snr(log_snrs)[level].clamp(*schedule.level_range).expand(len(x))
        x_t = schedule.corrupt(x, eps, levels)
        condition = None if labels is None else labels.to(device)
        own = replace(backbone, schedule=schedule.own, prediction="eps")  # The network's output as it is.
        own_x_t = schedule.network_input(x_t, levels)
        output = own.predict(own_x_t.to(device), levels.to(device, torch.float32), condition).cpu()
        linear = _wiener_error(self.power, schedule.sigma(levels[0]) / schedule.alpha(levels[0]))
        errors = []
        for prediction in reading.predictions:
            # The same output, read as another prediction; `predict` handles the sign of a velocity.
            reread = replace(backbone, prediction=prediction, forward=lambda *_: output)
            estimate = convert_prediction(
                reread.predict(x_t, levels.float()).double(),
                x_t.double(),
                levels,
                schedule,
                source=prediction,
                to="x0",
            )
            residual = estimate - x
            if mask is not None:
                residual = residual.masked_fill(~mask.unsqueeze(1), 0.0)
            error = residual.square().flatten(1).mean(1) / linear
            errors.append(error.nan_to_num(nan=1e9, posinf=1e9).clamp(1e-9, 1e9))
        return torch.stack(errors)


def _raised(found: list[Fit] | ValueError) -> list[Fit]:
    if isinstance(found, ValueError):
        raise found
    return found


def _is_better(scores: Tensor, others: Tensor, margin: float = MARGIN, errors: float = 4) -> bool:
    """Whether scores are better than others by more than chance, on the samples of both.

    Args:
        scores: Scores of the first samples, shape (n,).
        others: Scores of the first samples, shape (m,).
        margin: Least difference in nats.
        errors: Least difference in standard errors.
    """
    if math.isinf(others[0]):
        return math.isfinite(scores[0])
    n = min(len(scores), len(others))
    advantage = others[:n] - scores[:n]
    standard_error = float(advantage.std()) / math.sqrt(n)
    return float(advantage.mean()) > max(margin, errors * standard_error)


def _leading(tried: Sequence[_Tried]) -> _Tried:
    """Returns the best of what was tried, if it is plausible and clearly better than the first; else the first."""
    first, best = tried[0], min(tried, key=lambda each: _order(each[1]))
    return best if best[1].score <= PLAUSIBLE and _is_better(best[1].scores, first[1].scores) else first


def _order(fit: Fit) -> tuple[int, float]:
    """Orders fits by their scores, those that the first samples rule out last."""
    return -len(fit.scores), fit.score


def _other_ranges(backbone: Backbone) -> list[Backbone]:
    more = {1: GRAY_RANGES, 3: COLOR_RANGES}.get(backbone.shape[0], ())
    ranges = [value_range for value_range in (*VALUE_RANGES, *more) if value_range != backbone.value_range]
    return [backbone.with_value_range(value_range) for value_range in ranges]


def _other_heads(backbone: Backbone) -> list[Backbone]:
    return [with_heads(backbone, heads) for heads in backbone.possible_heads if heads != backbone.num_heads]


def _best_of(leading: _Tried, others: Sequence[Backbone], passes: _Passes) -> list[_Tried]:
    """Returns the one of the other networks that is most ahead on the first samples, with its fit on all; or none."""
    fit = leading[1]
    if fit.score == math.inf:
        return []
    found = passes.fits([_Reading.like(fit, other) for other in others], FIRST)
    plausible = [each for each in zip(others, found, strict=True) if each[1].score <= PLAUSIBLE]
    if not plausible:
        return []
    rivals = _on_noise_of([other for other, _ in plausible], leading, passes, FIRST)
    ahead = [float((rival - own.scores).mean()) for rival, (_, own) in zip(rivals, plausible, strict=True)]
    best = plausible[ahead.index(max(ahead))][0]
    return [(best, passes.fits([_Reading.like(fit, best)], len(fit.scores))[0])]


def _replaces(other: _Tried, leading: _Tried, passes: _Passes, margin: float) -> bool:
    backbone, fit = other
    return fit.score <= PLAUSIBLE and _is_better(
        fit.scores, _on_noise_of([backbone], leading, passes, len(fit.scores))[0], margin
    )


def _on_noise_of(others: Sequence[Backbone], leading: _Tried, passes: _Passes, n: int) -> list[Tensor]:
    """Returns the scores of the leading network on the first n noisy samples of each of the other ones.

    Sigma is smaller in the units of the data if the network's value range is wider.
    """
    backbone, fit = leading
    offsets = [2 * math.log(backbone.schedule.scale / other.schedule.scale) for other in others]
    wanted = [offset for offset in dict.fromkeys(offsets) if offset]
    found = passes.fits([_Reading.like(fit, backbone, offset) for offset in wanted], n)
    scores = {0.0: fit.scores[:n]} | {offset: each.scores for offset, each in zip(wanted, found, strict=True)}
    return [scores[offset] for offset in offsets]


def _conventions(
    backbone: Backbone, predictions_by_schedule: Mapping[str, tuple[Prediction, ...]], passes: _Passes
) -> list[_Tried]:
    """Tries each convention under which the network can be called on the first samples, the declared one first."""
    others = {name: (schedule_from_name(name), predictions) for name, predictions in predictions_by_schedule.items()}
    own = backbone.schedule.own
    declared = next((name for name, (schedule, _) in others.items() if schedule.to_config() == own.to_config()), None)
    predictions = (backbone.prediction, *(others.pop(declared)[1] if declared is not None else ()))
    first = (declared or own.name, own, tuple(dict.fromkeys(predictions)))
    readings = [
        _Reading(backbone.with_schedule(schedule), name, predictions)
        for name, schedule, predictions in (first, *((name, *rest) for name, rest in others.items()))
    ]
    tried: list[_Tried] = []
    for reading, fits in zip(readings, passes.attempts(readings, FIRST), strict=True):
        if isinstance(fits, ValueError):
            if tried:
                continue
            infinite = torch.full((FIRST,), math.inf)
            ratios = (math.inf,) * len(LOG_SNRS)
            form = (reading.schedule, backbone.prediction, backbone.num_heads, backbone.value_range)
            fits = [Fit(*form, ratios, infinite)]
        tried += [(replace(reading.backbone, prediction=fit.prediction), fit) for fit in fits]
    return tried


def _on_all(tried: Sequence[_Tried], passes: _Passes) -> list[_Tried]:
    """Returns what was tried, with the fits on all samples of the first, and of those that few do not rule out."""
    n, best = len(passes.batch.x), min((fit for _, fit in tried), key=_order)
    callable_on_few = [i for i, (_, fit) in enumerate(tried) if len(fit.scores) < n and fit.score < math.inf]
    left = [i for i in callable_on_few if i == 0 or not _is_ruled_out(tried[i][1], best)]
    again = passes.attempts([_Reading.like(tried[i][1], tried[i][0]) for i in left], n)
    fits = {i: _raised(found)[0] for i, found in zip(left, again, strict=True) if i == 0 or isinstance(found, list)}
    return [(backbone, fits.get(i, fit)) for i, (backbone, fit) in enumerate(tried)]


def _is_ruled_out(fit: Fit, best: Fit) -> bool:
    """Whether few samples tell that a convention is not the best, or that it is worse than a linear denoiser."""
    return any(_is_better(other, fit.scores, EARLY_MARGIN, EARLY_ERRORS) for other in (best.scores, _linear(fit)))


def _linear(fit: Fit) -> Tensor:
    """Scores of the linear denoiser on the samples of a fit."""
    return torch.full_like(fit.scores, PLAUSIBLE)


def _by_condition(backbone: Backbone, declared: Fit, passes: _Passes) -> dict[str, float]:
    """Returns the scores of the declared convention by condition, on the samples of its fit."""
    condition = {"null": declared.score}
    labels = passes.batch.labels
    if labels is not None and backbone.num_classes and 1 < int(labels.max()) + 1 <= backbone.num_classes:
        given = {"true labels": labels, "wrong labels": (labels + 1) % (int(labels.max()) + 1)}
        readings = [replace(_Reading.like(declared, backbone), labels=each) for each in given.values()]
        fits = passes.fits(readings, len(declared.scores))
        condition |= {name: fit.score for name, fit in zip(given, fits, strict=True)}
    return condition


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
