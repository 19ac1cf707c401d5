"""The HTML page of a run: the picked layer pair, the verdict and the evidence, in one file that needs no network.

Everything is read from the run folder. Only `quality.csv` must exist; a section whose file is missing names the command
that writes it. The page is the template `templates/page.html`. It escapes every text, and its content policy allows no
script but its own.
"""

from __future__ import annotations

import base64
import hashlib
import re
import shlex
from collections.abc import Callable, Iterable, Mapping
from itertools import count
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined

from layerprobe.analyses.experiments import BASELINE, RecordedTrial, Verdict, option_texts
from layerprobe.analyses.figures import (
    capital,
    cka_heatmap,
    confirmation_curves,
    knowledge_curves,
    layer_quality_curves,
    metric_panels,
    quality_heatmap,
)
from layerprobe.analyses.report.inline_svg import Drawing, inline_svg
from layerprobe.analyses.report.reading import RECORDS, RunFiles, read_run
from layerprobe.analyses.selection import Answers, Selection, check_pick, single_answers
from layerprobe.analyses.tables import PROBE, probed_column
from layerprobe.analyses.wording import (
    MISSING,
    answer_lines,
    beside_recorded_sentence,
    copy_sentences,
    doubt_texts,
    finding_text,
    note_texts,
    objection_texts,
    other_pair_sentence,
    pair_reasons,
    precision_sentence,
    published_gain_sentences,
    recorded_paragraph,
    rounded,
    samples_sentence,
    selection_reason,
    short_answer,
    verdict_cautions,
    verdict_details,
    verdict_paragraph,
    verdict_sentence,
    weight_text,
)
from layerprobe.files import write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_ITEMS, NUM_PAIRS = 40, 5
_ROW = ("source", "layer", "metric", "split")  # what the numbers of a row of the long table share


def write_report(run_dir: Path | str) -> Path:
    """Writes `report.html` into a run folder; the same files give the same page.

    Args:
        run_dir: Run folder with at least `quality.csv`.

    Returns:
        The path of the page.

    Raises:
        FileNotFoundError: If `quality.csv` is missing.
        ValueError: If a file does not have the content that its name promises.
    """
    run = read_run(Path(run_dir))
    path = run.folder / "report.html"
    write_text(path, render("page.html", _context(run)))
    return path


def render(template: str, context: Mapping[str, Any]) -> str:
    """Returns a page.

    Args:
        template: Name of a template in `templates/`.
        context: What the template shows.
    """
    environment = Environment(
        loader=PackageLoader("layerprobe.analyses.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    figure_numbers = count(1)
    filters: Mapping[str, Callable[..., str | list[str] | Drawing]] = {
        "capital": capital,
        "fixed": lambda value: f"{value:#.3g}".rstrip("."),
        "inline_svg": lambda figure: inline_svg(figure, f"figure-{next(figure_numbers)}"),
        "name_parts": _name_parts,
        "number": _number,
        "rounded": rounded,
        "shell_quoted": shlex.quote,
    }
    environment.filters.update(filters)
    script = environment.get_template("script.js").render()
    script_sha256 = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template(template).render(context, script_sha256=script_sha256)


# ------------------------------------------------------------------------------------------------------------- context


def _context(run: RunFiles) -> dict[str, Any]:
    """What the template shows: numbers, texts, records and figures."""
    data = run.records["Data"] or {}
    return {
        "run_dir": str(run.folder),
        "run_name": run.folder.resolve().name,
        "model": str((run.records["Features"] or {}).get("model", "")),
        "num_layers": run.model_rows["layer"].nunique(),
        "num_noise_levels": run.model_rows["noise_level"].nunique(),
        "samples": samples_sentence(data),
        "precision": precision_sentence(_precision(run.records["Features"]), run.records["Precision"]),
        "has_labels": PROBE in run.headlines,
        "chip": _chip(run.selection, run.verdict, run.recorded),
        "cautions": _cautions(run.selection, run.verdict),
        **_answers(single_answers(run.quality, run.evidence, run.selection)),
        **_quality_figures(run),
        "similarity": _similarity(run),
        "selection": run.selection and _selection(run.selection),
        "trial": run.verdict and _trial(run.verdict, run.selection),
        "copies": copy_sentences(data.get("copies", [])),
        "num_pair_samples": (run.records["Features of pairs"] or {}).get("num_samples"),
        "confirmation_started": run.confirmation is not None,
        "confirmation": _confirmation_figures(run),
        "recorded": run.recorded and _recorded(run.recorded, run.selection, run.verdict),
        "pictures": [(path.name, base64.b64encode(path.read_bytes()).decode()) for path in run.pictures],
        "noise_levels": sorted(run.quality["noise_level"].unique()),
        "quality": _by_noise_level(run.quality),
        "filters": _filters(run.quality),
        "records": [
            (title, file_name, None if run.records[title] is None else list(_facts(run.records[title])))
            for title, file_name in RECORDS.items()
        ],
    }


def _precision(features: Mapping[str, Any] | None) -> str:
    return str((features or {}).get("plan", {}).get("precision", ""))


def _chip(selection: Selection | None, verdict: Verdict | None, recorded: RecordedTrial | None) -> dict[str, str]:
    """The state of the run: the text of the chip, its kind, and one sentence."""
    if selection is None:
        return {"kind": "open", "text": "No pick yet", "sentence": "No layer pair has been picked yet."}
    if selection.pick is None:
        return {"kind": "open", "text": "No pick", "sentence": selection_reason(selection)}
    if verdict is None:
        student, teacher = selection.pick.student, selection.pick.teacher
        sentence = f"{student} should learn from {teacher}: a hypothesis from measurements, until a training tries it."
        text = "Not tried yet" if recorded is None else f"Recorded trial: {recorded.verdict.answer}"
        return {"kind": "open", "text": text, "sentence": sentence}
    if other := other_pair_sentence(verdict, selection):
        return {"kind": "open", "text": f"Verdict on another pair: {short_answer(verdict)}", "sentence": other}
    kind = verdict.answer if verdict.answer in ("helps", "hurts") else "open"
    return {"kind": kind, "text": capital(short_answer(verdict)), "sentence": verdict_sentence(verdict)}


def _cautions(selection: Selection | None, verdict: Verdict | None) -> list[tuple[str, str]]:
    """Code, where it has one, and text of each reason to doubt the pick or the verdict on it."""
    if selection is None or selection.pick is None:
        return []
    cautions = [("", text) for text in doubt_texts(selection)]
    cautions += [(finding.code, finding_text(finding, selection.basis.layers)) for finding in check_pick(selection)]
    if verdict is not None and not other_pair_sentence(verdict, selection):
        told = verdict_sentence(verdict)
        cautions += [("", text) for text in verdict_cautions(verdict) if text not in told]
    return cautions


def _answers(answers: Answers) -> dict[str, Any]:
    """The richest layer, where training adds most, and the other single answers in words."""
    lines, richest, gain = list(answer_lines(answers)), None, None
    if answers.features:
        tested = answers.features.over_control
        best = tested.cell if tested else answers.features.best
        richest = {
            "layer": best.layer,
            "level": _number(best.noise_level),
            "metric": answers.features.metric,
            "value": rounded(best.value, best.low, best.high),
        }
    if answers.training:
        lines.pop(1)  # it leads the page
        there, control, over = answers.training.cell, answers.training.control_cell, answers.training.gain
        gain = {
            "metric": PROBE,
            "value": rounded(over.value, over.low, over.high, signed=True),
            "is_certain": answers.training.is_certain,
            "layer": there.layer,
            "level": _number(there.noise_level),
            "accuracy": rounded(there.value, there.low, there.high),
            "control": answers.training.control,
            "control_accuracy": rounded(control.value, control.low, control.high),
        }
    return {"answers": lines, "richest": richest, "gain": gain}


def _quality_figures(run: RunFiles) -> dict[str, Any]:
    metrics = run.headlines
    others = [metric for metric in run.metrics if metric not in metrics]
    return {
        "knowledge": knowledge_curves(run.quality) if any(map(probed_column, metrics)) else None,
        "curves": [(name, layer_quality_curves(run.quality, name, selection=run.selection)) for name in metrics],
        "more_measures": metric_panels(run.quality, others, selection=run.selection) if others else None,
        "heatmaps": [(name, quality_heatmap(run.quality, name)) for name in metrics],
    }


def _similarity(run: RunFiles) -> Figure | None:
    if run.similarity is None:
        return None
    layers = list(dict.fromkeys(run.model_rows.sort_values("layer_index", kind="stable")["layer"]))
    return cka_heatmap(run.similarity, selection=run.selection, layers=layers)


def _selection(selection: Selection) -> dict[str, Any]:
    rejected = [
        vars(pair) | {"explanation": "; ".join(objection_texts(pair, selection))} for pair in selection.rejected
    ]
    return {
        "pick": selection.pick,
        "weight": weight_text(selection),
        "reason": " ".join(pair_reasons(selection.ranked[0], selection)) if selection.ranked else "",
        "basis": selection.basis,
        "notes": note_texts(selection),
        "best_pairs": selection.ranked[:NUM_PAIRS],
        "other_pairs": selection.ranked[NUM_PAIRS:],
        "rejected": rejected,
    }


def _trial(verdict: Verdict, selection: Selection | None) -> dict[str, Any]:
    judged, other = verdict.arm(verdict.judged), other_pair_sentence(verdict, selection)
    published = published_gain_sentences(verdict.end_step, verdict.resolution) if verdict.resolution else []
    return vars(verdict) | {
        "published": " ".join(published),
        "options": {arm.name: ", ".join(option_texts(arm.options)) for arm in verdict.arms},
        "is_of_pick": not other,
        "value": rounded(judged.difference, judged.low, judged.high, signed=True),
        "weight": _number(judged.weight),
        "baseline": _number(fmean(verdict.arms[0].final), 3),
        # The head of the page tells the answer and the cautions of a verdict on the pick.
        "sentences": [other, verdict_paragraph(verdict)] if other else verdict_details(verdict),
    }


def _confirmation_figures(run: RunFiles) -> list[tuple[str, Figure]]:
    """A figure for each metric, that of the verdict first; none before the baseline has been trained."""
    table = run.confirmation
    if table is None or BASELINE not in set(table["arm"]):
        return []
    decisive = run.verdict and run.verdict.metric
    metrics = sorted(dict.fromkeys(table["metric"].astype(str)), key=lambda metric: metric != decisive)
    return [(metric, confirmation_curves(table, run.verdict, metric=metric)) for metric in metrics]


def _recorded(trial: RecordedTrial, selection: Selection | None, verdict: Verdict | None) -> dict[str, Any]:
    metric = trial.verdict.metric
    return {
        "paragraph": recorded_paragraph(trial, selection),
        "beside": "" if verdict is None else beside_recorded_sentence(verdict, trial),
        "figures": [(f"Recorded {metric}", confirmation_curves(trial.curves, trial.verdict, metric=metric))],
    }


def _filters(quality: pd.DataFrame) -> list[tuple[str, int, list[str]]]:
    """Title, position in the table, and values of each column that rows can be filtered by."""
    return [
        (column.capitalize(), position, list(map(str, quality[column].unique())))
        for position, column in enumerate(_ROW)
        if column != "layer"  # the search field finds layers
    ]


def _by_noise_level(quality: pd.DataFrame) -> list[dict[str, Any]]:
    """The numbers of each source, layer, metric and split as one row: its cells by noise level, and its notes."""
    rows: dict[tuple[str, ...], dict[str, Any]] = {}
    for cell in quality.itertuples(index=False):
        names = {column: getattr(cell, column) for column in _ROW}
        row = rows.setdefault(tuple(names.values()), names | {"cells": {}, "notes": {}})
        row["cells"][cell.noise_level] = cell
        row["notes"][cell.note] = None
    return list(rows.values())


# --------------------------------------------------------------------------------------------------------------- texts


def _name_parts(text: str) -> list[str]:
    """Pieces of a text between which a long layer name may wrap."""
    return re.split(r"(?<=\w\.)(?=[a-zA-Z])", text)


def _number(value: Any, digits: int = 4) -> str:
    """A number with a few significant digits, "–" for a missing one."""
    if value is None or value != value:
        return MISSING
    return f"{value:.{digits}g}" if isinstance(value, int | float) else str(value)


def _facts(record: Any, key: str = "") -> Iterable[tuple[str, str]]:
    """Keys and values of a JSON record as text; long lists are cut, and lists of records counted."""
    if isinstance(record, dict) and record:
        for name, value in record.items():
            words = name.replace("_", " ")
            yield from _facts(value, f"{key}: {words}" if key else words)
    elif isinstance(record, list) and any(isinstance(item, list | dict) for item in record):
        yield key, f"{len(record)} entries in the file"
    elif isinstance(record, list) and record:
        items = [_fact(item) for item in record[:MAX_ITEMS]]
        yield key, ", ".join(items) + (f", … ({len(record)} items)" if len(record) > MAX_ITEMS else "")
    else:
        yield key, "none" if record in ({}, []) else _fact(record)


def _fact(value: Any) -> str:
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else _number(value, 6)
