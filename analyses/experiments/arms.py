"""The arms of a confirmation, and how they are trained and scored.

An arm is one way to train. All arms of a seed share initial weights, data order, noise and noise levels. The pick is
the arm on trial; the other arms answer one question each:

- **Baseline**: training without alignment, which every other arm is compared with.
- **Published prior**: the pair at the depths where published trainings gained most, see `prior_pair`. Is measuring
  better than copying a published pair?
- **Same distance**: a random pair as far apart as the pick. Do its layers matter, or only their distance?
- **Runner-up**: the second pair of the selection. Is the first pair better than the second?
- **Random pairs**: drawn among the pairs that no other arm can have. Is choosing a pair better than drawing one?
- **Learning rate**: the baseline at the learning rate whose steps move the weights as far as aligned steps. A second
  term in the loss changes the step length, and a gain may come from that alone. AdamW scales the first step to one
  length whatever the gradient, so the mean length over the first steps is compared: gradients that agree from step to
  step move the weights farther. A step's length is proportional to the learning rate, so the ratio of the two mean
  lengths is the ratio of the two learning rates.
- **Methods**: a pair aligned with further options, such as those of SRA. Does the method matter more than the pair?
- **Negative control**: the last two layers, a pair that violates every rule of the selection.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import combinations
from typing import Any

from layerprobe.analyses.experiments.power import LEVEL, look_levels
from layerprobe.analyses.selection import prior_pair
from layerprobe.layersync import LayerPair, SyncOptions
from layerprobe.messages import did_you_mean
from layerprobe.noise import RandomStream
from layerprobe.sampling import SamplingPlan
from layerprobe.training import TrainingPlan

FRECHET = "Frechet distance"
HELD_OUT = "held-out loss"
BASELINE = "baseline"
PICK = "pick"
PRIOR = "published prior"
SAME_DISTANCE = "same distance"
RUNNER_UP = "runner-up"
RANDOM = "random pair"
LEARNING_RATE = "learning rate"
SRA = "SRA"
NEGATIVE_CONTROL = "negative control"
# The names by which arms are requested, in the order in which they are trained; arms such as pick+noise-gap come
# beside "sra".
NAMES = ("none", "pick", "prior", "same-distance", "runner-up", "random", "learning-rate", "sra", "bad")
USUAL = ("none", "pick", "prior", "same-distance", "bad")
# The arms that align a pair, by the name that requests them.
_PAIR_ARMS = {"pick": PICK, "prior": PRIOR, "same-distance": SAME_DISTANCE, "runner-up": RUNNER_UP}
# The parts of a method that may follow such a name, with the field of `SyncOptions` that each sets, and its type.
_METHODS: Mapping[str, tuple[str, type[int] | type[float]]] = {
    "projector": ("projector_width", int),
    "teacher-decay": ("teacher_decay", float),
    "noise-gap": ("noise_gap", float),
}


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        name: Name of the arm.
        pair: Layer pair that is aligned; None for training without alignment.
        matched: For the baseline at another learning rate: the pair whose aligned steps are as long.
        learning_rate: Learning rate of such an arm once it is measured; None for the learning rate of the plan.
        also: Names of further requested arms that have the same pair.
        options: Fields of `SyncOptions` that differ from those of the plan, for an arm that tests a method.
    """

    name: str
    pair: LayerPair | None
    matched: LayerPair | None = None
    learning_rate: float | None = None
    also: tuple[str, ...] = ()
    options: Mapping[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        names = " and ".join((self.name, *self.also))
        if self.matched:
            return f"{names} (baseline with steps as long as with {self.matched})"
        details = [str(self.pair), *option_texts(self.options)]
        return f"{names} ({', '.join(details)})" if self.pair else names

    def training(self, shared: TrainingPlan) -> TrainingPlan:
        """Returns the training plan of this arm, from the one that all arms share."""
        return replace(
            shared,
            pairs=(self.pair,) if self.pair else (),
            learning_rate=self.learning_rate or shared.learning_rate,
            sync=_own(self, shared.sync),
        )


def option_texts(options: Mapping[str, float]) -> list[str]:
    """Returns the options of a method arm in words, such as "noise gap 0.2"."""
    return [f"{name.replace('_', ' ')} {value:g}" for name, value in options.items()]


@dataclass(frozen=True)
class ConfirmationPlan:
    """How the arms of a confirmation are trained and scored.

    Attributes:
        training: Training plan that all arms share; its pairs and seed are set for each arm and seed.
        seeds: Seeds of the runs, at least two. Each seed has its own data order and noise, and its own initial weights
            where the arms start from scratch.
        num_evaluations: Number of evaluations, evenly spaced over the steps; the last one is at the end.
        num_samples: Number of samples drawn for each Fréchet distance.
        sampling: Sampling plan for these samples.
        stop_early: Whether to test the difference after every seed from the third on and to stop once it is clear.
    """

    training: TrainingPlan
    seeds: tuple[int, ...] = (0, 1, 2)
    num_evaluations: int = 4
    num_samples: int = 1000
    sampling: SamplingPlan = field(default_factory=lambda: SamplingPlan(solver="heun", steps=12))
    stop_early: bool = False

    def __post_init__(self) -> None:
        if len(set(self.seeds)) < 2:
            raise ValueError(f"a paired difference needs at least 2 seeds, got {list(self.seeds)}")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"the seeds {list(self.seeds)} contain a duplicate; pass each seed once")
        if not 1 <= self.num_evaluations <= self.training.steps:
            raise ValueError(f"{self.num_evaluations} evaluations do not fit into {self.training.steps} steps")
        if self.num_samples < 2:
            raise ValueError(f"a Fréchet distance needs at least 2 samples, got {self.num_samples}")
        if self.stop_early:
            look_levels(len(self.seeds))  # raises if there are too few or too many seeds

    @property
    def evaluation_steps(self) -> tuple[int, ...]:
        """Steps at which an arm is scored: 0 and `num_evaluations` evenly spaced steps after it."""
        return tuple(round(i * self.training.steps / self.num_evaluations) for i in range(self.num_evaluations + 1))

    @property
    def looks(self) -> Mapping[int, float]:
        """The tests that may end the confirmation, {number of seeds: level of the t test}."""
        return look_levels(len(self.seeds)) if self.stop_early else {len(self.seeds): LEVEL}

    def identity(self) -> dict[str, Any]:
        """The fields that must agree for a confirmation to be continued; seeds may be added later."""
        return {name: value for name, value in asdict(self).items() if name not in ("seeds", "stop_early")}


def arms_for(
    ranked: Sequence[LayerPair],
    layers: Sequence[str],
    *,
    names: Sequence[str] | None = None,
    seed: int = 0,
    options: Mapping[str, float] | None = None,
    sync: SyncOptions | None = None,
) -> tuple[Arm, ...]:
    """Returns the arms that test a selection, the baseline first.

    Two requested arms that would train alike become one arm, which lists the name of the other in `also`.

    Args:
        ranked: Admissible pairs, best first.
        layers: Layer names in execution order; all of these layers have one shape.
        names: Requested arms, some of `NAMES`; "random:3" requests three random pairs, "pick+noise-gap" the pick
            with one of the options of SRA, and "pick+noise-gap:0.1" with a value of its own. The default is `USUAL`
            without arms that cannot exist, see `missing_arms`.
        seed: Seed of the random pairs.
        options: Options of the method arms, see `sra_options`.
        sync: Options that all arms share, to which those of a method arm may be equal; the defaults if None.

    Raises:
        ValueError: If an arm is unknown, is requested twice or has no pair, the baseline is missing, or no arm aligns
            layers.
    """
    prior, control = prior_pair(layers), LayerPair(layers[-2], layers[-1])
    like = (*ranked, prior)[0]
    named = {PICK: ranked[:1], PRIOR: [prior], RUNNER_UP: ranked[1:2]}
    others = {prior, control, *ranked[:2]}
    named[SAME_DISTANCE] = _same_distance(layers, like, others, seed)
    if names is None:
        names = [name for name in USUAL if name not in _PAIR_ARMS or named[_PAIR_ARMS[name]]]
    shared = sync or SyncOptions()
    arms: list[Arm] = []
    for text in _checked(names):
        base, *methods = text.split("+")
        if base in _PAIR_ARMS:
            wanted = [
                _with_methods(Arm(_PAIR_ARMS[base], pair), methods, options or {}) for pair in named[_PAIR_ARMS[base]]
            ]
        elif base.startswith("random"):
            wanted = _random_arms(layers, others.union(*named.values()), int(base.partition(":")[2] or 1), seed)
        else:
            wanted = {
                "none": [Arm(BASELINE, None)],
                "learning-rate": [Arm(LEARNING_RATE, None, matched=like)],
                "sra": [Arm(SRA, like, options=options or {})],
                "bad": [Arm(NEGATIVE_CONTROL, control)],
            }[base]
        if not wanted:
            owner = f"a network of {len(layers)} layers" if base == "same-distance" else "the selection"
            raise ValueError(f"{owner} has no pair for the arm {text!r}; leave it out of --arms")
        for arm in wanted:
            same = next((i for i, other in enumerate(arms) if arm.pair and _alike(arm, other, shared)), None)
            if same is None:
                arms.append(arm)
            else:
                arms[same] = replace(arms[same], also=(*arms[same].also, arm.name))
    return tuple(arms)


def missing_arms(arms: Sequence[Arm]) -> tuple[str, ...]:
    """Returns the usual arms that are not among these, neither under their own name nor under another's.

    A negative control that is another arm's pair controls nothing, so it is missing.
    """
    present = {arm.name for arm in arms} | {name for arm in arms for name in arm.also if name != NEGATIVE_CONTROL}
    return tuple(name for name in (PICK, PRIOR, SAME_DISTANCE, NEGATIVE_CONTROL) if name not in present)


def sra_options(training: TrainingPlan, *, token_width: int) -> dict[str, float]:
    """Returns the options by which SRA differs from LayerSync, in the sizes of this training.

    The noise gap is SRA's. SRA's teacher averages the weights with a decay of 0.9999 over 400K steps; the teacher of a
    short arm averages like the arm's own evaluated weights. The projector is twice as wide as the tokens, about as
    REPA's: 2048 for tokens of 1152.

    Args:
        training: Training plan that all arms share.
        token_width: Width of the tokens.

    Source: SRA (arXiv:2505.02831), REPA (arXiv:2410.06940).
    """
    return {"projector_width": 2 * token_width, "teacher_decay": min(0.9999, training.ema_decay), "noise_gap": 0.2}


def _alike(arm: Arm, other: Arm, shared: SyncOptions) -> bool:
    return arm.pair == other.pair and _own(arm, shared) == _own(other, shared)


def _own(arm: Arm, shared: SyncOptions) -> SyncOptions:
    options: dict[str, Any] = dict(arm.options)
    return replace(shared, **options)


def _checked(names: Sequence[str]) -> list[str]:
    """The names in the order of training."""
    for text in names:
        if not _is_known(text):
            raise ValueError(
                f"unknown arm {text!r}; pass some of {', '.join(NAMES)}, random:2 for two random pairs, or "
                f"pick+{'+'.join(_METHODS)}, each part with :VALUE if wanted{did_you_mean(text, NAMES)}"
            )
    keys = ["random" if text.startswith("random") else text for text in names]
    for name in keys:
        if keys.count(name) > 1:
            raise ValueError(f"the arm {name!r} is listed twice in {','.join(names)}; pass each arm once")
    if "none" not in names:
        raise ValueError(f"the arms {','.join(names)} lack none, the baseline of all comparisons; add it")
    if {"none", "learning-rate"}.issuperset(names):
        raise ValueError(f"the arms {','.join(names)} align no layers; add pick or prior")
    return sorted(names, key=lambda text: NAMES.index("sra" if "+" in text else text.partition(":")[0]))


def _is_known(text: str) -> bool:
    if text.startswith("random:"):
        return text.removeprefix("random:").isdecimal() and int(text.removeprefix("random:")) > 0
    base, *methods = text.split("+")
    if not methods:
        return base in NAMES
    names = [method.partition(":")[0] for method in methods]
    return base in _PAIR_ARMS and set(names) <= set(_METHODS) and len(set(names)) == len(names)


def _with_methods(arm: Arm, methods: Sequence[str], options: Mapping[str, float]) -> Arm:
    """The arm with parts such as "noise-gap" or "noise-gap:0.1"."""
    if not methods:
        return arm
    own: dict[str, Any] = {}
    for method in methods:
        name, colon, value = method.partition(":")
        option, kind = _METHODS[name]
        try:
            own[option] = kind(value) if colon else options[option]
        except ValueError as error:
            number = "an integer" if kind is int else "a number"
            raise ValueError(f"{method} needs {number} after its colon, such as {name}:{options[option]:g}") from error
    SyncOptions(**own)  # Refuses values that are out of range.
    words = " and ".join(method.replace("-", " ").replace(":", " ") for method in methods)
    return replace(arm, name=f"{arm.name} with {words}", options=own)


def _same_distance(layers: Sequence[str], like: LayerPair, excluded: set[LayerPair], seed: int) -> list[LayerPair]:
    """One random pair as far apart as another, or none if all such pairs are excluded."""
    distance = layers.index(like.teacher) - layers.index(like.student)
    pairs = [LayerPair(*names) for names in zip(layers, layers[distance:], strict=False)]
    pairs = [pair for pair in pairs if pair not in excluded]
    return [pairs[int(RandomStream(seed, "order").permutation(len(pairs))[0])]] if pairs else []


def _random_arms(layers: Sequence[str], excluded: set[LayerPair], num: int, seed: int) -> list[Arm]:
    candidates = [pair for pair in (LayerPair(*names) for names in combinations(layers, 2)) if pair not in excluded]
    if num > len(candidates):
        raise ValueError(f"only {len(candidates)} pairs are left for random pairs, too few for random:{num}")
    drawn = RandomStream(seed, "order").permutation(len(candidates))[:num].tolist()
    return [Arm(f"{RANDOM} {i}", candidates[index]) for i, index in enumerate(drawn, 1)]
