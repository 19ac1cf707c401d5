"""What a confirmation compares: the arms, and how they are trained and scored.

An arm is one way to train; all arms of a seed share initial weights, data order, noise and noise levels. What the arms
other than the pick are for:

- **No alignment** is what every arm is compared with.
- **Runner-up**, the selection's second pair: is the first one better than the next?
- **Depth heuristic**, student at 0.3 and teacher at 0.6 of the depth: is measuring better than a rule of thumb?
- **Random pairs**, drawn among the pairs that none of the other arms has: is any choice better than none?
- **Learning rate**: no alignment, at the learning rate at which a step moves the weights as far as an aligned one.
  A second term in the loss changes how far a step goes, and a gain may come from that alone. AdamW scales the first
  step to one length whatever the gradient, so that is no measure; the mean over the first steps is, where gradients
  that agree from step to step carry farther. A step's length is proportional to the learning rate, so the factor
  between the two mean lengths is the factor between the two learning rates.
- **Bad control**, the last two layers: breaks every rule of the selection.
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

FRECHET, HELD_OUT = "Frechet distance", "held-out loss"
BASELINE, PICK, RUNNER_UP, HEURISTIC = "no alignment", "pick", "runner-up", "depth heuristic"
FIRST, RANDOM, LEARNING_RATE, CONTROL = "first-ranked pair", "random pair", "learning rate", "bad control"
# As they are asked for, in the order in which they stand.
NAMES = ("none", "pick", "heuristic", "runner-up", "random", "learning-rate", "bad")


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        name: Of the arm.
        pair: What it aligns; None for no alignment.
        matched: For no alignment at another learning rate: the pair whose aligned steps are as long.
        learning_rate: That learning rate, once it is measured; None for that of the plan.
        also: Under which other names this pair would have stood.
    """

    name: str
    pair: LayerPair | None
    matched: LayerPair | None = None
    learning_rate: float | None = None
    also: tuple[str, ...] = ()

    def __str__(self) -> str:
        names = " and ".join((self.name, *self.also))
        if self.matched:
            return f"{names} (no alignment, steps as long as with {self.matched})"
        return f"{names} ({self.pair})" if self.pair else names


@dataclass(frozen=True)
class ConfirmationPlan:
    """How arms are compared.

    Attributes:
        training: What all arms share; its pairs and seed are set by arm and seed.
        seeds: At least two; each is a fresh data order and noise, and fresh initial weights where the arms start from
            scratch.
        num_evaluations: Evenly spaced over the steps, the last one at the end.
        num_samples: Drawn for each Fréchet distance.
        sampling: How they are drawn.
        stop_early: Look after every seed from the third on, and train no further ones once the difference is clear.
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
            raise ValueError(f"a seed stands twice in {list(self.seeds)} and would count twice; pass each once")
        if not 1 <= self.num_evaluations <= self.training.steps:
            raise ValueError(f"{self.num_evaluations} evaluations do not fit into {self.training.steps} steps")
        if self.num_samples < 2:
            raise ValueError(f"a Fréchet distance needs at least 2 samples, got {self.num_samples}")
        if self.stop_early:
            look_levels(len(self.seeds))  # refuses too few seeds

    @property
    def evaluation_steps(self) -> tuple[int, ...]:
        """0 and `num_evaluations` steps after it."""
        return tuple(round(i * self.training.steps / self.num_evaluations) for i in range(self.num_evaluations + 1))

    @property
    def looks(self) -> Mapping[int, float]:
        """{number of seeds: level of the t test} of every look at the difference that may end the confirmation."""
        return look_levels(len(self.seeds)) if self.stop_early else {len(self.seeds): LEVEL}

    def identity(self) -> dict[str, Any]:
        """The fields that must agree for a confirmation to be continued; seeds may be added later."""
        return {name: value for name, value in asdict(self).items() if name not in ("seeds", "stop_early")}


def arms_for(
    ranked: Sequence[LayerPair],
    layers: Sequence[str],
    *,
    wanted: Sequence[str] | None = None,
    advised: bool = True,
    seed: int = 0,
) -> tuple[Arm, ...]:
    """The arms that put a selection to the test, no alignment first.

    An arm whose pair stands already is named there and left out.

    Args:
        ranked: Admissible pairs, best first.
        layers: Names in execution order, all of one shape.
        wanted: Some of `NAMES`, where "random:3" stands for three random pairs. If not given: no alignment, the pick,
            the depth heuristic (where it is the pick, the runner-up too) and the bad control.
        advised: Whether the selection picks its first pair, or advises against all of them.
        seed: Of the random pairs.

    Raises:
        ValueError: If an arm is unknown, stands twice or has no pair, or no alignment is not among them.
    """
    heuristic, control = depth_heuristic(tuple(layers)), LayerPair(layers[-2], layers[-1])
    if wanted is None:
        second = ["runner-up"] * (len(ranked) > 1 and ranked[0] == heuristic)
        wanted = ["none", *["pick"] * bool(ranked), "heuristic", *second, "bad"]
    counts = _counts(wanted)
    known = {"none": [Arm(BASELINE, None)], "heuristic": [Arm(HEURISTIC, heuristic)], "bad": [Arm(CONTROL, control)]}
    known["pick"] = [Arm(PICK if advised else FIRST, pair) for pair in ranked[:1]]
    known["runner-up"] = [Arm(RUNNER_UP, pair) for pair in ranked[1:2]]
    known["learning-rate"] = [Arm(LEARNING_RATE, None, matched=(*ranked, heuristic)[0])]
    others = {heuristic, control, *ranked[:2]}
    known["random"] = _random_pairs(layers, others, counts.get("random", 0), seed)
    arms: list[Arm] = []
    for name in sorted(counts, key=NAMES.index):
        if not known[name]:
            raise ValueError(f"the selection has no pair for the arm {name!r}; leave it out of --arms")
        for arm in known[name]:
            same = next((i for i, other in enumerate(arms) if arm.pair and other.pair == arm.pair), None)
            if same is None:
                arms.append(arm)
            else:
                arms[same] = replace(arms[same], also=(*arms[same].also, arm.name))
    return tuple(arms)


def _counts(wanted: Sequence[str]) -> dict[str, int]:
    """["pick", "random:2"] -> {"pick": 1, "random": 2}."""
    counts: dict[str, int] = {}
    for text in wanted:
        name, colon, count = text.partition(":")
        if name not in NAMES or (colon and (name != "random" or not count.isdecimal() or int(count) < 1)):
            raise ValueError(f"there is no arm {text!r}; pass some of {', '.join(NAMES)}, or random:2 for two")
        if name in counts:
            raise ValueError(f"the arm {name!r} stands twice in {','.join(wanted)}; pass each once")
        counts[name] = int(count) if colon else 1
    if "none" not in counts:
        raise ValueError(f"the arms {','.join(wanted)} lack none, which all others are compared with; add it")
    return counts


def _random_pairs(layers: Sequence[str], others: set[LayerPair], num: int, seed: int) -> list[Arm]:
    left = [pair for pair in (LayerPair(*names) for names in combinations(layers, 2)) if pair not in others]
    if num > len(left):
        raise ValueError(f"there are {len(left)} pairs beside those of the other arms, too few for random:{num}")
    drawn = RandomStream(seed, "order").permutation(len(left))[:num].tolist()
    return [Arm(f"{RANDOM} {i}", left[place]) for i, place in enumerate(drawn, 1)]
