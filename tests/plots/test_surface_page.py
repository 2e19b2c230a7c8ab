"""``surface.html`` in a real browser, on a wide window and on a phone."""

import numpy as np
import pytest

from analysis.plots import interactive_surface, write_surface_html
from tests.browser import Framed, needs_browser
from tests.plausible_rows import plausible_rows

BOXES = """[...page.querySelectorAll('#scene, #scene2')].map(scene => {
    const box = scene.getBoundingClientRect(); return [box.left, box.top, box.right, box.bottom]; })"""
WORDS = """[...page.querySelectorAll('.annotation-text, .gtitle, .updatemenu-item-text')].map(
    words => words.getBoundingClientRect().right)"""


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> str:
    rows = plausible_rows(methods=["LoRA", "Bi-LoRA"], seeds=1, directions=2)
    rows = rows[rows["kind"].isin(["trajectory", "filter"]) & (rows["space"] != "lora")]
    path = write_surface_html(interactive_surface(rows), tmp_path_factory.mktemp("page") / "surface.html")
    return path.read_text(encoding="utf-8")


def overlap(one: list[float], other: list[float]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


@needs_browser
@pytest.mark.parametrize(("width", "height"), [(390, 1300), (1280, 800)])
def test_surfaces_are_drawn_and_fit_the_window(source, tmp_path, width, height):
    framed = Framed(source, tmp_path, width, height)
    boxes, canvases, tools, scroll, words, errors = framed.ask(
        BOXES, "page.querySelectorAll('#surface canvas').length", "page.querySelectorAll('svg.main-svg').length",
        "page.documentElement.scrollWidth", WORDS,
    )  # fmt: skip
    assert errors == []
    assert len(boxes) == 2
    assert canvases >= 2
    assert tools >= 1
    assert scroll <= width
    assert max(words) <= width, "no words are cut off"
    assert not overlap(*boxes)
    assert (boxes[0][1] == boxes[1][1]) == (width > 1000), "side by side where there is room"
    picture = framed.picture()
    for left, top, right, bottom in np.array(boxes).astype(int):
        assert right - left > 250
        scene = picture[top:bottom, left:right].reshape(-1, 3)
        yellow = (scene[:, 0] > scene[:, 2] + 60).mean()
        blue = (scene[:, 2] > scene[:, 0] + 30).mean()
        assert yellow > 0.01, "the high end of the scale"
        assert blue > 0.003, "the low end"
        assert len(np.unique(scene // 8, axis=0)) > 100, "a shaded sheet"


@needs_browser
def test_the_menu_changes_the_plane_and_keeps_the_layout_of_a_phone(source, tmp_path):
    figure = "page.getElementById('surface')"
    choose = """page.querySelector('.updatemenu-header').dispatchEvent(new MouseEvent('click', {bubbles: true}));
        await wait();
        page.querySelectorAll('.updatemenu-dropdown-button')[2].dispatchEvent(new MouseEvent('click'));"""
    active, label, boxes, paths, errors = Framed(source, tmp_path, 390, 1300).ask(
        f"{figure}.layout.updatemenus[0].active", f"{figure}.layout.updatemenus[0].buttons[2].label", BOXES,
        f"{figure}.data.filter(one => one.visible === true && one.mode === 'lines+markers').length", first=choose,
    )  # fmt: skip
    assert errors == []
    assert active == 2
    assert "trajectory" in label
    assert paths == 2
    assert boxes[0][1] != boxes[1][1], "still one below the other"
    assert max(box[2] for box in boxes) <= 390
