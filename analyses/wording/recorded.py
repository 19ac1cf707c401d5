"""A recorded trial in words."""

from __future__ import annotations

from layerprobe.analyses.experiments import RecordedTrial, Verdict
from layerprobe.analyses.selection import Selection
from layerprobe.analyses.wording.verdict import other_pair_sentence, verdict_paragraph


def recorded_paragraph(trial: RecordedTrial, selection: Selection | None) -> str:
    """Returns a recorded trial as one paragraph: that it is recorded, what it found, and how it is trained again.

    Args:
        trial: The recorded trial.
        selection: Selection that the trial stands beside; the paragraph says if its pick is another pair.
    """
    commands = " and ".join(f"`{command}`" for command in trial.commands)
    weight = trial.verdict.arm(trial.verdict.judged).weight
    sentences = [
        f"This trial was recorded: its arms were trained beforehand, at alignment weight {weight:g}, not in this run.",
        other_pair_sentence(trial.verdict, selection),
        verdict_paragraph(trial.verdict),
        f"It is trained again by {commands}.",
    ]
    return " ".join(filter(None, sentences))


def beside_recorded_sentence(verdict: Verdict, recorded: RecordedTrial) -> str:
    """Returns how a trial of the run differs from the recorded one, and what that one says about the start of a trial.

    Args:
        verdict: Verdict of the run's own trial.
        recorded: The recorded trial.
    """
    live, long = verdict.arm(verdict.judged), recorded.verdict.arm(recorded.verdict.judged)
    table = recorded.curves[recorded.curves["metric"] == recorded.verdict.metric]
    steps = sorted(int(step) for step in table["step"].unique() if step > 0)
    first, last = steps[0], steps[-1]

    def stood(step: int) -> str:
        at_step = table[table["step"] == step]
        aligned, base = (
            float(at_step[at_step["arm"] == arm]["value"].mean()) for arm in (long.name, recorded.verdict.arms[0].name)
        )
        return f"{aligned:.3g} against {base:.3g}"

    return (
        f"This trial has weight {live.weight:g} and {verdict.steps} steps, the recorded one weight {long.weight:g} and "
        f"{last} steps. That one stood at {stood(first)} at step {first} and ended at {stood(last)}, so the start of a "
        "trial does not tell its end."
    )
