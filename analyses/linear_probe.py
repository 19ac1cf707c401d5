"""Linear probes: multinomial logistic regression at its true optimum.

The objective is scikit-learn's, per sample: `mean cross-entropy + ||W||^2 / (2 C n)`, with the bias unpenalised.
Inside the solver everything is class-major: parameters (K, D + 1) with the bias last, features (D + 1, n) with a last
row of ones, logits (K, n).

Default solvers stop early on the ill-conditioned features of networks, and a curve over layers then shows
conditioning instead of content. So every fit comes with its gradient norm, and says so when it did not converge.

The solver is limited-memory BFGS, preconditioned by a factorised Hessian where one pays. Logits and gradients
are kept in float64 and moved by float32 products of what changed: float32 decides the time and float64 the result.
Where that gets stuck on a problem of few unknowns, a damped Newton's method in float64 takes over.
Penalties are solved from the strongest to the weakest, each from where the last ones point.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from layerprobe.analyses.arrays import Features, Floats, centred, checked
from layerprobe.analyses.parallel import in_parallel, torch_threads
from layerprobe.analyses.scores import Scores, classification_scores

INVERSE_PENALTIES = (1e-3, 1e-2, 1e-1, 1.0)

ClassWeight = Literal["balanced"] | Mapping[Any, float] | None

_MAX_UNKNOWNS, _MAX_CLASSES = 3000, 25  # of a factorised Hessian
_SAMPLES_PER_UNKNOWN, _FEW_TERMS = 20, 10_000  # of its sum
_FEW_UNKNOWNS = 300  # for which Newton's method is at hand, where few samples lie awkwardly
_WEAK = 0.1  # an axis of less curvature, in penalties, needs no factorised Hessian
_MEMORY = 20  # steps that limited-memory BFGS remembers
_FRESH = math.log(10)  # what the gap falls by, per iteration, with a fresh Hessian
_WINDOW = 3  # iterations that tell how fast it falls
_PATIENCE = 10  # iterations in which neither the gap halves nor the objective falls by a hundredth
_SMALL = 1_000_000  # entries of features; below it several threads only get in each other's way


@dataclass(frozen=True, eq=False)
class LogisticFit:
    """A multinomial logistic regression: `logits = x @ weights.T + bias`.

    Attributes:
        weights: Shape (K, D), for the features as they were passed.
        bias: Shape (K,).
        classes: The K labels in ascending order, shape (K,).
        inverse_penalty: C; smaller is stronger.
        objective: Mean cross-entropy plus penalty, in nats.
        gradient_norm: Of the objective in (weights, bias) of the centred features, without preconditioning, in
            float64: the certificate.
        gap: At most this fraction of the objective lies above the minimum, by the curvature that the penalty gives the
            weights: the squared gradient norm times `C n / (2 objective)`, with the features in units of their root
            mean square, so that the bias weighs as much as a feature.
        passes: Products with the features and their transpose that it took.
        converged: Whether gradient norm and gap met the tolerance.
    """

    weights: Floats
    bias: Floats
    classes: NDArray[Any]
    inverse_penalty: float
    objective: float
    gradient_norm: float
    gap: float
    passes: int
    converged: bool

    def logits(self, x: Features) -> Floats:
        """One number per sample and class, shape (n, K)."""
        logits: Floats = x.astype(np.float64) @ self.weights.T + self.bias
        return logits

    def predict(self, x: Features) -> NDArray[Any]:
        """The most likely label of each sample, shape (n,)."""
        classes: NDArray[Any] = self.classes[self.logits(x).argmax(axis=1)]
        return classes

    def log_probabilities(self, x: Features) -> Floats:
        """Of each class, in nats, shape (n, K)."""
        logits = self.logits(x)
        logits -= logits.max(axis=1, keepdims=True)
        normalised: Floats = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        return normalised


@dataclass(frozen=True, eq=False)
class ProbeResult:
    """What a linear probe finds in one representation.

    Attributes:
        choose_accuracy: Fraction correct on the split that chose the penalty (and chooses layers).
        report_accuracy: Fraction correct on the split that nothing was chosen on.
        choose_correct: Per sample, shape (n_choose,), bool.
        report_correct: Per sample, shape (n_report,), bool.
        choose: Per-class and balanced accuracy, top-5 and calibration on the choose split.
        report: The same on the report split.
        inverse_penalty: The C that was best on the choose split; of equals the smallest, which is the strongest
            penalty.
        gradient_norm: Of the chosen fit.
        converged: Whether the chosen fit converged.
    """

    choose_accuracy: float
    report_accuracy: float
    choose_correct: NDArray[np.bool_]
    report_correct: NDArray[np.bool_]
    choose: Scores
    report: Scores
    inverse_penalty: float
    gradient_norm: float
    converged: bool


def linear_probe(
    fit_x: Features,
    fit_y: NDArray[Any],
    choose_x: Features,
    choose_y: NDArray[Any],
    report_x: Features,
    report_y: NDArray[Any],
    *,
    inverse_penalties: Sequence[float] = INVERSE_PENALTIES,
    standardise: bool = True,
    class_weight: ClassWeight = None,
    device: str = "cpu",
) -> ProbeResult:
    """How well a linear classifier reads the labels from features.

    One classifier per penalty is fitted on the fit split, the best on the choose split is kept, and the report split
    is only scored.

    Args:
        fit_x: Features, shape (n_fit, D), any float dtype; computed in float64.
        fit_y: Labels, shape (n_fit,).
        choose_x: Shape (n_choose, D).
        choose_y: Shape (n_choose,). A label that the fit split has not counts as an error.
        report_x: Shape (n_report, D).
        report_y: Shape (n_report,).
        inverse_penalties: Values of C to choose from.
        standardise: Divide each feature by its standard deviation on the fit split (constant ones are left alone).
            Without it the same C is a strong penalty for a layer with small activations and a weak one for a layer
            with large activations.
        class_weight: As in `fit_logistic`.
        device: Where the fits are computed.

    Raises:
        ValueError: If a split's features and labels disagree, the splits differ in D, features are not finite, the
            fit split has one class, or a penalty is not positive.
    """
    splits = {"fit": (fit_x, fit_y), "choose": (choose_x, choose_y), "report": (report_x, report_y)}
    for split, (x, y) in splits.items():
        _check_pair(x, y, split)
        if x.shape[1] != fit_x.shape[1]:
            widths = f"{x.shape[1]} features, the fit split {fit_x.shape[1]}"
            raise ValueError(f"the {split} split has {widths}; pass the same layer")
    mean, scale = _standardisation(fit_x) if standardise else (np.zeros(fit_x.shape[1]), np.ones(fit_x.shape[1]))
    scaled = {split: (x - mean) / scale for split, (x, _) in splits.items()}
    fits = fit_logistic_path(scaled["fit"], fit_y, sorted(inverse_penalties), class_weight=class_weight, device=device)
    correct = [fit.predict(scaled["choose"]) == choose_y for fit in fits]
    best = int(np.argmax([c.mean() for c in correct]))
    chosen = fits[best]
    report_correct = chosen.predict(scaled["report"]) == report_y
    return ProbeResult(
        choose_accuracy=float(correct[best].mean()),
        report_accuracy=float(report_correct.mean()),
        choose_correct=correct[best],
        report_correct=report_correct,
        choose=classification_scores(chosen.log_probabilities(scaled["choose"]), chosen.classes, choose_y),
        report=classification_scores(chosen.log_probabilities(scaled["report"]), chosen.classes, report_y),
        inverse_penalty=chosen.inverse_penalty,
        gradient_norm=chosen.gradient_norm,
        converged=chosen.converged,
    )


def fit_logistic(
    x: Features,
    y: NDArray[Any],
    *,
    inverse_penalty: float = 1.0,
    class_weight: ClassWeight = None,
    tolerance: float = 1e-8,
    max_passes: int = 5000,
    device: str = "cpu",
) -> LogisticFit:
    """Multinomial logistic regression with an L2 penalty, at its optimum.

    Equals `sklearn.linear_model.LogisticRegression(C=inverse_penalty)` run to convergence, for three classes or more.
    Two classes use the same softmax with two weight vectors; scikit-learn's single vector is their difference, and
    its C is twice ours.

    Args:
        x: Features, shape (n, D), any float dtype; computed in float64.
        y: Labels, shape (n,), of two classes or more.
        inverse_penalty: C > 0.
        class_weight: What each sample of a class counts: "balanced" for `n / (K n_k)`, or a number per label (1 where
            none is given). The mean in the objective and n in the penalty become weighted, as in scikit-learn.
        tolerance: The fit has converged when the gradient norm is below `tolerance` times the root mean square norm
            of the centred samples (1 appended for the bias) *and* `gap <= tolerance / 10`. The second matters for
            separable data under a weak penalty.
        max_passes: Where to give up; the fit then says that it did not converge.
        device: Where it is computed; a GPU needs float64.

    Raises:
        ValueError: If x and y disagree, x is not finite, y has one class, a class weight is not positive, or the
            penalty is not positive.

    Source: limited-memory BFGS, Nocedal and Wright 2006, ch. 7.
    """
    return fit_logistic_path(
        x,
        y,
        (inverse_penalty,),
        class_weight=class_weight,
        tolerance=tolerance,
        max_passes=max_passes,
        device=device,
    )[0]


def fit_logistic_path(
    x: Features,
    y: NDArray[Any],
    inverse_penalties: Sequence[float],
    *,
    class_weight: ClassWeight = None,
    tolerance: float = 1e-8,
    max_passes: int = 5000,
    device: str = "cpu",
) -> tuple[LogisticFit, ...]:
    """`fit_logistic` for several penalties, in the order given, each started from where the stronger ones point."""
    _check_pair(x, y, "fit")
    _check_penalties(inverse_penalties)
    classes, targets = np.unique(y, return_inverse=True)
    if len(classes) < 2:
        raise ValueError(f"all {len(y)} labels are {classes[0]}; a probe needs two classes or more")
    weights = _class_weights(class_weight, classes, targets)[targets]
    with torch.inference_mode(), torch_threads(1 if x.size < _SMALL else torch.get_num_threads()):
        data = _decomposed(torch.as_tensor(x, device=device))
        return _path(data, targets, classes, weights, inverse_penalties, tolerance, max_passes)


def fit_logistic_map(
    representations: Iterable[Features],
    y: NDArray[Any],
    inverse_penalties: Sequence[float],
    *,
    class_weight: ClassWeight = None,
    tolerance: float = 1e-8,
    max_passes: int = 5000,
    device: str = "cpu",
    workers: int | None = None,
) -> list[tuple[LogisticFit, ...]]:
    """`fit_logistic_path` for every representation of the same samples, one per core at a time.

    The results are those of one at a time, whatever the number of workers.

    Args:
        representations: Features, each of shape (n, D) with its own D; taken as they are needed.
        y: Labels, shape (n,).
        inverse_penalties: Values of C.
        class_weight: As in `fit_logistic`, like the next three.
        tolerance: As there.
        max_passes: As there.
        device: As there.
        workers: Representations at a time; None for one per thread that torch may use.

    Returns:
        Per representation its fits, in the order of `inverse_penalties`.
    """

    def path(x: Features) -> tuple[LogisticFit, ...]:
        return fit_logistic_path(
            x,
            y,
            inverse_penalties,
            class_weight=class_weight,
            tolerance=tolerance,
            max_passes=max_passes,
            device=device,
        )

    return in_parallel(path, representations, workers=workers)


def fit_multilabel_path(
    x: Features,
    y: NDArray[Any],
    inverse_penalties: Sequence[float],
    *,
    tolerance: float = 1e-8,
    max_passes: int = 5000,
    device: str = "cpu",
) -> tuple[tuple[LogisticFit, ...], ...]:
    """A yes-or-no logistic regression per label, which share the decomposition of the features.

    Equals scikit-learn's `OneVsRestClassifier(LogisticRegression(C))`: C is the one of its single weight vector, which
    is the difference of our two.

    Args:
        x: Features, shape (n, D).
        y: Shape (n, L), 1 or True where a sample has the label. Each label needs both.
        inverse_penalties: Values of C.
        tolerance: As in `fit_logistic`, like the next two.
        max_passes: As there.
        device: As there.

    Returns:
        Per label its fits, in the order of `inverse_penalties`; their classes are 0 and 1.

    Raises:
        ValueError: If x and y disagree, y holds anything but 0 and 1, or a label is on all samples or on none.
    """
    _check_penalties(inverse_penalties)
    checked(x, "features of the fit split")
    y = np.asarray(y)
    if y.ndim != 2 or len(y) != len(x) or not np.isin(y, (0, 1)).all():
        raise ValueError(f"{len(x)} samples but labels of shape {y.shape}; pass 0 or 1 per sample and label, (n, L)")
    for label, share in enumerate(y.mean(axis=0)):
        if share in (0, 1):
            raise ValueError(f"label {label} is on {'all' if share else 'no'} samples; leave it out")
    classes, ones = np.array([0, 1]), np.ones(len(y))
    with torch.inference_mode(), torch_threads(1 if x.size < _SMALL else torch.get_num_threads()):
        data = _decomposed(torch.as_tensor(x, device=device))
        halves = [c / 2 for c in inverse_penalties]
        fits = [_path(data, column.astype(np.intp), classes, ones, halves, tolerance, max_passes) for column in y.T]
    return tuple(
        tuple(replace(fit, inverse_penalty=float(c)) for fit, c in zip(path, inverse_penalties, strict=True))
        for path in fits
    )


def control_probe(
    fit_x: Features,
    fit_y: NDArray[Any],
    choose_x: Features,
    choose_y: NDArray[Any],
    report_x: Features,
    report_y: NDArray[Any],
    *,
    seed: int,
    **options: Any,
) -> ProbeResult:
    """The random-label control: `linear_probe`, its options too, after all labels were permuted over all samples.

    Selectivity is the accuracy of the probe minus the accuracy of its control: what the features say, less what a
    probe of that size finds in anything.

    Source: after Hewitt and Liang 2019 (arXiv:1909.03368), whose control gives each word type a random label.
    """
    labels = (fit_y, choose_y, report_y)
    permuted = np.random.default_rng(seed).permutation(np.concatenate(labels))
    fit, choose, report = np.split(permuted, np.cumsum([len(y) for y in labels])[:-1])
    return linear_probe(fit_x, fit, choose_x, choose, report_x, report, **options)


def _check_pair(x: Features, y: NDArray[Any], split: str) -> None:
    checked(x, f"features of the {split} split")
    if y.shape != x.shape[:1]:
        seen = f"{len(x)} samples but labels of shape {y.shape}"
        raise ValueError(f"the {split} split has {seen}; pass one label per sample")


def _check_penalties(inverse_penalties: Sequence[float]) -> None:
    if not len(inverse_penalties) or min(inverse_penalties) <= 0 or not np.isfinite(inverse_penalties).all():
        raise ValueError(f"the inverse penalties C are {tuple(inverse_penalties)}; pass finite numbers above 0")


def _class_weights(class_weight: ClassWeight, classes: NDArray[Any], targets: NDArray[np.intp]) -> Floats:
    """What a sample of each class counts, shape (K,)."""
    if class_weight is None:
        return np.ones(len(classes))
    if class_weight == "balanced":
        return len(targets) / (len(classes) * np.bincount(targets).astype(np.float64))
    weights = np.array([float(class_weight.get(label, 1.0)) for label in classes.tolist()])
    if not (np.isfinite(weights) & (weights > 0)).all():
        raise ValueError(f"the class weights are {weights.tolist()}; pass finite numbers above 0")
    return weights


def _standardisation(x: Features) -> tuple[Floats, Floats]:
    mean = x.mean(axis=0, dtype=np.float64)
    scale = np.sqrt(np.square(centred(x)).mean(axis=0))
    # Not `scale == 0`: the standard deviation of equal numbers is rounding error, and dividing by it would make
    # features of it.
    scale[(x == x[:1]).all(axis=0)] = 1.0
    return mean, scale


def _path(
    data: _Data,
    targets: NDArray[np.intp],
    classes: NDArray[Any],
    weights: Floats,
    inverse_penalties: Sequence[float],
    tolerance: float,
    max_passes: int,
) -> tuple[LogisticFit, ...]:
    device, total = data.exact.device, float(weights.sum())
    indices, share = torch.as_tensor(targets, device=device), torch.as_tensor(weights / total, device=device)
    curvature: _Curvature | None = None
    known: list[tuple[float, _Point]] = []
    fits = {}
    for c in sorted(set(inverse_penalties)):
        problem = _Problem(data, indices, len(classes), share, 1 / (c * total * data.unit**2))
        curvature = curvature or _Curvature(problem)
        start = _start(problem, known, math.log(c))
        point, passes, converged = _minimise(problem, start, curvature, tolerance, max_passes)
        if not converged and point.theta.numel() <= _FEW_UNKNOWNS:
            point, more, converged = _newton(problem, point, tolerance, max_passes - passes)
            passes += more
        known = [*known[-2:], (math.log(c), point)]
        fit_weights = point.theta[:, :-1] @ data.axes.T
        fits[c] = LogisticFit(
            weights=fit_weights.cpu().numpy(),
            bias=(point.theta[:, -1] - fit_weights @ data.mean).cpu().numpy(),
            classes=classes,
            inverse_penalty=float(c),
            objective=point.objective,
            gradient_norm=_original_norm(problem, point),
            gap=_gap(problem, point),
            passes=passes,
            converged=converged,
        )
    return tuple(fits[c] for c in inverse_penalties)


def _start(problem: _Problem, known: list[tuple[float, _Point]], log_c: float) -> _Point:
    """The better of the line and the parabola, in log C, through the last solutions."""
    if not known:
        return _exact(problem, problem.share.new_zeros(problem.num_classes, len(problem.data.exact)))
    guesses = []
    for through in (known[-2:], known[-3:])[: max(1, len(known) - 1)]:
        factors = [math.prod((log_c - b) / (a - b) for b, _ in through if b != a) for a, _ in through]
        theta = sum((f * p.theta for f, (_, p) in zip(factors, through, strict=True)), torch.zeros(()))
        logits = sum((f * p.logits for f, (_, p) in zip(factors, through, strict=True)), torch.zeros(()))
        guesses.append(_trial(problem, theta, logits))
    best = min(guesses, key=lambda trial: trial.objective)
    return _advanced(problem, known[-1][1], best)


@dataclass(frozen=True, eq=False)
class _Data:
    """One representation on its principal axes, r = min(n, D) of them, on the device that solves."""

    exact: Tensor  # (r + 1, n) float64: coordinates on the axes, by ascending variance, then 1
    quick: Tensor  # the same in float32
    rows: Tensor  # its transpose, a row per sample
    variances: Tensor  # (r + 1,) mean squares
    axes: Tensor  # (D, r) float64; parameters (K, r + 1) stand for the weights `parameters[:, :-1] @ axes.T`
    mean: Tensor  # (D,) float64
    unit: float  # what the features were divided by: their root mean square


@dataclass(frozen=True, eq=False)
class _Problem:
    data: _Data
    targets: Tensor  # (n,) class indices
    num_classes: int
    share: Tensor  # (n,) float64: weight of each sample in the mean, sum 1
    penalty: float  # 1 / (C * sum of sample weights), for features in units


@dataclass(frozen=True, eq=False)
class _Trial:
    theta: Tensor  # (K, r + 1) float64
    logits: Tensor  # (K, n) float64
    residual: Tensor  # (K, n) float64: derivative of the mean cross-entropy by the logits
    objective: float


@dataclass(frozen=True, eq=False)
class _Point(_Trial):
    slope: Tensor  # (K, r + 1) float64: derivative of the mean cross-entropy by theta
    gradient: Tensor  # the same of the objective


def _decomposed(x: Tensor) -> _Data:
    wide = x.double()
    mean = wide.mean(0)
    wide = wide - mean
    # The first mean is rounded at the size of the offset, the second at the size of the spread.
    rest = wide.mean(0)
    wide -= rest
    basis = None
    if wide.shape[0] < wide.shape[1]:  # The optimum lies in the span of the samples.
        basis, triangle = torch.linalg.qr(wide.T)
        wide = triangle.T
    variances, axes = torch.linalg.eigh(_product(wide.T, wide) / len(wide))
    # Features of the size of the bias' 1, whatever their scale was: float32 needs it.
    unit = math.sqrt(float(variances.clamp_min(0).mean())) or 1.0
    axes = axes / unit
    # A row per axis: thin products are twice as fast with it as with a row per sample.
    exact = torch.cat([_product(axes.T, wide.T), wide.new_ones(1, len(wide))])
    return _Data(
        exact=exact,
        quick=exact.float(),
        rows=exact.T.float().contiguous(),
        variances=torch.cat([variances.clamp_min(0) / unit**2, variances.new_ones(1)]),
        axes=axes if basis is None else basis @ axes,
        mean=mean + rest,
        unit=unit,
    )


def _trial(problem: _Problem, theta: Tensor, logits: Tensor) -> _Trial:
    own, highest = problem.targets[None], logits.amax(0)
    residual = (logits - highest).exp_()
    total = residual.sum(0)
    loss = float((total.log() + highest - logits.gather(0, own)[0]) @ problem.share)
    residual *= problem.share / total
    # The target's is minus the sum of the others, since p - 1 cancels where p is near 1.
    residual.scatter_(0, own, 0)
    residual.scatter_(0, own, -residual.sum(0, keepdim=True))
    return _Trial(theta, logits, residual, loss + problem.penalty / 2 * float(theta[:, :-1].square().sum()))


def _with_slope(problem: _Problem, trial: _Trial, slope: Tensor) -> _Point:
    gradient = slope.clone()
    gradient[:, :-1].add_(trial.theta[:, :-1], alpha=problem.penalty)
    return _Point(trial.theta, trial.logits, trial.residual, trial.objective, slope, gradient)


def _exact(problem: _Problem, theta: Tensor) -> _Point:
    """A point computed in float64 throughout."""
    trial = _trial(problem, theta, _product(theta, problem.data.exact))
    return _with_slope(problem, trial, _product(trial.residual, problem.data.exact.T))


def _advanced(problem: _Problem, point: _Point, trial: _Trial) -> _Point:
    """The trial with its gradient, by a float32 product with what changed since the point."""
    size = 1 / len(problem.share)
    change = (trial.residual - point.residual).div_(size).float()
    change = torch.nn.functional.hardshrink(change, 1e-30)  # subnormal numbers are slow
    return _with_slope(problem, trial, point.slope.add(_product(change, problem.data.quick.T), alpha=size))


class _Curvature:
    """What is known of the Hessian, handed on from penalty to penalty: a preconditioner, and steps of the solver.

    The preconditioner is the Hessian itself on the axes that need it, those where the curvature of the data is not
    dwarfed by the penalty, and its diagonal on the others. With too many classes for that it is a Kronecker product.
    """

    def __init__(self, problem: _Problem) -> None:
        self.apply = _diagonal(problem)
        self.penalty = problem.penalty
        # Of the last iterations, shape (m, K, r + 1): what changed in theta, and what in the gradient.
        self.steps = self.turns = problem.share.new_zeros(0, problem.num_classes, len(problem.data.exact))

    def move(self, penalty: float) -> None:
        """To another penalty, whose part in the turns of the gradient is known."""
        turns = self.turns.clone()
        turns[..., :-1] += (penalty - self.penalty) * self.steps[..., :-1]
        kept = (self.steps * turns).sum((1, 2)) > 0  # rounding may have left some without curvature
        self.steps, self.turns, self.penalty = self.steps[kept], turns[kept], penalty

    def learn(self, point: _Point, following: _Point) -> None:
        step, turn = following.theta - point.theta, following.gradient - point.gradient
        if (step * turn).sum() > 0:
            self.steps = torch.cat([self.steps[1 - _MEMORY :], step[None]])
            self.turns = torch.cat([self.turns[1 - _MEMORY :], turn[None]])

    def renew(self, problem: _Problem, point: _Point) -> None:
        probabilities = torch.softmax(point.logits.float(), 0)
        build = _close if problem.num_classes <= _MAX_CLASSES else _kronecker
        self.apply, self.steps, self.turns = build(problem, probabilities), self.steps[:0], self.turns[:0]

    def direction(self, gradient: Tensor) -> Tensor:
        """Where the quasi-Newton step leads: Byrd, Nocedal and Schnabel 1994, theorem 2.2, as two triangular solves."""
        steps, turns, ahead = self.steps.flatten(1), self.turns.flatten(1), gradient.flatten()[:, None]
        triangle = (steps @ turns.T).triu()
        known = torch.linalg.solve_triangular(triangle, steps @ ahead, upper=True)
        ahead = ahead - turns.T @ known
        size = float(ahead.norm()) or 1.0
        ahead = size * self.apply((ahead / size).float().view_as(gradient)).double().view(-1, 1)
        known = triangle.diagonal()[:, None] * known - turns @ ahead
        ahead = ahead + steps.T @ torch.linalg.solve_triangular(triangle.T, known, upper=False)
        ahead = ahead.view_as(gradient)
        descent: Tensor = ahead.mean(0) - ahead  # a shift of all classes changes no probability
        return descent


def _product(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b`, on a CPU by numpy's BLAS: faster than torch's on some of them, twice so for `a.T @ a`."""
    product: Tensor = torch.from_numpy(a.numpy() @ b.numpy()) if a.device.type == "cpu" else a @ b
    return product


def _minimise(
    problem: _Problem, point: _Point, curvature: _Curvature, tolerance: float, max_passes: int
) -> tuple[_Point, int, bool]:
    """Limited-memory BFGS with the preconditioner as its first guess of the inverse Hessian.

    Logits and gradients are kept in float64 and moved by float32 products of what changed, whose rounding errors
    shrink with the steps. They are computed anew in float64 before it ends.
    """
    passes, stuck, is_exact = 1, 0, False
    best, lowest, last_exact = math.inf, math.inf, math.inf
    gaps: list[float] = []  # since the preconditioner was renewed
    curvature.move(problem.penalty)
    while True:
        gaps.append(_gap(problem, point))
        if gaps[-1] < best / 2 or point.objective < 0.99 * lowest:
            best, lowest, stuck = min(best, gaps[-1]), min(lowest, point.objective), 0
        else:
            stuck += 1
        following = None
        if not _is_optimal(problem, point, tolerance) and stuck <= _PATIENCE and passes < max_passes:
            if _is_slow(problem, gaps, tolerance):
                curvature.renew(problem, point)
                gaps = gaps[-1:]
            following = _line_search(problem, point, curvature.direction(point.gradient))
        if following is not None:
            curvature.learn(point, following)
            point, is_exact = following, False
        elif not is_exact:
            point, is_exact = _exact(problem, point.theta), True
            if not _gap(problem, point) < last_exact / 2 or passes >= max_passes:
                break
            last_exact, stuck, best = _gap(problem, point), 0, math.inf
        else:
            break
        passes += 1
    return point, passes, _is_optimal(problem, point, tolerance)


def _newton(problem: _Problem, point: _Point, tolerance: float, max_passes: int) -> tuple[_Point, int, bool]:
    """Newton's method in float64, damped as by Levenberg and Marquardt: slow, and sure where samples are certain.

    Where nearly all are, some of them wrongly, there is a slope and no curvature, and a step of any other method goes
    nowhere or too far.
    """
    damping, passes = 1e-3, 0
    flat = torch.full_like(problem.data.variances, problem.penalty)
    flat[-1] = 0
    while passes < max_passes and damping < 1e12 and not _is_optimal(problem, point, tolerance):
        hessian = _whole_hessian(problem, torch.softmax(point.logits, 0))
        damped = flat + damping * problem.data.variances / problem.num_classes
        hessian.diagonal().add_(damped.repeat(problem.num_classes))
        factor, failed = torch.linalg.cholesky_ex(hessian)
        step = torch.cholesky_solve(point.gradient.reshape(-1, 1), factor).view_as(point.theta)
        passes += 1
        trial = None if failed else _exact(problem, point.theta - step)
        # At the end the objective only shows rounding, and the gradient shows the way.
        rounding = 1e-14 * (1 + abs(point.objective))
        if trial is not None and (
            trial.objective < point.objective - rounding
            or (trial.objective <= point.objective + rounding and _gap(problem, trial) < _gap(problem, point))
        ):
            point, damping = trial, damping / 10
        else:
            damping *= 10
    return point, passes, _is_optimal(problem, point, tolerance)


def _whole_hessian(problem: _Problem, probabilities: Tensor) -> Tensor:
    """Of the cross-entropy by all of theta, shape (K * (r + 1), K * (r + 1)), and 1 between the biases of all classes.

    The last makes up for the shift of all biases, which changes nothing.
    """
    (k, n), x = probabilities.shape, problem.data.exact
    weights = torch.diag_embed(probabilities.T).permute(1, 2, 0) - probabilities[:, None] * probabilities
    rows = (weights * problem.share).reshape(k * k, 1, n) * x
    hessian = (rows.reshape(-1, n) @ x.T).view(k, k, len(x), len(x)).permute(0, 2, 1, 3).contiguous()
    hessian[:, -1, :, -1] += 1.0
    return hessian.view(k * len(x), k * len(x))


def _is_slow(problem: _Problem, gaps: list[float], tolerance: float) -> bool:
    """Whether a fresh preconditioner would save more iterations than it costs."""
    if len(gaps) <= _WINDOW or gaps[-1] <= tolerance / 10:
        return False
    left = math.log(gaps[-1] * 10 / tolerance)
    rate = max(math.log(gaps[-1 - _WINDOW] / gaps[-1]) / _WINDOW, 0.03)
    return left / rate - left / _FRESH > _price(problem)


def _price(problem: _Problem) -> float:
    """What a fresh preconditioner costs, in iterations; half of it, since the next penalty needs it too.

    Counted in flops at the speed of thin products, fitted to one core: a matrix product is twice as fast, an entry of
    the logits costs as much as 350, and calls of small operations as much as the constants.
    """
    (width, n), k = problem.data.quick.shape, problem.num_classes
    if k > _MAX_CLASSES:
        build = 2.0 * n * width**2 + 10 * width**3
    else:
        head = _head(problem, 0.3 / k * problem.data.variances)  # a typical doubt between the classes
        build = _terms(problem, head) * head**2 + ((k - 1) * head) ** 3 / 3 + k**2 * (130 * n + 6e5)
    return build / (n * k * (4 * width + 350) + 1.3e7) / 2


def _head(problem: _Problem, curvature: Tensor) -> int:
    """How many of the last axes, the bias included, the factorised Hessian is for."""
    needed = int((curvature[:-1] > _WEAK * problem.penalty).sum()) + 1
    return max(1, min(needed, _MAX_UNKNOWNS // (problem.num_classes - 1)))


def _terms(problem: _Problem, head: int) -> int:
    n, k = len(problem.share), problem.num_classes
    return min(n * k * (k - 1) // 2, max(_SAMPLES_PER_UNKNOWN * (k - 1) * head, _FEW_TERMS))


def _diagonal(problem: _Problem) -> Callable[[Tensor], Tensor]:
    """The Hessian where all classes are equally likely; nothing but a diagonal on principal axes."""
    penalties = torch.full_like(problem.data.variances, problem.penalty)
    penalties[-1] = 0
    diagonal = (problem.data.variances / problem.num_classes + penalties).float()
    return lambda residual: residual / diagonal


def _close(problem: _Problem, probabilities: Tensor) -> Callable[[Tensor], Tensor]:
    doubt = (probabilities * (1 - probabilities)) @ problem.share.float()
    diagonal = doubt[:, None] * problem.data.variances.float()
    head = _head(problem, diagonal.mean(0))
    ahead = _factorised(_hessian(problem, probabilities, head), problem.penalty)
    tail = diagonal[:, :-head] + problem.penalty

    def apply(residual: Tensor) -> Tensor:
        rest = residual[:, :-head] / tail
        return torch.cat([rest - rest.mean(0), ahead(residual[:, -head:])], 1)

    return apply


def _line_search(problem: _Problem, point: _Point, step: Tensor) -> _Point | None:
    """The longest of 1, 1/2, 1/4, ... steps that goes down, or None."""
    slope = float((point.gradient * step).sum())
    if not slope < 0:
        return None
    size = float(step.abs().max())
    change = _product((step / size).float(), problem.data.quick)
    for halvings in range(30):
        length = 0.5**halvings
        trial = _trial(problem, point.theta.add(step, alpha=length), point.logits.add(change, alpha=length * size))
        # The last term is the rounding of the objective.
        if trial.objective <= point.objective + 1e-4 * length * slope + 1e-13 * (1 + abs(point.objective)):
            return _advanced(problem, point, trial)
    return None


def _original_norm(problem: _Problem, point: _Point) -> float:
    """The gradient's norm in the weights of the features as they were passed, and the bias."""
    return math.hypot(problem.data.unit * float(point.gradient[:, :-1].norm()), float(point.gradient[:, -1].norm()))


def _is_optimal(problem: _Problem, point: _Point, tolerance: float) -> bool:
    size = math.hypot(1, problem.data.unit * math.sqrt(len(problem.data.exact) - 1))
    return _original_norm(problem, point) <= tolerance * size and _gap(problem, point) <= tolerance / 10


def _gap(problem: _Problem, point: _Point) -> float:
    """The squared gradient over twice the least curvature, as a fraction of the objective; features in units."""
    if point.objective == 0:
        return 0.0
    return float(point.gradient.square().sum()) / (2 * problem.penalty * point.objective)


def _kronecker(problem: _Problem, probabilities: Tensor) -> Callable[[Tensor], Tensor]:
    """(classes x classes) times (features x features), rescaled to the Hessian's diagonal in their eigenbases."""
    features, share = problem.data.quick, problem.share.float()
    spread = (1 - probabilities.square().sum(0)).clamp_min(0) * share
    _, axes = torch.linalg.eigh(((features * spread) @ features.T).double())
    weighted = probabilities * share
    _, contrasts = torch.linalg.eigh((torch.diag(weighted.sum(1)) - weighted @ probabilities.T).double())
    penalised = (problem.penalty * (1 - axes[-1].square())).float()
    axes, contrasts = axes.float(), contrasts.float()
    variances = (contrasts.T.square() @ probabilities - (contrasts.T @ probabilities).square()).clamp_min(0) * share
    diagonal = variances @ (axes.T @ features).square().T + penalised
    diagonal += 1e-9 * diagonal.max()
    return lambda residual: contrasts @ ((contrasts.T @ residual @ axes) / diagonal) @ axes.T


def _hessian(problem: _Problem, probabilities: Tensor, head: int) -> Tensor:
    """The data's part of the Hessian on the last axes, shape (K - 1, head, K - 1, head): the last class is held at 0.

    Only the lower half is filled.

    With `A_kl = sum of share p_k p_l x x^T` its blocks are `-A_kl` and, on the diagonal, the sum of `A_kl` over l.
    Most samples are certain and few pairs of classes are in question for a sample, so few products carry a sum; the
    others are drawn in proportion to their weight, from a fixed sequence, as many as there is time for. Each pair
    gets its own draw: pairs that are rarely confused decide the flattest directions.
    """
    k, n = probabilities.shape
    first, second = torch.tril_indices(k, k, -1, device=probabilities.device)
    probabilities = torch.threshold(probabilities, 1e-15, 0.0)  # no subnormal products
    weights = probabilities[first] * probabilities[second] * problem.share.float()
    means = weights.mean(1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
    sequence = (torch.arange(1, n + 1, device=weights.device).double() * 0.6180339887498949 % 1).float()
    relative = weights / means / sequence
    threshold, most = 1.0, _terms(problem, head)
    while 8 * int((relative[:, ::8] > threshold).sum()) > most:
        threshold *= 2
    hessian = probabilities.new_zeros(k - 1, head, k - 1, head)
    for a, b, weight, ratio, mean in zip(first.tolist(), second.tolist(), weights, relative, means, strict=True):
        kept = (ratio > threshold).nonzero()[:, 0]
        rows = problem.data.rows.index_select(0, kept)[:, -head:]
        rows *= torch.maximum(weight[kept], threshold * mean).sqrt_()[:, None]
        block = _product(rows.T, rows)
        hessian[b, :, b] += block
        if a < k - 1:
            hessian[a, :, a] += block
            hessian[a, :, b] = -block
    return hessian


def _factorised(hessian: Tensor, penalty: float) -> Callable[[Tensor], Tensor]:
    """Solves with the Hessian, of which the lower half is given and overwritten."""
    k, width = hessian.shape[:2]
    features = torch.arange(width - 1, device=hessian.device)
    # The penalty of weights that sum to zero over classes, told by all but the last class.
    hessian[:, features, :, features] += penalty * (torch.eye(k, device=hessian.device) - 1 / (k + 1))
    matrix = hessian.view(k * width, k * width)
    scale = matrix.diagonal().clamp_min(torch.finfo(matrix.dtype).tiny).rsqrt()
    matrix.mul_(scale).mul_(scale[:, None])
    jitter, failed = 1e-6, True
    while failed and jitter < 1:
        matrix.diagonal().add_(jitter)
        factor, info = torch.linalg.cholesky_ex(matrix)
        failed, jitter = bool(info), 30 * jitter

    def apply(residual: Tensor) -> Tensor:
        known = (residual[:-1].reshape(-1) * scale)[:, None]
        half = torch.linalg.solve_triangular(factor, known, upper=False)
        solved = (torch.linalg.solve_triangular(factor.T, half, upper=True)[:, 0] * scale).reshape(k, width)
        whole = torch.cat([solved, solved.new_zeros(1, width)])
        return whole - whole.mean(0)

    return apply
