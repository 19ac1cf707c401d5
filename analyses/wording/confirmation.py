"""What is said of a confirmation before it trains: its arms, its cost, its start, and what it can find."""

from __future__ import annotations

from collections.abc import Sequence

from layerprobe.analyses.experiments import (
    DISTANCE_FALL,
    ENOUGH_STEPS,
    LEVEL,
    LOSS_FALL,
    NEGATIVE_CONTROL,
    PICK,
    POWER,
    SAME_DISTANCE,
    BranchCourse,
    Resolution,
    Spread,
    StartCaution,
    seeds_needed,
    too_short,
)
from layerprobe.analyses.selection import PublishedPair, published_lengths

# A pair worth having should gain at least this part of what published runs gained.
_WORTH = 3


def missing_arm_sentences(missing: Sequence[str], num_layers: int) -> list[str]:
    """Returns why usual arms are not trained.

    Args:
        missing: Names of the arms, see `missing_arms`.
        num_layers: Number of layers of the network.
    """
    reasons = {
        PICK: "The selection has no pick, so the verdict will be about another pair.",
        SAME_DISTANCE: f"There is no random pair of the same distance: {num_layers} layers have no other pair of it.",
        NEGATIVE_CONTROL: (
            "There is no negative control: the last two layers are the pair of another arm, so no arm shows whether "
            "this trial can see damage."
        ),
    }
    return [reasons[name] for name in missing if name in reasons]


def cost_sentence(
    *, num_arms: int, num_seeds: int, steps: int, num_evaluations: int, num_samples: int, duration: str
) -> str:
    """Returns what a confirmation costs.

    Args:
        num_arms: Number of arms.
        num_seeds: Number of seeds.
        steps: Training steps of each arm.
        num_evaluations: Number of evaluations of each arm after its start.
        num_samples: Number of samples of each evaluation.
        duration: The time in words, such as "12 min".
    """
    return (
        f"{num_arms} arms x {num_seeds} seeds x {steps} steps, with {num_evaluations} evaluations of {num_samples} "
        f"samples each, take about {duration} on this device, as far as a few timed steps can tell."
    )


def start_sentences(cautions: Sequence[StartCaution], *, trained_steps: int | None, fall: float | None) -> list[str]:
    """Returns what is to be known of the checkpoint that arms branch from: a sentence for each code.

    Args:
        cautions: Codes, see `start_cautions`.
        trained_steps: Recorded length of the checkpoint's training; None where it is not recorded.
        fall: Recorded fall of its held-out loss over the last quarter of its training.
    """
    trained = "for an unrecorded number of steps" if trained_steps is None else f"for {trained_steps} steps"
    sentences: dict[StartCaution, str] = {
        "branch": (
            "LayerSync is a method for training from scratch, and these arms branch from a checkpoint trained "
            f"{trained}; --from-scratch starts them from fresh weights."
        ),
        "start looks converged": (
            "Warning: the checkpoint looks converged, so its branches can hardly show a gain: its held-out loss fell "
            f"by {fall or 0:.1%} over the last quarter of its training (converged: less than {LOSS_FALL:.0%})."
        ),
        "convergence not known": (
            "Whether the checkpoint is converged is not recorded; the baseline's own branch is measured, and a warning "
            "comes when its first seed has trained."
        ),
    }
    return [sentences[code] for code in cautions]


def converged_sentence(course: BranchCourse) -> str:
    """Returns the warning that the baseline's branch no longer improves, with what was measured."""
    return (
        f"The checkpoint looks converged, or {course.steps} steps are too few to improve it: over them the baseline's "
        f"held-out loss fell by {course.loss_fall:.1%} at most (converged: less than {LOSS_FALL:.0%}) and its Fréchet "
        f"distance by {course.distance_fall:.1%} (less than {DISTANCE_FALL:.0%}). LayerSync is a method for training "
        "from scratch; pass --from-scratch to test the pair there."
    )


def published_gain_sentences(end_step: int | None, resolution: Resolution) -> list[str]:
    """Returns the relative gain of published runs at a stage of training, and what would show a third of it.

    Args:
        end_step: Steps since fresh weights at which the arms end; None where this is not known.
        resolution: What the seeds can be expected to find, with their spread where it is known.
    """
    lengths = published_lengths()
    pair = lengths[0]
    listed = ", ".join(f"{one.gain:.0%} after {_thousands(one.steps or 0)}" for one in lengths)
    stage = _nearest_length(end_step, lengths)
    third = stage.gain / _WORTH
    source = (
        f"{pair.method} gained {listed} steps of 256 samples ({pair.network}, {pair.student} <- {pair.teacher} of "
        f"{pair.blocks} blocks; {stage.source}; {stage.confidence})."
    )
    return [source, _stage(end_step, stage, lengths), _seeds_for(third, stage, resolution)]


def _stage(end_step: int | None, stage: PublishedPair, lengths: Sequence[PublishedPair]) -> str:
    nearest = f"{stage.gain:.0%} after {_thousands(stage.steps or 0)} steps"
    if end_step is None:
        return f"How long this checkpoint was trained is not recorded, so the smallest of these is taken: {nearest}."
    if end_step < (lengths[0].steps or 0) / 2:
        return f"These arms end at step {end_step}, long before the first of them, where nothing is published."
    return f"These arms end at step {end_step}; the nearest of them is {nearest}."


def _nearest_length(end_step: int | None, lengths: Sequence[PublishedPair]) -> PublishedPair:
    if end_step is None:
        return min(lengths, key=lambda pair: pair.gain)
    return min(lengths, key=lambda pair: max(end_step / (pair.steps or 1), (pair.steps or 1) / max(end_step, 1)))


def _seeds_for(share: float, stage: PublishedPair, resolution: Resolution) -> str:
    length = (
        f"at a length where gains were seen: {_thousands(stage.steps or 0)} steps there, {ENOUGH_STEPS} in pair sweeps "
        "of small networks"
    )
    third = f"A third of {stage.gain:.0%} is {share:.0%} of the distance"
    if resolution.spread is None:
        largest = share / resolution.in_spreads
        return (
            f"{third}: {resolution.num_seeds} seeds show it if the spread over seeds is at most {largest:.1%} of the "
            f"distance, {length}. Two finished seeds, --pilot or --spread tell the spread."
        )
    num = seeds_needed(share / resolution.spread.share)
    return f"{third}: with this spread {'more than 200' if num is None else num} seeds show it, {length}."


def _thousands(steps: int) -> str:
    """ "100K", "4M"."""
    return f"{steps // 1_000_000}M" if steps % 1_000_000 == 0 else f"{steps // 1000}K"


def resolution_sentences(resolution: Resolution) -> list[str]:
    """Returns what a confirmation can be expected to find, with the number of seeds for half of that difference."""
    expected = (
        f"{resolution.num_seeds} seeds find a difference of {resolution.in_spreads:.2g} times its spread over seeds "
        f"with a probability of at least {POWER:.0%} (two-sided t test, error rate {LEVEL:.0%})."
    )
    spread = resolution.spread
    if spread is None:
        return [expected, "The spread is not known before the first seeds; pass --spread or --pilot to state it."]
    low, high = (end * resolution.in_spreads for end in spread.interval())
    width = "" if low == high else f", or {low:.1%} to {high:.1%} given how few seeds the spread was estimated from"
    sentences = [
        expected,
        f"With a spread of {spread.share:.1%} of the distance ({spread_source(spread)}), that is "
        f"{resolution.share:.1%} of the distance{width}.",
    ]
    half = seeds_needed(resolution.in_spreads / 2)
    return sentences + ([f"A difference half as large takes {half} seeds."] if half else [])


def spread_source(spread: Spread) -> str:
    """Returns where a spread comes from, such as "3 seeds of the pilot, after 4000 steps"."""
    if spread.source == "stated":
        return "as stated"
    source = "the pilot" if spread.source == "pilot" else spread.source
    return f"{spread.num_seeds} seeds of {source}, after {spread.steps} steps"


def length_cautions(steps: int, *, trained_steps: int | None = None) -> list[str]:
    """Returns what this number of training steps cannot show; nothing if the steps are enough.

    Args:
        steps: Training steps of an arm.
        trained_steps: Length of the training that an arm from scratch stands for; None where it is not known.
    """
    sentences = {
        "few steps": (
            f"{steps} steps show what alignment costs at first rather than what it gains later: in past pair sweeps "
            f"with batches of 64 samples, gains appeared between step 2000 and {ENOUGH_STEPS}. Train at least "
            f"{ENOUGH_STEPS} steps for a verdict."
        ),
        "shorter than the training": (
            f"The checkpoint was trained for {trained_steps} steps, the arms for {steps}. A gain on the way may be a "
            "loss at the end: in a pair sweep of four seeds, six of fifteen pairs gained at step 4000 and one at step "
            "12000. Train as many steps as the final training will have."
        ),
    }
    return [sentences[code] for code in too_short(steps, trained_steps=trained_steps)]
