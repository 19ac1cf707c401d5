"""`layerprobe confirm` says what it would do, and what that can tell, before it does it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from layerprobe.analyses.experiments.arms import ConfirmationPlan
from layerprobe.analyses.experiments.power import detectable, look_levels
from layerprobe.analyses.runs import confirm
from layerprobe.analyses.runs.confirm import confirmation_training
from layerprobe.analyses.selection.records import RankedPair, Selection, SelectionBasis
from layerprobe.checkpoints.opening import training_record
from layerprobe.data import DataSource
from layerprobe.layersync.options import SyncOptions

LAYERS = tuple(f"blocks.{i}" for i in range(8))


def ranked(student: int, teacher: int) -> RankedPair:
    return RankedPair(
        student=LAYERS[student],
        teacher=LAYERS[teacher],
        score=1.0,
        score_low=0.5,
        score_high=1.5,
        parts=(),
        teacher_quality=0.9,
        student_quality=0.6,
        gap=0.3,
        gap_is_certain=True,
        mean_cka=0.5,
        distance=teacher - student,
        teacher_is_best=True,
        ties_with_first=False,
    )


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of the embedded model as far as `confirm` reads it before it trains."""
    run = tmp_path / "run"
    run.mkdir()
    plan = {"checkpoint": {"path": "digits"}, "data": {"source": "digits"}, "extraction": {"noise_levels": [0.3]}}
    (run / "plan.json").write_text(json.dumps(plan))
    basis = SelectionBasis(
        metric="probe accuracy",
        split="validation",
        noise_levels=(0.3,),
        layers=LAYERS,
        tail=(),
        head=(),
        late=(),
        min_distance=2,
        max_cka=0.98,
        min_gap=0.05,
        weights=(),
    )
    pairs = (ranked(1, 5), ranked(1, 4))
    selection = Selection(basis, label_free=False, ranked=pairs, rejected=(), layers=(), cautions=())
    (run / "selection.json").write_text(selection.to_json())
    return run


def scores(folder: Path, **final: tuple[float, ...]) -> None:
    """What arms that are finished leave behind, by seed."""
    for arm, values in final.items():
        for seed, value in enumerate(values):
            place = folder / f"seed-{seed}" / f"{arm.replace('_', '-')}.json"
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(json.dumps({step: {"Frechet distance": value} for step in (0, 90)}))


def test_a_dry_run_tells_arms_and_resolution(folder: Path, cli) -> None:
    code, out, _ = cli("confirm", folder, "--dry-run", "--json")
    record = json.loads(out)
    assert code == 0
    assert record["arms"] == [
        "baseline",
        "pick and published prior (blocks.1 <- blocks.5)",
        "same distance (blocks.3 <- blocks.7)",
        "negative control (blocks.6 <- blocks.7)",
    ]
    assert (record["seconds"], record["total_s"]) == ({"training": 280, "scoring": 20}, 300)
    assert record["resolution"]["difference_in_spreads"] == pytest.approx(detectable(3))
    assert record["resolution"]["difference"] is None
    assert (record["start"], len(record["cautions"])) == (["branch", "convergence not known"], 3)
    assert "costs at first" in record["cautions"][-1]
    arms = "none,pick,prior,random:2,learning-rate,sra,pick+noise-gap:0.1"
    code, out, _ = cli("confirm", folder, "--dry-run", "--arms", arms, "--spread", "0.05")
    assert code == 0
    assert "learning rate (baseline with steps as long as with blocks.1 <- blocks.5)" in out
    assert "SRA (blocks.1 <- blocks.5, projector width 128, teacher decay 0.99, noise gap 0.2)" in out
    assert "pick with noise gap 0.1 (blocks.1 <- blocks.5, noise gap 0.1)" in out
    assert out.count("random pair") == 2
    assert "7 arms x 3 seeds x 1000 steps, with 4 evaluations of 1000 samples each, take about 5 min on this" in out
    assert "branch from a checkpoint trained for 6000 steps; --from-scratch starts them from fresh weights." in out
    assert "With a spread of 5.0% of the distance (as stated), that is 16.3% of the distance." in out
    assert "These arms end at step 7000, long before the first of them, where nothing is published." in out
    assert "A third of 40% is 13% of the distance: with this spread" in out
    assert "training           5 min" in out
    assert not (folder / "confirmation").exists()


def test_arms_that_a_small_network_cannot_have_are_told(folder: Path, cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(confirm, "alignable_layers", lambda backbone: LAYERS[1:6:2])
    code, out, _ = cli("confirm", folder, "--dry-run", "--from-scratch")
    assert code == 0
    assert "There is no random pair of the same distance: 3 layers have no other pair of it." in out.splitlines()
    assert "branch from" not in out
    assert "There is no negative control" not in out
    monkeypatch.setattr(confirm, "alignable_layers", lambda backbone: LAYERS[1:6:4])
    code, out, _ = cli("confirm", folder, "--dry-run", "--from-scratch")
    assert code == 0
    assert "There is no negative control: the last two layers are the pair of another arm" in out


def test_the_recorded_losses_of_the_checkpoint_tell_whether_it_is_converged(tmp_path: Path) -> None:
    checkpoint = tmp_path / "model.safetensors"
    checkpoint.touch()
    (tmp_path / "held_out.csv").write_text("step,noise level 0.1\n0,2\n70,1\n100,0.995\n")
    assert confirm._recorded_fall(checkpoint) is None  # a table of something else
    (tmp_path / "training.json").touch()
    assert confirm._recorded_fall(checkpoint) == pytest.approx(0.005)
    assert confirm._recorded_fall(Path("digits")) is None


def test_other_options_than_begun_with_are_refused_before_the_data_are_read(
    folder: Path, cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DataSource, "training_splits", lambda *_, **__: pytest.fail("the data were read"))
    plan = ConfirmationPlan(confirmation_training(folder, steps=1000)).identity()
    (folder / "confirmation").mkdir()
    record = {"plan": plan, "start": "from the checkpoint", "data": "x", "extractor": None}
    (folder / "confirmation" / "confirmation.json").write_text(json.dumps(record))
    for dry in ([], ["--dry-run"]):
        code, _, err = cli("confirm", folder, "--weight", "0.5", "--from-scratch", *dry)
        assert code == 2
        assert "holds a confirmation of other options (different: plan." in err
        assert "plan.training.weight" in err


def test_arms_may_be_aligned_for_a_part_of_the_steps(folder: Path, cli) -> None:
    code, out, _ = cli("confirm", folder, "--dry-run", "--json", "--sync-stop-step", "500")
    assert (code, json.loads(out)["sync_stop_step"]) == (0, 500)
    training = confirmation_training(folder, steps=1000, sync=SyncOptions(stop_step=500))
    assert training.sync == SyncOptions(stop_step=500)


def test_from_scratch_the_learning_rate_warms_up_as_the_checkpoint_s_did(folder: Path) -> None:
    trained = training_record("digits")
    assert confirmation_training(folder, steps=5000, from_scratch=True).warmup_steps == trained["warmup_steps"] > 0
    # A branch begins with an empty optimizer, whatever its checkpoint did.
    assert confirmation_training(folder, steps=5000).warmup_steps == 500 != trained["warmup_steps"]
    assert confirmation_training(folder, steps=5000, from_scratch=True, warmup_steps=7).warmup_steps == 7


def test_only_arms_from_scratch_stand_for_the_whole_training(folder: Path, cli) -> None:
    trained = training_record("digits")["steps"]
    steps = ("--steps", trained - 1)
    _, out, _ = cli("confirm", folder, "--dry-run", "--json", "--from-scratch", *steps)
    assert f"trained for {trained} steps" in json.loads(out)["cautions"][-1]
    _, out, _ = cli("confirm", folder, "--dry-run", "--json", *steps)
    assert not any("costs at first" in line or "Train as many" in line for line in json.loads(out)["cautions"])


def test_early_stops_are_reckoned_with(folder: Path, cli) -> None:
    code, out, _ = cli("confirm", folder, "--dry-run", "--json", "--stop-early", "--num-seeds", "8")
    assert code == 0
    assert json.loads(out)["resolution"]["level"] == look_levels(8)[8]


def test_the_spread_is_that_of_the_runs_that_are_there(folder: Path, cli) -> None:
    ends = {"baseline": (2.0, 2.2), "pick": (1.8, 1.9), "negative_control": (9.0, 1.0)}
    scores(folder / "confirmation", **ends)
    code, out, _ = cli("confirm", folder, "--dry-run", "--json")
    own = json.loads(out)["resolution"]
    assert code == 0
    # Differences of -0.2 and -0.3; the negative control does not count.
    assert own["spread"] == pytest.approx(0.1 / 2**0.5 / 2.1)
    assert own["spread_from"] == "2 seeds of this confirmation, after 90 steps"
    shutil.move(folder / "confirmation", folder.parent / "pilot" / "confirmation")
    code, out, _ = cli("confirm", folder, "--dry-run", "--json", "--pilot", folder.parent / "pilot")
    source = {"spread_source": "pilot", "spread_from": "2 seeds of the pilot, after 90 steps"}
    assert json.loads(out)["resolution"] == own | source
    code, out, _ = cli("confirm", folder, "--dry-run", "--json", "--pilot", folder.parent / "pilot" / "confirmation")
    assert json.loads(out)["resolution"]["spread"] == own["spread"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--arms none,best", "unknown arm 'best'; pass some of none, pick"),
        ("--arms pick", "the arms pick lack none"),
        ("--stop-early", "stopping early needs 4 to 50 seeds (the first look is after 3), got 3"),
        ("--spread 0.1 --pilot .", "both a spread and a pilot are given; pass one of them"),
        ("--sync-decay linear", "a linear decay ends at the stop step; pass --sync-stop-step"),
        ("--spread -1", "a spread must be positive, got -1.0; pass 0.05 for 5 % of the distance"),
        ("--pilot nowhere", "nowhere holds no two seeds whose differences vary; pass a confirmed run or a pair sweep"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_made(folder: Path, cli, options: str, message: str) -> None:
    for dry in ([], ["--dry-run"]):
        code, out, err = cli("confirm", folder, *options.split(), *dry)
        assert (code, out) == (2, "")
        assert message in err
        assert err.count("\n") == 1
    assert not (folder / "confirmation").exists()
