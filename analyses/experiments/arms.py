"""The arms of a confirmation, and how they are trained and scored.

An arm is one way to train. All arms of a seed share initial weights, data order, noise and noise levels. The pick is
the arm on trial; the other arms answer one question each:

- **Baseline**: training without alignment, which every other arm is compared with.
- **Runner-up**: the second pair of the selection. Is the first pair better than the second?
- **Depth heuristic**: student at 0.3 and teacher at 0.6 of the depth. Is measuring better than a rule of thumb?
- **Random pairs**: drawn among the pairs that no other arm can have. Is choosing a pair better than drawing one?
- **Learning rate**: the baseline at the learning rate whose steps move the weights as far as aligned steps. A second
  term in the loss changes the step length, and a gain may come from that alone. AdamW scales the first step to one
  length whatever the gradient, so the mean length over the first steps is compared: gradients that agree from step to
  step move the weights farther. A step's length is proportional to the learning rate, so the ratio of the two mean
  lengths is the ratio of the two learning rates.
- **Negative control**: the last two layers, a pair that violates every rule of the selection.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import combinations
from typing import Any

from layerprobe.analyses.experiments.power import LEVEL, look_levels
from layerprobe.layersync import LayerPair, depth_heuristic
from layerprobe.noise import RandomStream
from layerprobe.sampling import SamplingPlan
from layerprobe.training import TrainingPlan

FRECHET = "Frechet distance"
HELD_OUT = "held-out loss"
BASELINE = "baseline"
PICK = "pick"
RUNNER_UP = "runner-up"
HEURISTIC = "depth heuristic"
RANDOM = "random pair"
LEARNING_RATE = "learning rate"
NEGATIVE_CONTROL = "negative control"
# The names by which arms are requested, in the order in which they are trained.
NAMES = ("none", "pick", "heuristic", "runner-up", "random", "learning-rate", "bad")


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        name: Name of the arm.
        pair: Layer pair that is aligned; None for training without alignment.
        matched: For the baseline at another learning rate: the pair whose aligned steps are as long.
        learning_rate: Learning rate of such an arm once it is measured; None for the learning rate of the plan.
        also: Names of further requested arms that have the same pair.
    """

    name: str
    pair: LayerPair | None
    matched: LayerPair | None = None
    learning_rate: float | None = None
    also: tuple[str, ...] = ()

    def __str__(self) -> str:
        names = " and ".join((self.name, *self.also))
        if self.matched:
            return f"{names} (baseline with steps as long as with {self.matched})"
        return f"{names} ({self.pair})" if self.pair else names


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
) -> tuple[Arm, ...]:
    """Returns the arms that test a selection, the baseline first.

    Two requested arms with the same pair become one arm, which lists the name of the other in `also`.

    Args:
        ranked: Admissible pairs, best first.
        layers: Layer names in execution order; all of these layers have one shape.
        names: Requested arms, some of `NAMES`; "random:3" requests three random pairs. The default is the baseline,
            the pick, the depth heuristic (where the pick is the heuristic's pair, the runner-up too) and the negative
            control.
        seed: Seed of the random pairs.

    Raises:
        ValueError: If an arm is unknown, is requested twice or has no pair, or the baseline is missing.
    """
    heuristic, control = depth_heuristic(tuple(layers)), LayerPair(layers[-2], layers[-1])
    if names is None:
        second = ["runner-up"] * (len(ranked) > 1 and ranked[0] == heuristic)
        names = ["none", *["pick"] * bool(ranked), "heuristic", *second, "bad"]
    counts = _counts(names)
    num_random, pairs_of_others = counts.get("random", 0), {heuristic, control, *ranked[:2]}
    available = {
        "none": [Arm(BASELINE, None)],
        "pick": [Arm(PICK, pair) for pair in ranked[:1]],
        "heuristic": [Arm(HEURISTIC, heuristic)],
        "runner-up": [Arm(RUNNER_UP, pair) for pair in ranked[1:2]],
        "random": _random_arms(layers, pairs_of_others, num_random, seed),
        "learning-rate": [Arm(LEARNING_RATE, None, matched=(*ranked, heuristic)[0])],
        "bad": [Arm(NEGATIVE_CONTROL, control)],
    }
    arms: list[Arm] = []
    for name in sorted(counts, key=NAMES.index):
        if not available[name]:
            raise ValueError(f"the selection has no pair for the arm {name!r}; leave it out of --arms")
        for arm in available[name]:
            same = next((i for i, other in enumerate(arms) if arm.pair and other.pair == arm.pair), None)
            if same is None:
                arms.append(arm)
            else:
                arms[same] = replace(arms[same], also=(*arms[same].also, arm.name))
    return tuple(arms)


def _counts(names: Sequence[str]) -> dict[str, int]:
    """["pick", "random:2"] -> {"pick": 1, "random": 2}."""
    counts: dict[str, int] = {}
    for text in names:
        name, colon, count = text.partition(":")
        if name not in NAMES or (colon and (name != "random" or not count.isdecimal() or int(count) < 1)):
            raise ValueError(f"unknown arm {text!r}; pass some of {', '.join(NAMES)}, or random:2 for two random pairs")
        if name in counts:
            raise ValueError(f"the arm {name!r} is listed twice in {','.join(names)}; pass each arm once")
        counts[name] = int(count) if colon else 1
    if "none" not in counts:
        raise ValueError(f"the arms {','.join(names)} lack none, the baseline of all comparisons; add it")
    return counts


def _random_arms(layers: Sequence[str], excluded: set[LayerPair], num: int, seed: int) -> list[Arm]:
    candidates = [pair for pair in (LayerPair(*names) for names in combinations(layers, 2)) if pair not in excluded]
    if num > len(candidates):
        raise ValueError(f"only {len(candidates)} pairs are left for random pairs, too few for random:{num}")
    drawn = RandomStream(seed, "order").permutation(len(candidates))[:num].tolist()
    return [Arm(f"{RANDOM} {i}", candidates[index]) for i, index in enumerate(drawn, 1)]
