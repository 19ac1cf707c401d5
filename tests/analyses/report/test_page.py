"""The page of a run: its content, that it needs no network, and that no text from a file becomes markup."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from figure_tables import BLOCKS, confirmation_table, quality_table, similarity_table
from matplotlib.figure import Figure

from layerprobe.analyses.experiments.verdict import ArmResult, Trend, Verdict
from layerprobe.analyses.figures import image_grid, style
from layerprobe.analyses.report.inline_svg import Drawing, inline_svg
from layerprobe.analyses.report.page import write_report
from layerprobe.analyses.selection.records import (
    Caution,
    LayerQuality,
    Objection,
    RankedPair,
    RejectedPair,
    ScorePart,
    Selection,
    SelectionBasis,
)
from layerprobe.analyses.tables.csv_files import write_table
from layerprobe.analyses.wording.samples import copy_sentences
from layerprobe.analyses.wording.selection import (
    caution_texts,
    objection_texts,
    pair_reasons,
)
from layerprobe.analyses.wording.verdict import verdict_paragraph, verdict_sentence

LEVELS = (0.1, 0.3)
ARMS = {"baseline": 1.0, "pick": 0.8, "negative control": 1.2}
EVIL = "<script>alert(1)</script>"
FOLDED = ["answers", "curves", "pairs", "confirmation", "similarity", "samples", "numbers", "run", "reading"]
FILES = {"quality.csv", "similarity.csv", "confirmation.csv", "plan.json", "environment.json"}
CHROMIUM = shutil.which("chromium")


class Page(HTMLParser):
    """Elements, attributes and text of a page as a browser sees them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.html, self.elements, self.text, self.scripts, self._open = html, [], "", [], ""
        self.feed(html)
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._open = tag if tag in ("script", "style") else ""
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._open = ""

    def handle_data(self, data: str) -> None:
        if self._open == "script":
            self.scripts[-1] += data
        elif self._open != "style":
            self.text += data

    def attributes(self, *names: str) -> list[str]:
        return [str(value) for _, attrs in self.elements for name, value in attrs.items() if name in names]


def verdict(*, extractor: str = "a small classifier", metric: str = "Frechet distance", name: str = "pick") -> Verdict:
    trend = Trend(best=1.2, best_step=2000, late_gain=0.0, late_step=1500)
    arm = ArmResult(
        name="baseline",
        student=None,
        teacher=None,
        weight=0.0,
        final=[1.5, 1.5, 1.5],
        difference=None,
        low=None,
        high=None,
        steps_to_baseline=[2000.0, 2000.0, 2000.0],
        learning_rate=1e-3,
        trend=trend,
    )
    aligned = replace(
        arm,
        name=name,
        student="blocks.0",
        teacher="blocks.1",
        weight=0.3,
        final=[1.2, 1.2, 1.2],
        difference=-0.3,
        low=-0.4,
        high=-0.2,
        steps_to_baseline=[1500.0, 1600.0, None],
    )
    return Verdict(
        metric=metric,
        extractor=extractor,
        lower_is_better=True,
        start="from scratch",
        steps=2000,
        num_seeds=3,
        num_samples=500,
        answer="helps",
        cautions=(),
        arms=(arm, aligned),
        judged=name,
        comparisons=(),
        planned_seeds=3,
        stop_early=False,
        level=0.05,
    )


def selection_of(layers: list[str], *, num_ranked: int = 7) -> Selection:
    """A selection that ranks the first pairs of the layers and rejects the others as too close."""
    pairs = list(combinations(layers, 2))
    ranked = [
        RankedPair(
            student=student,
            teacher=teacher,
            score=2.0 - 0.1 * i,
            score_low=1.0,
            score_high=3.0,
            parts=(ScorePart("CKA", 0.5, 0.4, 0.6, 0.5),),
            teacher_quality=0.9,
            student_quality=0.6,
            gap=0.3,
            gap_is_certain=True,
            mean_cka=0.5,
            distance=layers.index(teacher) - layers.index(student),
            teacher_is_best=True,
            ties_with_first=i == 1,
        )
        for i, (student, teacher) in enumerate(pairs[:num_ranked])
    ]
    rejected = [RejectedPair(*pair, (Objection("too close", value=1, limit=2),)) for pair in pairs[num_ranked:]]
    basis = SelectionBasis(
        metric="probe accuracy",
        split="validation",
        noise_levels=LEVELS,
        layers=tuple(layers),
        tail=(),
        head=(),
        late=(),
        min_distance=2,
        max_cka=0.9,
        min_gap=0.05,
        weights=(("CKA", -1.0),),
    )
    return Selection(
        basis=basis,
        label_free=False,
        ranked=tuple(ranked),
        rejected=tuple(rejected),
        layers=tuple(LayerQuality(layer, 0.9, 0.85, 0.95, may_teach=True) for layer in layers),
        cautions=(Caution("ties with the pick", value=1),),
    )


def make_run(folder: Path, quality: pd.DataFrame, layers: list[str], *, num_ranked: int = 7) -> Path:
    """A run folder before its confirmation."""
    (folder / "features" / "model").mkdir(parents=True)
    write_table(quality, folder / "quality.csv")
    write_table(similarity_table(layers, LEVELS), folder / "similarity.csv")
    (folder / "selection.json").write_text(selection_of(layers, num_ranked=num_ranked).to_json())
    manifest = {"model": "SiT 8 x 64", "model_hash": "abc123", "data": {"train": "f00d"}, "plan": {"layers": layers}}
    (folder / "features" / "model" / "manifest.json").write_text(json.dumps(manifest))
    (folder / "plan.json").write_text(
        json.dumps({"checkpoint": "weights.pt", "noise_levels": LEVELS, "data_options": {}})
    )
    (folder / "environment.json").write_text(
        json.dumps({"command": "layerprobe probe weights.pt", "packages": {"torch": "2.13.0"}})
    )
    return folder


def confirm_run(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    write_table(confirmation_table(arms=ARMS), folder / "confirmation.csv")
    (folder / "verdict.json").write_text(verdict().to_json())


def probed(num_layers: int = 8) -> pd.DataFrame:
    return quality_table(BLOCKS[:num_layers], LEVELS, metrics=["probe accuracy"])


@pytest.fixture
def plain_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures that are built but not drawn, for tests of the rest of the page."""

    def undrawn(figure: Figure, prefix: str) -> Drawing:
        return Drawing('<svg viewBox="0 0 1 1"></svg>', " ".join(figure.get_suptitle().split()))

    monkeypatch.setattr("layerprobe.analyses.report.page.inline_svg", undrawn)


@pytest.fixture(scope="module")
def full_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_run(tmp_path_factory.mktemp("runs") / "first run", quality_table(levels=LEVELS), BLOCKS)
    confirm_run(folder)
    style.save_figure(image_grid.sample_grid(np.zeros((2, 1, 4, 4)), ["0", "1"]), folder / "figures", "samples")
    write_report(folder)
    return folder


@pytest.fixture(scope="module")
def full_page(full_run: Path) -> Page:
    return Page((full_run / "report.html").read_text(encoding="utf-8"))


def page_of(folder: Path) -> Page:
    return Page(write_report(folder).read_text(encoding="utf-8"))


def opening(page: Page) -> str:
    """What the page shows at once: up to the first folded section."""
    return page.text[: page.text.index("# Which layer for what")]


def tiles(page: Page) -> dict[str, str]:
    """What each tile says, by its label, with the texts of its buttons."""
    found = re.findall(r'<div class="tile"><dt>(.*?)</dt>\s*<dd>(.*?)</dd></div>', page.html, re.DOTALL)
    return {label: Page(content.replace("</strong>", "</strong> ")).text for label, content in found}


def test_sections_are_folded_and_have_anchors_and_files(full_page: Page) -> None:
    assert [attrs["id"] for tag, attrs in full_page.elements if tag == "section"] == ["gain", *FOLDED]
    links = [attrs["href"] for tag, attrs in full_page.elements if tag == "a"]
    assert [link for link in links if link.startswith("#")] == [f"#{name}" for name in FOLDED]
    assert {"quality.csv", "similarity.csv", "confirmation.csv"} <= set(links)
    assert not [attrs for tag, attrs in full_page.elements if tag == "details" and "open" in attrs]
    assert "not run" not in full_page.text.lower()


def test_page_opens_with_the_run_the_verdict_and_four_tiles(full_page: Page) -> None:
    head = opening(full_page)
    assert head.startswith("SiT 8 x 64 · first run")
    assert "<title>SiT 8 x 64 · first run</title>" in full_page.html
    assert f"Helps {verdict_sentence(verdict())}" in head
    told = tiles(full_page)
    assert told["Pick: student ← teacher"] == "blocks.0 ← blocks.1 blocks.0:blocks.1Copy weight 0.3"
    assert told["Richest layer"] == "blocks.4 at noise level 0.1: probe accuracy 0.970 [0.950, 0.990]"
    assert told["Largest gain by training"] == "+0.190 [+0.162, +0.218] probe accuracy over the better control"
    assert told["Difference on trial"].startswith(
        "−0.30 [−0.40, −0.20] Frechet distance from the baseline’s 1.5; weight 0.3, 3 seeds"
    )
    assert (
        "blocks.4 at noise level 0.3: probe accuracy 0.870 [0.850, 0.890]; the better control there, raw input" in head
    )


def test_what_weakens_the_pick_stands_open(full_page: Page) -> None:
    assert "The data cannot tell 1 other pair from the pick" in opening(full_page)
    assert "LP004 The student is at 0.12 of the depth" in opening(full_page)
    assert "LP003 The teacher is 0.12 of the depth after the student" in opening(full_page)


def test_a_number_of_the_verdict_has_one_form(full_page: Page) -> None:
    assert "-0.3 " not in full_page.text
    assert full_page.text.count("the whole interval lies below zero") == 1


@pytest.mark.parametrize(
    ("reading", "told"),
    [
        (None, "30 of 30 samples read: 20 to fit probes (train), 10 to report (test)."),
        ({"rows": {"train": 80, "test": 20}, "unreadable": {"train": 3}}, "30 of 100 samples read"),
    ],
)
def test_how_many_samples_were_read_is_told(tmp_path: Path, reading: object, told: str, plain_figures: None) -> None:
    run = make_run(tmp_path / "run", probed(), BLOCKS[:8])
    (run / "data.json").write_text(json.dumps({"reading": reading, "samples": {"train": 20, "test": 10}, "copies": []}))
    text = page_of(run).text
    assert told in text
    assert ("3 could not be read" in text) == (reading is not None)


def test_a_recorded_trial_stands_beside_a_run_without_a_trial_and_is_called_recorded(
    tmp_path: Path, plain_figures: None
) -> None:
    run = make_run(tmp_path / "run", probed(), BLOCKS[:8])
    confirm_run(run / "recorded")
    (run / "recorded" / "recorded.json").write_text('{"commands": ["layerprobe confirm <run>"]}')
    page = page_of(run)
    assert "Recorded trial: helps" in opening(page)
    assert tiles(page)["Difference on trial"].startswith("not tried")  # a recorded trial is no verdict of this run
    shown = page.text[page.text.index("This trial was recorded") :]
    assert verdict_paragraph(verdict()) in shown
    assert "layerprobe confirm <run>" in shown
    confirm_run(run)
    own = page_of(run).text
    assert "This trial has weight 0.3" in own[own.index("Trial of this run") :]


def test_a_verdict_on_another_pair_than_the_pick_says_so(tmp_path: Path, plain_figures: None) -> None:
    run = make_run(tmp_path / "run", probed(), BLOCKS[:8])
    confirm_run(run)
    other = selection_of(BLOCKS[1:8])
    (run / "selection.json").write_text(other.to_json())
    page = Page(write_report(run).read_text(encoding="utf-8"))
    assert "Verdict on another pair: helps" in page.text
    sentence = "This verdict is about blocks.0 <- blocks.1; the present pick is blocks.1 <- blocks.2."
    assert page.text.count(sentence) == 2
    assert tiles(page)["Difference on trial"].startswith("not tried")
    (run / "selection.json").write_text(replace(other, ranked=()).to_json())
    page = Page(write_report(run).read_text(encoding="utf-8"))
    assert "This verdict is about blocks.0 <- blocks.1; the present selection has no pick." in page.text
    assert "No pick" in opening(page)


def test_copies_and_the_samples_of_pairs_are_stated(tmp_path: Path, plain_figures: None) -> None:
    run = make_run(tmp_path / "run", probed(), BLOCKS[:8])
    copies = [{"split": "test", "of": "train", "num": 12, "total": 400, "is_left_out": True}]
    (run / "data.json").write_text(json.dumps({"samples": {"test": 388}, "copies": copies}))
    (run / "features" / "evidence").mkdir()
    (run / "features" / "evidence" / "manifest.json").write_text(json.dumps({"num_samples": 321}))
    page = Page(write_report(run).read_text(encoding="utf-8"))
    assert all(sentence in page.text for sentence in copy_sentences(copies))
    assert "measured on 321 samples of the train and validation splits" in page.text


def test_page_holds_the_evidence(full_page: Page, full_run: Path) -> None:
    selection = Selection.from_dict(json.loads((full_run / "selection.json").read_text()))
    assert " ".join(pair_reasons(selection.ranked[0], selection)) in full_page.text
    assert all("; ".join(objection_texts(pair, selection)) in full_page.text for pair in selection.rejected)
    assert all(text in full_page.text for text in caution_texts(selection))
    for fact in (
        "abc123",
        "f00d",
        "weights.pt",
        "layerprobe probe weights.pt",
        "2.13.0",
        "−0.30 [−0.40, −0.20]",
        "1,500, 1,600, never",
    ):
        assert fact in full_page.text
    # Two metrics with curves and heatmap, one similarity, two confirmation metrics; drawn samples as a picture.
    assert sum(tag == "svg" for tag, _ in full_page.elements) == 7
    pictures = [attrs["src"] for tag, attrs in full_page.elements if tag == "img"]
    assert (
        base64.b64decode(pictures[0].removeprefix("data:image/png;base64,"))
        == (full_run / "figures" / "samples.png").read_bytes()
    )
    table = full_page.html[full_page.html.index('id="quality"') :]
    assert table[: table.index("</tbody>")].count("<tr>") == num_rows(full_run)


def num_rows(run: Path) -> int:
    """Rows of the table of all numbers: one for all noise levels."""
    return len(pd.read_csv(run / "quality.csv")[["source", "layer", "metric", "split"]].drop_duplicates())


def test_all_numbers_stand_below_their_noise_level(full_run: Path, full_page: Page) -> None:
    table = full_page.html[full_page.html.index('id="quality"') :]
    table = table[: table.index("</table>")]
    levels = re.findall(r'<th[^>]*class="n">(.*?)</th>', table)
    assert levels == [f"{level:g}" for level in sorted(LEVELS)]
    quality = pd.read_csv(full_run / "quality.csv")
    one = quality.iloc[len(quality) // 2]
    names = "".join(f"<td>{one[column]}</td>" for column in ("source", "layer", "metric", "split"))
    row = table[table.index(names) :]
    cells = re.findall(r'<td class="n">(.*?)</td>', row[: row.index("</tr>")])
    shown = cells[levels.index(f"{one.noise_level:g}")]
    assert float(shown.partition(" ")[0].replace("\u2212", "-").replace(",", "")) == pytest.approx(one.value, rel=0.01)


def test_points_and_cells_tell_their_values(full_page: Page) -> None:
    told = set(full_page.attributes("data-tip"))
    assert "trained model, blocks.4 at noise level 0.1: 0.970 [0.950, 0.990]" in told
    assert "random weights, blocks.0 at noise level 0.3: 0.520 [0.500, 0.540]" in told
    assert "blocks.4 at noise level 0.3: 0.19" in told
    assert "blocks.0 and blocks.0: 1.00" in told
    assert any(tip.startswith("pick, step 2,000: ") for tip in told)


def test_figures_have_a_caption_and_a_description(full_page: Page) -> None:
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", full_page.html.replace("<wbr>", ""))
    assert any(caption.startswith("Probe accuracy peaks at blocks.4 (0.97)") for caption in captions)
    described = [attrs["aria-label"] or "" for tag, attrs in full_page.elements if tag == "svg"]
    assert all(text.startswith("Chart. ") and len(text) > 40 for text in described)
    assert not {caption for caption in captions if f">{caption}</text>" in full_page.html}


def test_heads_of_tables_have_a_scope(full_page: Page) -> None:
    assert {attrs.get("scope") for tag, attrs in full_page.elements if tag == "th"} == {"col", "row"}


def test_page_has_no_raw_records(full_page: Page, tmp_path: Path, plain_figures: None) -> None:
    run = make_run(tmp_path / "run", quality_table(BLOCKS[:3], LEVELS, missing=[("blocks.1", 0.3)]), BLOCKS[:3])
    (run / "convention.json").write_text(json.dumps({"fits": [{"score": 1.0}], "declared": True, "classes": None}))
    for page in (full_page, page_of(run)):
        assert not re.search(r"\bnan\b|\bNone\b(?! of them)|\bnull\b|\{|\}", page.text)
    assert "fits1 entries in the file declaredyes classes–" in page.text


def test_page_asks_the_network_for_nothing(full_page: Page) -> None:
    for target in full_page.attributes("src", "xlink:href", "srcset", "action", "data", "poster"):
        assert target.startswith(("#", "data:image/png;base64,"))
    images = {attrs.get("href") for tag, attrs in full_page.elements if tag in ("image", "use")}
    assert all(str(target).startswith(("#", "data:image/png;base64,")) for target in images)
    links = {attrs["href"] for tag, attrs in full_page.elements if tag == "a"}
    files = {link for link in links if not str(link).startswith("#")}
    assert files <= FILES | {"features/model/manifest.json"}
    assert not {"link", "iframe", "object", "embed", "base", "form"} & {tag for tag, _ in full_page.elements}
    assert "http:" not in full_page.html
    assert "https:" not in full_page.html
    assert "@import" not in full_page.html
    assert re.findall(r"url\((?!#)", full_page.html) == []


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_a_browser_opens_the_page_without_complaint(full_run: Path, tmp_path: Path) -> None:
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}"]
    command += ["--enable-logging=stderr", "--window-size=390,900", "--dump-dom", (full_run / "report.html").as_uri()]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in result.stderr  # errors of the script, and requests that the policy refuses
    page = Page(result.stdout)
    rows = num_rows(full_run)
    assert f"{rows} of {rows} rows" in page.text  # the script has run
    assert not [attrs for tag, attrs in page.elements if attrs.get("class") == "copy" and "hidden" in attrs]


def test_policy_allows_no_other_script(full_page: Page) -> None:
    policy = next(
        attrs["content"] for tag, attrs in full_page.elements if attrs.get("http-equiv") == "Content-Security-Policy"
    )
    assert len(full_page.scripts) == 1
    sha256 = base64.b64encode(hashlib.sha256(full_page.scripts[0].encode()).digest()).decode()
    assert policy == f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{sha256}'"


def test_ids_are_unique_and_references_lead_somewhere(full_page: Page) -> None:
    ids = full_page.attributes("id")
    assert len(ids) == len(set(ids))
    references = re.findall(r"url\(#([^)]+)\)", full_page.html)
    references += [href[1:] for href in full_page.attributes("href", "xlink:href") if href.startswith("#")]
    assert references
    assert set(references) <= set(ids)


def test_figures_take_the_colors_of_the_page(full_page: Page) -> None:
    assert "var(--ink)" in full_page.html
    assert style.BACKGROUND not in full_page.html.split("</style>")[1]


def test_quality_alone_makes_a_page_that_says_what_is_missing(tmp_path: Path) -> None:
    folder = tmp_path / "my run"
    folder.mkdir()
    write_table(probed(3), folder / "quality.csv")
    html = write_report(folder).read_text(encoding="utf-8")
    assert write_report(str(folder)) == folder / "report.html"
    assert (folder / "report.html").read_text(encoding="utf-8") == html
    page = Page(html)
    assert [attrs["id"] for tag, attrs in page.elements if tag == "section"] == ["gain", *FOLDED]
    assert f"Not run: layerprobe select '{folder}'" in page.text
    assert f"Not run: layerprobe confirm '{folder}'" in page.text
    assert "Not run: layerprobe sample CHECKPOINT --out" in page.text
    assert "The run folder has no similarity.csv" in page.text
    assert "The run folder has no plan.json" in page.text
    assert "No layer pair has been picked yet." in page.text
    assert "<code>layerprobe probe</code> measures it where shapes allow" in html


def test_unfinished_confirmation_is_shown_as_such(tmp_path: Path, plain_figures: None) -> None:
    folder = make_run(tmp_path / "run", probed(6), BLOCKS[:6])
    table = confirmation_table(arms=ARMS)
    write_table(table[table["metric"] == "held-out loss"], folder / "confirmation.csv")
    page = page_of(folder)
    assert f"Not finished: layerprobe confirm {folder}" in page.text
    assert "Pick: held-out loss" in page.text
    assert "Not tried yet" in page.text
    assert f"not tried layerprobe confirm {folder}" in tiles(page)["Difference on trial"]
    assert "a hypothesis from measurements, until a training tries it" in page.text


def test_page_without_labels_or_admissible_pair(tmp_path: Path, plain_figures: None) -> None:
    layers = BLOCKS[:2]
    quality = quality_table(layers, LEVELS, metrics=["effective rank"])
    page = page_of(make_run(tmp_path / "run", quality, layers, num_ranked=0))
    assert "The data has no labels" in page.text
    assert "No pick" in opening(page)
    assert "needs labels" in tiles(page)["Largest gain by training"]
    assert "No pair is admissible." in tiles(page)["Pick: student ← teacher"]


def test_nothing_from_a_file_becomes_markup(tmp_path: Path) -> None:
    layers = [f'{EVIL}"onload="alert(2).{i}' for i in range(4)]
    quality = quality_table(layers, LEVELS, metrics=["probe accuracy", f"probe accuracy of {EVIL}"])
    quality["note"] = EVIL
    folder = make_run(tmp_path / "run <img src=x onerror=alert(3)> & 'co'", quality, layers, num_ranked=3)
    confirmation = confirmation_table(arms=ARMS).replace({"pick": f"arm {EVIL}"})
    confirmation["metric"] = EVIL
    write_table(confirmation, folder / "confirmation.csv")
    (folder / "verdict.json").write_text(verdict(extractor=EVIL, metric=EVIL, name=f"arm {EVIL}").to_json())
    (folder / "plan.json").write_text(json.dumps({EVIL: {EVIL: [EVIL, {EVIL: EVIL}]}}))
    (folder / "environment.json").write_text(json.dumps({"command": f"layerprobe probe '{EVIL}' </code>{EVIL}"}))
    (folder / "features" / "model" / "manifest.json").write_text(json.dumps({"model": EVIL}))
    (folder / "figures").mkdir()
    (folder / "figures" / "samples\"onerror='alert(4)'><script>.png").write_bytes(b"")
    page = page_of(folder)
    assert len(page.scripts) == 1
    assert "alert" not in page.scripts[0]
    assert [attrs["src"] for tag, attrs in page.elements if tag == "img"] == ["data:image/png;base64,"]
    assert [name for _, attrs in page.elements for name in attrs if name.startswith("on")] == []
    assert page.text.count(EVIL) > 40  # it is shown, as text


def test_text_of_a_file_is_not_read_as_a_template(tmp_path: Path, plain_figures: None) -> None:
    quality = probed(3)
    quality["note"] = "{{ 7 * 7 }} {% include 'script.js' %}"
    write_table(quality, tmp_path / "quality.csv")
    assert "{{ 7 * 7 }} {% include 'script.js' %}" in page_of(tmp_path).text


@pytest.mark.filterwarnings("ignore:Glyph 11")  # fonts draw no control characters
@pytest.mark.parametrize("text", ['url(#x) id="y"', "\x0b", style.INK])
def test_texts_of_figures_stay_as_they_are(text: str) -> None:
    figure = Figure()
    figure.suptitle(f"title {text}")
    figure.text(0.5, 0.5, f"label {text}")
    axes = figure.subplots()
    axes.set_title(f"panel {text}", loc="left")
    drawing = inline_svg(figure, "first")
    page = Page(drawing.svg)
    valid = text.replace("\x0b", "\N{REPLACEMENT CHARACTER}")
    assert f"label {valid}" in page.text
    assert f"panel {valid}" in page.attributes("aria-label")[0]
    assert drawing.caption.split() == f"title {valid}".split()


def test_metrics_of_similar_names_do_not_share_ids(tmp_path: Path) -> None:
    metrics = ["probe accuracy", "probe accuracy of a b", "probe accuracy of a-b"]
    write_table(quality_table(BLOCKS[:3], LEVELS, metrics=metrics), tmp_path / "quality.csv")
    ids = page_of(tmp_path).attributes("id")
    assert len(ids) == len(set(ids))


def test_filters_offer_what_the_cells_show(full_page: Page) -> None:
    cells = re.findall(r"<td[^>]*>(.*?)</td>", full_page.html[full_page.html.index('id="quality"') :])
    options = [attrs["value"] for tag, attrs in full_page.elements if tag == "option" and attrs["value"]]
    assert {"model", "probe accuracy", "test"} <= set(options) <= set(cells)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "selection.json",
            "{",
            r"selection.json is damaged \(.*\); repeat the `layerprobe select`",
        ),
        ("selection.json", '{"ranked": []}', r"selection.json is damaged \(no key"),
        (
            "verdict.json",
            "{'a': 1}",
            r"verdict.json is damaged \(Expecting property name .*; repeat",
        ),
        ("verdict.json", "{}", r"verdict.json is damaged \(no key"),
        ("plan.json", "[1]", r"plan.json is damaged \(it is \[1\], not an object\)"),
        ("similarity.csv", "layer_a,cka\nx,1\n", r"similarity.csv is damaged \(it has no column noise_level_a\)"),
        ("quality.csv", "a,b\n1,2\n", r"quality.csv is damaged \(it has no column source\)"),
        ("confirmation.csv", "", r"confirmation.csv is damaged \(No columns to parse from file\)"),
        ("confirmation.csv", "arm,step\npick,1\n", r"confirmation.csv is damaged \(it has no column seed\)"),
    ],
)
def test_damaged_files_are_named_in_one_line(tmp_path: Path, name: str, content: str, message: str) -> None:
    write_table(probed(3), tmp_path / "quality.csv")
    (tmp_path / "checksums.json").unlink(missing_ok=True)  # a run of an earlier version
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        write_report(tmp_path)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "report.html").exists()


def test_folder_without_quality_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no quality.csv; run `layerprobe probe` first"):
        write_report(tmp_path)
