"""The HTML page of a run: the picked layer pair, the verdict and the evidence, in one file that needs no network.

Everything is read from the run folder. Only `quality.csv` must exist; a section whose file is missing names the command
that writes it. The page is the template `templates/page.html`. It escapes every text, and its content policy allows no
script but its own.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shlex
from collections.abc import Callable, Iterable, Mapping
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined

from layerprobe.analyses.experiments import BASELINE, RecordedTrial, Verdict
from layerprobe.analyses.figures import (
    capital,
    cka_heatmap,
    confirmation_curves,
    knowledge_curves,
    layer_quality_curves,
    metric_panels,
    quality_heatmap,
)
from layerprobe.analyses.report.inline_svg import inline_svg
from layerprobe.analyses.report.reading import RECORDS, RunFiles, read_run
from layerprobe.analyses.selection import Selection
from layerprobe.analyses.tables import PROBE, probed_column
from layerprobe.analyses.wording import (
    TRUST,
    caution_texts,
    copy_sentences,
    objection_texts,
    other_pair_sentence,
    pair_reasons,
    recorded_paragraph,
    selection_headline,
    selection_reason,
    verdict_paragraph,
)
from layerprobe.files import write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_ITEMS, NUM_PAIRS = 40, 5


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
    write_text(path, _render(_context(run)))
    return path


def _render(context: Mapping[str, Any]) -> str:
    environment = Environment(
        loader=PackageLoader("layerprobe.analyses.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    figure_numbers = count(1)
    filters: Mapping[str, Callable[..., str | list[str]]] = {
        "capital": capital,
        "inline_svg": lambda figure: inline_svg(figure, f"figure-{next(figure_numbers)}"),
        "name_parts": _name_parts,
        "number": _number,
        "shell_quoted": shlex.quote,
    }
    environment.filters.update(filters)
    script = environment.get_template("script.js").render()
    script_sha256 = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template("page.html").render(context, script_sha256=script_sha256)


# ------------------------------------------------------------------------------------------------------------- context


def _context(run: RunFiles) -> dict[str, Any]:
    """What the template shows: numbers, texts, records and figures."""
    return {
        "run_dir": str(run.folder),
        "run_name": run.folder.resolve().name,
        "model": str((run.records["Features"] or {}).get("model", "")),
        "num_layers": run.model_rows["layer"].nunique(),
        "num_noise_levels": run.model_rows["noise_level"].nunique(),
        "has_labels": PROBE in run.headlines,
        **_quality_figures(run),
        "similarity": _similarity(run),
        "selection": run.selection and _selection(run.selection),
        "verdict": run.verdict and _verdict(run.verdict, run.selection),
        "copies": copy_sentences((run.records["Data"] or {}).get("copies", [])),
        "num_pair_samples": (run.records["Features of pairs"] or {}).get("num_samples"),
        "confirmation_started": run.confirmation is not None,
        "confirmation": _confirmation_figures(run),
        "recorded": run.recorded and _recorded(run.recorded, run.selection),
        "pictures": [(path.name, base64.b64encode(path.read_bytes()).decode()) for path in run.pictures],
        "quality": list(run.quality.itertuples(index=False)),
        "filters": _filters(run.quality),
        "records": [
            (title, file_name, None if run.records[title] is None else list(_flat(run.records[title])))
            for title, file_name in RECORDS.items()
        ],
    }


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
    pairs = [vars(pair) | {"explanation": " ".join(pair_reasons(pair, selection))} for pair in selection.ranked]
    rejected = [
        vars(pair) | {"explanation": "; ".join(objection_texts(pair, selection))} for pair in selection.rejected
    ]
    return {
        "pick": selection.pick,
        "headline": selection_headline(selection),
        "reason": selection_reason(selection),
        "trust": TRUST,
        "basis": selection.basis,
        "cautions": caution_texts(selection),
        "best_pairs": pairs[:NUM_PAIRS],
        "other_pairs": pairs[NUM_PAIRS:],
        "rejected": rejected,
    }


def _verdict(verdict: Verdict, selection: Selection | None) -> dict[str, Any]:
    other = other_pair_sentence(verdict, selection)
    sentences = [other, verdict_paragraph(verdict)]
    return vars(verdict) | {"paragraph": " ".join(filter(None, sentences)), "is_of_pick": not other}


def _confirmation_figures(run: RunFiles) -> list[tuple[str, Figure]]:
    """A figure for each metric, that of the verdict first; none before the baseline has been trained."""
    table = run.confirmation
    if table is None or BASELINE not in set(table["arm"]):
        return []
    decisive = run.verdict and run.verdict.metric
    metrics = sorted(dict.fromkeys(table["metric"].astype(str)), key=lambda metric: metric != decisive)
    return [(metric, confirmation_curves(table, run.verdict, metric=metric)) for metric in metrics]


def _recorded(trial: RecordedTrial, selection: Selection | None) -> dict[str, Any]:
    metric = trial.verdict.metric
    return {
        "paragraph": recorded_paragraph(trial, selection),
        "figures": [(f"Recorded {metric}", confirmation_curves(trial.curves, trial.verdict, metric=metric))],
    }


def _filters(quality: pd.DataFrame) -> list[tuple[str, int, list[str]]]:
    """Title, position in the table, and values of each column that rows can be filtered by."""
    columns = {"Source": "source", "Layer": "layer", "Noise level": "noise_level", "Metric": "metric", "Split": "split"}
    return [
        (title, position, list(map(_number, quality[column].unique())))
        for position, (title, column) in enumerate(columns.items())
        if column != "layer"  # the search field finds layers
    ]


# --------------------------------------------------------------------------------------------------------------- texts


def _name_parts(text: str) -> list[str]:
    """Pieces of a text between which a long layer name may wrap."""
    return re.split(r"(?<=\w\.)(?=[a-zA-Z])", text)


def _number(value: Any, digits: int = 4) -> str:
    """A number with a few significant digits, "–" for a missing one."""
    if value is None or value != value:
        return "–"
    return f"{value:.{digits}g}" if isinstance(value, int | float) else str(value)


def _flat(record: Any, key: str = "") -> Iterable[tuple[str, str]]:
    """Dotted keys and values of a JSON record as text; long lists are cut, with their length."""
    if isinstance(record, dict) and record:
        for name, value in record.items():
            yield from _flat(value, f"{key}.{name}" if key else name)
    elif isinstance(record, list) and record:
        items = [item if isinstance(item, str) else json.dumps(item) for item in record[:MAX_ITEMS]]
        yield key, ", ".join(items) + (f", … ({len(record)} items)" if len(record) > MAX_ITEMS else "")
    elif record in ({}, []):
        yield key, "none"
    else:
        yield key, record if isinstance(record, str) else json.dumps(record)
