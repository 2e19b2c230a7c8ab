"""The report: one file, well-formed, nothing loaded, nothing claimed beyond the intervals."""

import base64
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis.headlines import headline_rows
from analysis.plots import FIGURES, draw_all
from analysis.plots.save import save_figure
from analysis.report import write_report
from analysis.report.headlines import answer
from analysis.report.numbers import enumerated, number, p_value, spread
from analysis.report.tables import cost_table, moment_table
from analysis.statistics import paired_differences, summarize
from bilora.errors import UserError
from tests.browser import Framed, needs_browser
from tests.plausible_rows import COLUMNS, plausible_rows

VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """Collects tags and text, and refuses elements that are not closed in order."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("study")
    frame = plausible_rows(methods=["LoRA", "LoRA-SAM", "Bi-LoRA"])
    for family in FIGURES:
        save_figure(family.draw(frame), family.name, folder / "figures", family.table(frame), {}, formats=("svg",))
    made_by = {
        "command": "bilora compare studies/demo.yaml",
        "code": {"cell": "0123abcd"},
        "note": "<script>alert(1)</script>",
    }
    costs = {"LoRA": [10.0, 14.0], "LoRA-SAM": [24.0, 24.0], "Bi-LoRA": [12.6]}
    path = write_report(frame, folder / "report.html", figures=folder / "figures", provenance=made_by, costs=costs)
    return path.read_text(encoding="utf-8"), path


def test_the_page_is_well_formed_and_has_every_section(written):
    page = Page(written[0])
    anchors = {attrs["id"] for tag, attrs in page.tags if tag == "section"}
    assert anchors == {
        "answer", "setup", "quality", "sharpness", "curvature", "landscapes", "subspaces", "differences", "cost",
        "statistics", "limits", "provenance",
    }  # fmt: skip
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    links = {attrs["href"] for tag, attrs in page.tags if tag == "a"}
    assert links <= {f"#{name}" for name in ids}


def test_costs_are_means_over_runs_and_ratios_to_the_baseline():
    table = cost_table({"LoRA": [10.0, 14.0], "LoRA-SAM": [24.0, 24.0], "Bi-LoRA": [12.6]}, "LoRA")
    assert [[cell.text for cell in row] for row in table.rows] == [
        ["LoRA", "12.0", "10.0 to 14.0", "1.00", "2"],
        ["LoRA-SAM", "24.0", "24.0 to 24.0", "2.00", "2"],
        ["Bi-LoRA", "12.6", "–", "1.05", "1"],
    ]
    assert {row[3].text for row in cost_table({"SAM": [3.0]}, "LoRA").rows} == {"–"}


def test_every_figure_is_inside_the_page(written):
    source, path = written
    images = [attrs for tag, attrs in Page(source).tags if tag == "img"]
    assert len(images) == len(FIGURES)
    for family in FIGURES:
        svg = (path.parent / "figures" / f"{family.name}.svg").read_bytes()
        assert f'src="data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"' in source
    assert all(attrs["alt"] for attrs in images)


def test_nothing_is_loaded_from_anywhere(written):
    source, _ = written
    assert not re.search(r"https?:|//[a-z]|@import|url\(", re.sub(r"data:[^\"]*", "", source))
    tags = {tag for tag, _ in Page(source).tags}
    assert not tags & {"script", "link", "iframe", "object", "embed"}


def test_a_trace_is_called_by_its_operator_for_the_rows_know_no_backend():
    rows = [
        {**COLUMNS, "study": "toy", "method": "LoRA", "seed": 0, "space": "full", "split": "train", **one}
        for one in (
            {"measure": "trace", "quantity": "trace", "value": 3.0},
            {"measure": "trace", "quantity": "trace", "value": 2.0, "kind": "ggn bfloat16 autocast"},
            {"measure": "density", "quantity": "trace", "value": 4.0},
        )
    ]
    table = moment_table(summarize(pd.DataFrame(rows)), ["LoRA"])
    names = [cells[2].text for cells in table.rows]
    assert names == ["trace", "trace ggn bfloat16 autocast", "trace (quadrature)"]


def test_labels_are_escaped(tmp_path):
    frame = plausible_rows(methods=["LoRA", "Bi-LoRA"])
    frame["method"] = frame["method"].replace("Bi-LoRA", "<script>alert('x')</script>")
    frame["study"] = "a & <b>bold</b>"
    path = write_report(frame, tmp_path / "report.html", figures=tmp_path, provenance={"<i>": "</section>"})
    page = Page(path.read_text())
    assert not [tag for tag, _ in page.tags if tag in ("script", "b", "i")]
    assert "<script>alert('x')</script>" in page.text
    assert "a & <b>bold</b>" in page.text


def test_provenance_shows_what_it_was_given(written):
    text = Page(written[0]).text
    for told in ("bilora compare studies/demo.yaml", "0123abcd", "rows sha256", "as trained", "matplotlib"):
        assert told in text


def test_the_same_rows_give_the_same_page(written, tmp_path):
    frame = plausible_rows(methods=["LoRA"])
    pages = [
        write_report(frame, tmp_path / name, figures=tmp_path, provenance={}).read_bytes()
        for name in ("a.html", "b.html")
    ]
    assert pages[0] == pages[1]


def test_a_study_of_one_method_one_seed_and_one_measure_is_reported(tmp_path):
    frame = plausible_rows(methods=["LoRA"], seeds=1).query("measure == 'quality'")
    page = Page(write_report(frame, tmp_path / "r.html", figures=tmp_path / "none", provenance={}).read_text())
    assert "nothing can be compared" in page.text
    assert {attrs["id"] for tag, attrs in page.tags if tag == "section"} == {
        "answer", "setup", "quality", "limits", "provenance"
    }  # fmt: skip


def test_figures_that_other_rows_left_behind_are_not_shown(tmp_path):
    frame = plausible_rows(methods=["LoRA", "Bi-LoRA"])
    draw_all(frame[frame["measure"] == "spectrum"], tmp_path, {})
    page = write_report(frame[frame["measure"] == "landscape"], tmp_path / "r.html", figures=tmp_path, provenance={})
    assert "<img" not in page.read_text()


def headline(verdicts: dict[str, tuple[float, float]], seeds: int = 6, space: str = "full") -> pd.DataFrame:
    """Adversarial rises: method → (mean difference to LoRA, its spread over seeds)."""
    noise = np.random.default_rng(0).standard_normal(seeds)
    noise = (noise - noise.mean()) / (noise.std() or 1.0)
    fixed = {
        **COLUMNS,
        "measure": "adversarial",
        "space": space,
        "quantity": "loss_rise",
        "kind": "gradient",
        "radius": 0.1,
    }
    rows = [{**fixed, "method": "LoRA", "seed": s, "value": 1.0} for s in range(seeds)]
    for method, (mean, deviation) in verdicts.items():
        rows += [
            {**fixed, "method": method, "seed": s, "value": 1.0 + mean + deviation * noise[s]} for s in range(seeds)
        ]
    return pd.DataFrame(rows)


def said(frame: pd.DataFrame) -> str:
    return " ".join(answer(paired_differences(frame, "LoRA"), "LoRA", 0.95))


def test_the_answer_says_flatter_sharper_or_undecided_as_the_intervals_do():
    text = said(headline({"Bi-LoRA": (-0.5, 0.01), "Flat-LoRA": (0.4, 0.01), "LoRA-SAM": (-0.1, 5.0)}))
    assert "Bi-LoRA is flatter by loss rise one gradient step away, ρ\u00a0=\u00a00.1" in text
    assert "Flat-LoRA is sharper by loss rise one gradient step away" in text
    assert "LoRA-SAM cannot be told from LoRA at 6 seeds" in text
    assert "few" not in text


def test_few_seeds_are_said_to_be_few():
    assert "3 seeds are few" in said(headline({"Bi-LoRA": (-0.5, 0.01)}, seeds=3))


def test_one_seed_decides_nothing():
    text = said(headline({"Bi-LoRA": (-0.5, 0.0)}, seeds=1))
    assert "One training seed decides nothing" in text
    assert "flatter" not in text


def test_flatness_of_the_factors_alone_is_pointed_out():
    lora = headline({"Bi-LoRA": (-0.5, 0.01)}, space="lora")
    full = headline({"Bi-LoRA": (-0.1, 5.0)})
    assert "flatness of the factors is not flatness of the weights" in said(pd.concat([lora, full]))
    assert "flatness of the factors" not in said(pd.concat([lora, headline({"Bi-LoRA": (-0.5, 0.01)})]))


def test_headlines_take_the_middle_radius_and_the_largest_eigenvalue():
    rows = headline_rows(paired_differences(plausible_rows(), "LoRA"))
    assert set(rows["radius"].dropna()) == {0.2}
    assert set(rows.loc[rows["measure"] == "spectrum", "index"]) == {1}
    assert rows["space"].iloc[0] == "full"


def test_an_empty_table_is_one_clear_line(tmp_path):
    with pytest.raises(UserError, match="no rows to report"):
        write_report(plausible_rows().iloc[:0], tmp_path / "r.html", figures=tmp_path, provenance={})


@pytest.mark.parametrize(
    ("mean", "half", "text"),
    [
        (0.31234, 0.0214, "0.312 ± 0.021"),
        (-1.5, 0.25, "−1.50 ± 0.25"),
        (0.5, float("nan"), "0.500"),
        (0.00002134, 0.0000052, "(2.13 ± 0.52)·10⁻⁵"),
        (1234567.0, 23456.0, "(1.235 ± 0.023)·10⁶"),
        (0.81, 0.0, "0.810 ± 0.000"),
        (0.0, 0.0, "0 ± 0"),
        (0.001, 3.2, "0.0 ± 3.2"),
    ],
)
def test_digits_follow_the_interval(mean, half, text):
    assert spread(mean, half) == text


def test_what_is_not_finite_is_counted():
    assert spread(float("nan"), float("nan"), 3) == "not finite (3)"
    assert spread(1.0, 0.1, 2) == "1.00 ± 0.10 (2 not finite)"


def test_single_numbers_and_lists_read_well():
    assert [number(x) for x in (0.0, 1.0, -0.01234, 2e-7, float("nan"), float("-inf"))] == [
        "0.00", "1.00", "−0.0123", "2.00·10⁻⁷", "–", "−∞"
    ]  # fmt: skip
    assert [p_value(p) for p in (0.0312, 1e-9, float("nan"))] == ["0.031", "< 0.0001", "–"]
    assert [enumerated(list(words)) for words in ("a", "ab", "abc")] == ["a", "a and b", "a, b and c"]


@needs_browser
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_never_scrolls_sideways(written, tmp_path, width):
    root = "page.documentElement"
    wide, room, errors = Framed(written[0], tmp_path, width, 800).ask(f"{root}.scrollWidth", f"{root}.clientWidth")
    assert wide <= room <= width
    assert errors == []
