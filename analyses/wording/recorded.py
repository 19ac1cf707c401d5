"""A recorded trial in words."""

from __future__ import annotations

from layerprobe.analyses.experiments import RecordedTrial
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
