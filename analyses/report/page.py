"""One page that answers the question of a run, with the evidence: a single HTML file that asks the network for nothing.

Everything is read from the run folder. Only `quality.csv` must be there; a section whose file is missing says which
command writes it. Whatever comes from a file is escaped, and the page allows itself no script but its own.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any, TypeVar

import pandas as pd

from layerprobe.analyses.figures import (
    BACKGROUND,
    CONFIRMATION_COLUMNS,
    INK,
    capital,
    cka_heatmap,
    confirmation_curves,
    knowledge_curves,
    layer_quality_curves,
    metric_panels,
    quality_heatmap,
    to_svg,
)
from layerprobe.analyses.selection import HYPOTHESIS, Selection
from layerprobe.analyses.tables import MODEL, PROBE, headlines, probed_column, read_quality, read_similarity
from layerprobe.files import write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Record = Mapping[str, Any]
T = TypeVar("T")

BASELINE = "no alignment"
RECORDS = {
    "Features": "features/model/manifest.json",
    "Plan": "plan.json",
    "Convention check": "convention.json",
    "Environment": "environment.json",
}
MAX_ITEMS, NUM_PAIRS = 40, 5

HOW_TO_READ = (
    ("Noise level", "0 is a clean sample and 1 pure noise; equal levels mean equal signal-to-noise ratios."),
    ("Layer", "Named as in the model and counted from 0, in execution order."),
    (
        "Split",
        "Probes are fitted on “train”; penalties, layers and pairs are chosen on “validation”; accuracies are shown "
        "on “test”, which decided nothing.",
    ),
    (
        "Probe and kNN accuracy",
        "The share of samples whose class a linear classifier, or a vote of near neighbors, reads from a layer. Bands "
        "are 95 % bootstrap intervals over samples: layers whose bands overlap widely are not known to differ.",
    ),
    (
        "Controls",
        "The same network with random weights, and the raw noisy input without a network. What a layer has learned is "
        "its distance to the higher of the two.",
    ),
    (
        "Label columns",
        "“Probe accuracy” alone is of the class that a model is conditioned on, “probe accuracy of …” of a further "
        "column. Samples without a label in it, or of a class that the training split has not, are left out; the note of "
        "each number counts them.",
    ),
    ("Effective rank", "How many directions a layer's features use. It needs no labels; more is not always better."),
    (
        "More measures",
        "Ranks and exponents say in how many directions a layer varies, contrasts how its tokens differ by place, "
        "“when skipped” what the model loses without it. No one of them alone says which layer is best.",
    ),
    ("CKA", "How similar two layers are: 1 is equal up to rotation and scale, about 0 is unrelated."),
    (
        "Pick and verdict",
        "The richest layer is not always the best teacher. The pick is a hypothesis from measurements of one model; "
        "the verdict comes from training with the pick and without, seed by seed.",
    ),
)


@dataclass(frozen=True)
class _Run:
    """What a run folder holds; None for what has not been made."""

    folder: Path
    quality: pd.DataFrame
    similarity: pd.DataFrame | None
    selection: Selection | None
    verdict: Record | None
    confirmation: pd.DataFrame | None
    records: Mapping[str, Record]  # by title
    pictures: tuple[Path, ...]

    @property
    def metrics(self) -> list[str]:
        """Metrics of the model, the most telling first."""
        known = self.quality.loc[self.quality["source"] == MODEL, "metric"].unique()
        first = headlines(known)
        return first + [m for m in known if m not in first]

    @property
    def headlines(self) -> list[str]:
        """The metrics that are shown in detail."""
        return headlines(self.metrics) or self.metrics[:1]

    def not_run(self, command: str, what: str = "Not run") -> str:
        """Says which command makes what is missing; RUN in it stands for the folder."""
        line = f"layerprobe {command}".replace("RUN", shlex.quote(str(self.folder)))
        return _missing(f"{what}: <code>{escape(line)}</code>")


def write_report(run_dir: Path | str) -> Path:
    """Writes `report.html` into a run folder; the same files give the same page.

    Args:
        run_dir: A run folder with at least `quality.csv`.

    Returns:
        The path of the page.

    Raises:
        FileNotFoundError: If there is no `quality.csv`.
        ValueError: If a file is not what its name says.
    """
    run = _read_run(Path(run_dir))
    path = run.folder / "report.html"
    write_text(path, _page(run))
    return path


# ------------------------------------------------------------------------------------------------------------- reading


def _read_run(folder: Path) -> _Run:
    quality = _read(folder / "quality.csv", read_quality)
    if quality is None:
        raise FileNotFoundError(f"{folder} holds no quality.csv; run `layerprobe probe` first")
    records = {title: _read(folder / name, _json) for title, name in RECORDS.items()}
    return _Run(
        folder=folder,
        quality=quality,
        similarity=_read(folder / "similarity.csv", read_similarity),
        selection=_read(folder / "selection.json", lambda path: Selection.from_json(path.read_text(encoding="utf-8"))),
        verdict=_read(folder / "verdict.json", _json),
        confirmation=_read(folder / "confirmation.csv", _curves_of_arms),
        records={title: record for title, record in records.items() if record is not None},
        pictures=tuple(sorted((folder / "figures").glob("samples*.png"))),
    )


def _read(path: Path, reader: Callable[[Path], T]) -> T | None:
    """What the reader makes of a file, None if there is no file."""
    if not path.is_file():
        return None
    try:
        return reader(path)
    except ValueError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"{path} cannot be read: {reason}; delete it or run the command that wrote it again"
        ) from error


def _curves_of_arms(path: Path) -> pd.DataFrame:
    table = pd.read_csv(path)
    missing = [column for column in CONFIRMATION_COLUMNS if column not in table.columns]
    if missing:
        raise ValueError(f"it has no column {missing[0]!r}")
    return table


def _json(path: Path) -> Record:
    record = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(record, dict):
        raise ValueError(f"it holds {type(record).__name__}, not an object")
    return record


# ---------------------------------------------------------------------------------------------------------------- page


def _page(run: _Run) -> str:
    sections = [
        ("curves", "What each layer knows", _curves(run)),
        ("heatmap", "Layers and noise levels at a glance", _heatmaps(run)),
        ("similarity", "How similar the layers are", _similarity(run)),
        ("pairs", "Ranked pairs", _pairs(run)),
        ("confirmation", "Confirmation by training", _confirmation(run)),
        ("samples", "Samples", _samples(run)),
        ("numbers", "All numbers", _numbers(run)),
        ("run", "What was run", _what_was_run(run)),
        ("reading", "How to read this page", _how_to_read()),
    ]
    own = files("layerprobe.analyses.report")
    script = own.joinpath("script.js").read_text(encoding="utf-8")
    return Template(own.joinpath("template.html").read_text(encoding="utf-8")).substitute(
        title=escape(f"layerprobe: {run.folder.resolve().name}"),
        script_hash=f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}",
        script=script,
        subtitle=_subtitle(run),
        answer=_answer(run),
        contents="".join(f'<li><a href="#{name}">{escape(title)}</a></li>' for name, title, _ in sections),
        sections="\n".join(
            f'<section id="{name}">\n<h2>{escape(t)}</h2>\n{body}\n</section>' for name, t, body in sections
        ),
        footer=f"Written by layerprobe from {escape(str(run.folder))}.",
    )


def _subtitle(run: _Run) -> str:
    model = run.quality[run.quality["source"] == MODEL]
    facts = [str(run.records.get("Features", {}).get("model", "")), run.folder.resolve().name]
    counts = f"{model['layer'].nunique()} layers at {model['noise_level'].nunique()} noise levels"
    return " · ".join(escape(fact) for fact in [*facts, counts] if fact)


def _answer(run: _Run) -> str:
    """The page in one paragraph: pick, why, verdict."""
    answer = str((run.verdict or {}).get("answer", ""))
    badge = f"Verdict: {escape(answer)}" if answer else "Not confirmed yet"
    if run.selection is None:
        badge, text = "No pick yet", "No layer pair has been picked yet."
    elif run.selection.pick is None:
        badge, text = "No pick", escape(run.selection.reason)
    else:
        pick = run.selection.pick
        text = (
            f"<strong>{_name(pick.student)} should learn from {_name(pick.teacher)}.</strong> "
            f"{escape(run.selection.reason)}"
        )
    if run.verdict is not None:
        text += f" {escape(str(run.verdict.get('paragraph', '')))}"
    elif run.selection is not None and run.selection.pick is not None:
        text += f" {escape(HYPOTHESIS)}"
    kind = answer if answer in ("helps", "hurts") else "open"
    return f'<div class="answer {kind}"><span class="badge">{badge}</span><p>{text}</p></div>'


# ------------------------------------------------------------------------------------------------------------ sections


def _curves(run: _Run) -> str:
    shown = run.headlines
    together = _figure(knowledge_curves(run.quality), "knowledge") if any(map(probed_column, shown)) else ""
    first, *others = (
        _figure(layer_quality_curves(run.quality, metric, selection=run.selection), f"{metric}-curves")
        for metric in shown
    )
    note = "" if PROBE in shown else "<p>The data has no labels, so there is no probe and no kNN accuracy.</p>"
    details = "".join(_details(m, f) for m, f in zip(shown[1:], others, strict=True))
    if more := [metric for metric in run.metrics if metric not in shown]:
        panels = metric_panels(run.quality, more, selection=run.selection)
        details += _details("More measures", _figure(panels, "more-measures"))
    return note + together + first + details


def _heatmaps(run: _Run) -> str:
    shown = run.headlines
    first, *others = (_figure(quality_heatmap(run.quality, metric), f"{metric}-heatmap") for metric in shown)
    return first + "".join(_details(m, f) for m, f in zip(shown[1:], others, strict=True))


def _similarity(run: _Run) -> str:
    if run.similarity is None:
        return _missing("The run folder has no <code>similarity.csv</code>; <code>layerprobe probe</code> writes it.")
    model = run.quality[run.quality["source"] == MODEL].sort_values("layer_index", kind="stable")
    layers = list(dict.fromkeys(model["layer"]))
    return _figure(cka_heatmap(run.similarity, selection=run.selection, layers=layers), "similarity")


def _pairs(run: _Run) -> str:
    if run.selection is None:
        return run.not_run("select RUN")
    selection, criteria = run.selection, run.selection.criteria
    levels = ", ".join(f"{level:g}" for level in criteria.noise_levels)
    weighed = ", ".join(f"{escape(name)} ({weight:+g})" for name, weight in criteria.weights)
    score = (
        f"Score: ranks among all pairs, weighed: {weighed}."
        if weighed
        else ("Score = (teacher − student) × (1 − CKA), pairs whose teacher is the best one first.")
    )
    parts = [
        f"<p>Quality is {escape(criteria.metric)} on the split “{escape(criteria.split)}”, averaged over noise levels "
        f"{levels}. {score} A pair needs a distance of at least {criteria.min_distance} layers and a CKA of at most "
        f"{criteria.max_cka:g}.</p>"
    ]
    if selection.warnings:
        parts.append(_list(selection.warnings))
    if not selection.ranked:
        parts.append(_missing(escape(selection.reason)))
    shown, rest = selection.ranked[:NUM_PAIRS], selection.ranked[NUM_PAIRS:]
    if shown:
        parts.append(_pair_table(shown, 1))
    if rest:
        parts.append(_details(f"{len(rest)} more admissible pairs", _pair_table(rest, NUM_PAIRS + 1)))
    if selection.rejected:
        rows = [(_name(p.student), _name(p.teacher), escape("; ".join(p.reasons))) for p in selection.rejected]
        table = _table(("Student", "Teacher", "Why not"), rows)
        parts.append(_details(f"{len(rows)} refused pairs", table))
    return "".join(parts)


def _pair_table(pairs: Iterable[Any], first: int) -> str:
    heads = ("#Rank", "Student", "Teacher", "#Score", "#Teacher has", "#Student has", "#CKA", "#Distance", "Why")
    rows = [
        (
            str(rank) + (" (tied)" if pair.ties_with_first and rank > 1 else ""),
            _name(pair.student),
            _name(pair.teacher),
            f"{pair.score:.3g}",
            f"{pair.teacher_quality:.3g}",
            f"{pair.student_quality:.3g}",
            f"{pair.mean_cka:.3g}",
            str(pair.distance),
            _breakable(" ".join(pair.reasons)),
        )
        for rank, pair in enumerate(pairs, first)
    ]
    return _table(heads, rows, mark_first=first == 1)


def _confirmation(run: _Run) -> str:
    parts = []
    if run.verdict is None:
        parts.append(run.not_run("confirm RUN", "Not run" if run.confirmation is None else "Not finished"))
    else:
        parts.append(f"<p>{escape(str(run.verdict.get('paragraph', '')))}</p>")
    if run.confirmation is not None and BASELINE in set(run.confirmation["arm"]):
        first, *others = _confirmation_figures(run.confirmation, run.verdict)
        parts.append(first[1])
        parts.extend(_details(metric, figure) for metric, figure in others)
    if run.verdict is not None:
        parts.append(_arm_table(run.verdict))
    return "".join(parts)


def _confirmation_figures(confirmation: pd.DataFrame, verdict: Record | None) -> list[tuple[str, str]]:
    metrics = list(dict.fromkeys(confirmation["metric"].astype(str)))
    metrics.sort(key=lambda metric: metric != (verdict or {}).get("metric"))  # stable: the verdict's comes first
    return [
        (
            metric,
            _figure(confirmation_curves(confirmation, verdict, metric=metric), f"confirmation-{metric}"),
        )
        for metric in metrics
    ]


def _arm_table(verdict: Record) -> str:
    metric, arms = str(verdict.get("metric", "metric")), verdict.get("arms", ())
    final = f"#Final {metric}, by seed"
    heads = ("Arm", "Student", "Teacher", "#Weight", final, "#Difference", "#95 % interval", "#Steps to baseline")
    rows = [
        (
            escape(str(arm["name"])),
            _name(arm.get("student") or "–"),
            _name(arm.get("teacher") or "–"),
            _number(arm.get("weight")),
            ", ".join(map(_number, arm.get("final", ()))),
            _number(arm.get("difference")),
            "–" if arm.get("low") is None else f"{_number(arm['low'])} to {_number(arm.get('high'))}",
            ", ".join("never" if step is None else f"{step:,.0f}" for step in arm.get("steps_to_baseline", ())),
        )
        for arm in arms
    ]
    better = "lower" if verdict.get("lower_is_better", True) else "higher"
    extractor = escape(str(verdict.get("extractor", "an extractor")))
    note = (
        f"{escape(metric)} ({better} is better) in the features of {extractor}; differences are to no alignment with "
        "the same seed; steps to baseline: when an arm reaches what no alignment ends with."
    )
    return _table(heads, rows) + f'<p class="soft">{note}</p>'


def _samples(run: _Run) -> str:
    if not run.pictures:
        return run.not_run("sample CHECKPOINT --out RUN/figures")
    return "".join(
        f'<figure class="samples"><img alt="{escape(path.stem)}" src="data:image/png;base64,'
        f'{base64.b64encode(path.read_bytes()).decode()}"><figcaption>{escape(path.name)}</figcaption></figure>'
        for path in run.pictures
    )


def _numbers(run: _Run) -> str:
    heads = ("Source", "Layer", "#Noise level", "Metric", "Split", "#Value", "#Low", "#High", "Note")
    columns = ("source", "layer", "noise_level", "metric", "split", "value", "low", "high", "note")
    numeric = ("noise_level", "value", "low", "high")
    rows = [
        [_number(cell) if column in numeric else escape(str(cell)) for column, cell in zip(columns, row, strict=True)]
        for row in run.quality[list(columns)].itertuples(index=False)
    ]
    choices = "".join(
        f'<label>{heads[i].strip("#")}<select data-column="{i}"><option value="">all</option>'
        + "".join(f"<option>{value}</option>" for value in dict.fromkeys(row[i] for row in rows))
        + "</select></label>"
        for i in (0, 2, 3, 4)
    )
    search = '<label>Any column contains<input type="search"></label><output></output>'
    filters = f'<div class="filters" data-for="quality" hidden>{choices}{search}</div>'
    return filters + _table(heads, rows, name="quality")


def _what_was_run(run: _Run) -> str:
    parts = []
    for title, name in RECORDS.items():
        parts.append(f"<h3>{escape(title)} <code>{escape(name)}</code></h3>")
        record = run.records.get(title)
        if record is None:
            parts.append(_missing(f"The run folder has no <code>{escape(name)}</code>."))
            continue
        rows = "".join(f"<tr><th>{escape(k)}</th><td>{escape(v)}</td></tr>" for k, v in _flat(record))
        parts.append(f'<div class="scroll"><table class="facts"><tbody>{rows}</tbody></table></div>')
    return "".join(parts)


def _how_to_read() -> str:
    rows = "".join(f"<dt><strong>{escape(word)}</strong></dt><dd>{escape(text)}</dd>" for word, text in HOW_TO_READ)
    return f"<dl>{rows}</dl>"


# -------------------------------------------------------------------------------------------------------------- pieces


def _figure(figure: Figure, name: str) -> str:
    """A figure as inline SVG in the colors of the page."""
    title = " ".join(figure.get_suptitle().split())
    svg = to_svg(figure)
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(
        r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', rf'<svg \1 role="img" aria-label="{_literal(title)}">', svg, count=1
    )
    # Ids are unique in a page, and figures number theirs alike.
    prefix = re.sub(r"\W+", "-", name)
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r"url\(#", f"url(#{prefix}-", svg)
    svg = re.sub(r'xlink:href="(#?)', lambda m: f'href="#{prefix}-' if m[1] else 'href="', svg)
    svg = svg.replace(INK, "var(--ink)").replace(BACKGROUND, "var(--paper)")
    return f"<figure>{svg}</figure>"


def _literal(text: str) -> str:
    """Text for an attribute inside the replacement of a regular expression."""
    return escape(text).replace("\\", r"\\")


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]], *, name: str = "", mark_first: bool = False) -> str:
    """A table of finished HTML; columns whose head starts with "#" hold numbers."""
    numeric = [head.startswith("#") for head in heads]
    top = "".join(
        f"<th{' class=n' * n}>{escape(head.lstrip('#'))}</th>" for head, n in zip(heads, numeric, strict=True)
    )
    body = "\n".join(
        f"<tr{' class=pick' * (mark_first and i == 0)}>"
        + "".join(f"<td{' class=n' * n}>{cell}</td>" for cell, n in zip(row, numeric, strict=True))
        + "</tr>"
        for i, row in enumerate(rows)
    )
    kind = f' id="{name}" class="sortable"' if name else ""
    table = f"<table{kind}><thead><tr>{top}</tr></thead><tbody>\n{body}\n</tbody></table>"
    return f'<div class="scroll" tabindex="0">{table}</div>'


def _details(summary: str, body: str) -> str:
    return f"<details><summary>{escape(capital(summary))}</summary>{body}</details>"


def _missing(text: str) -> str:
    return f'<p class="missing">{text}</p>'


def _list(items: Iterable[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(item)}</li>' for item in items)}</ul>"


def _name(layer: object) -> str:
    return f'<span class="name">{_breakable(str(layer))}</span>'


def _breakable(text: str) -> str:
    """Text in which a long name of a layer may break after a dot."""
    return re.sub(r"(?<=\w\.)(?=[a-zA-Z])", "<wbr>", escape(text))


def _number(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, int | float) else escape(str(value))


def _flat(record: Any, at: str = "") -> Iterable[tuple[str, str]]:
    """Dotted keys and values as text; long lists are cut, with their length."""
    if isinstance(record, dict) and record:
        for key, value in record.items():
            yield from _flat(value, f"{at}.{key}" if at else str(key))
    elif isinstance(record, list):
        cut = f", … ({len(record)} in all)" if len(record) > MAX_ITEMS else ""
        yield at, ", ".join(item if isinstance(item, str) else json.dumps(item) for item in record[:MAX_ITEMS]) + cut
    else:
        yield at, record if isinstance(record, str) else json.dumps(record) if record != {} else "none"
