"""Recommendations in words."""

from __future__ import annotations

from dataclasses import replace

from layerprobe.analyses.selection.recommendations import Candidate, Recommendation
from layerprobe.analyses.wording.recommendations import recommendation_text

BEST, TIED = Candidate("blocks.2", 0.1, 0.9, 0.89, 0.91), Candidate("blocks.2", 0.5, 0.895, 0.88, 0.9)


def test_features() -> None:
    answer = Recommendation("features", "probe accuracy", (BEST, TIED), test_value=0.8)
    assert recommendation_text(answer) == (
        "The richest features are those of blocks.2 at noise level 0.1: probe accuracy 0.900 (0.890 to 0.910), 0.800 "
        "on the test split, which nothing was chosen on; the data cannot tell blocks.2 at 0.5 from it."
    )
    at_end = recommendation_text(replace(answer, level_end="highest"))
    assert at_end.endswith(" It is the highest level that was measured; at a higher one they may be richer.")
    known = replace(answer, controls=(("majority class", 0.1), ("raw input", 0.895)))
    assert recommendation_text(known).endswith(" They are not surely above the control raw input 0.895.")
    many = replace(answer, candidates=(BEST, *[TIED] * 5), test_value=None)
    assert "tell blocks.2 at 0.5, blocks.2 at 0.5, blocks.2 at 0.5 and 2 more from it" in recommendation_text(many)
    nothing = Recommendation("features", "noise-LiDAR", ())
    assert recommendation_text(nothing) == "No features can be recommended: the run has no noise-LiDAR."


def test_encoder() -> None:
    answer = Recommendation("encoder", "", (), by_depth="blocks.1", encoder_similarity=(("CKA with dinov2", 0.3),))
    assert recommendation_text(answer) == (
        "To align with an external encoder: blocks.1, at about 0.3 of the depth, where REPA aligns. Its mean CKA with "
        "dinov2 is 0.300."
    )
    assert recommendation_text(Recommendation("encoder", "", ())) == "There are fewer than two layers."


def test_prune() -> None:
    needed, free = Candidate("a", None, 0.2, 0.1, 0.3), Candidate("b", None, -0.2, -0.3, -0.1)
    assert recommendation_text(Recommendation("prune", "loss increase", (free, needed))) == (
        "The network does as well without b, each alone; without b the loss rises by -0.2000 (-0.3000 to -0.1000)."
    )
    assert recommendation_text(Recommendation("prune", "loss increase", (needed,))) == (
        "No layer can be left out; the least needed one is a: without it the loss rises by 0.2000 (0.1000 to 0.3000)."
    )
    assert recommendation_text(Recommendation("prune", "loss increase", ())).startswith("What skipping a layer costs")
