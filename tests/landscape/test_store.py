"""Points on disk survive kills and are never taken for another surface's."""

import pytest

from analysis.landscape.store import PointStore
from bilora.errors import UserError


def test_points_come_back_exactly(tmp_path):
    store = PointStore(tmp_path / "deep" / "points.jsonl")
    store.open("a")
    metrics = {(0.1, -0.3): {"loss": 0.1 + 0.2, "accuracy": 1 / 3}, (1e-300, 5.0): {"loss": float("inf")}}
    for key, value in metrics.items():
        store.add(key, value)
    again = PointStore(store.path)
    again.open("a")
    for key, value in metrics.items():
        assert again.get(key) == value
    assert again.get((9.0, 9.0)) is None


def test_not_a_number_comes_back(tmp_path):
    store = PointStore(tmp_path / "points.jsonl")
    store.open("a")
    store.add((0.0,), {"loss": float("nan")})
    store.open("a")
    assert store.get((0.0,))["loss"] != store.get((0.0,))["loss"]


@pytest.mark.parametrize("cut", range(1, 12))
def test_a_line_cut_by_a_kill_is_dropped(tmp_path, cut):
    path = tmp_path / "points.jsonl"
    store = PointStore(path)
    store.open("a")
    store.add((1.0,), {"loss": 1.0})
    store.add((2.0,), {"loss": 2.0})
    path.write_bytes(path.read_bytes()[:-cut])
    store.open("a")
    assert store.get((1.0,)) == {"loss": 1.0}
    assert store.get((2.0,)) is None
    store.add((3.0,), {"loss": 3.0})
    store.open("a")
    assert store.get((1.0,)) == {"loss": 1.0}
    assert store.get((3.0,)) == {"loss": 3.0}


def test_points_of_another_surface_are_not_used(tmp_path):
    store = PointStore(tmp_path / "points.jsonl")
    store.open("a")
    store.add((1.0,), {"loss": 1.0})
    store.open("b")
    assert store.get((1.0,)) is None
    store.add((1.0,), {"loss": 7.0})
    store.open("a")
    assert store.get((1.0,)) is None


def test_another_file_is_not_written_over(tmp_path):
    path = tmp_path / "points.jsonl"
    path.write_text("my notes\n")
    with pytest.raises(UserError, match="no file of landscape points"):
        PointStore(path).open("a")
    assert path.read_text() == "my notes\n"
