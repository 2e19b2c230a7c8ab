"""Which files count as the code behind a result."""

from pathlib import Path

import pytest

from analysis.study import sources

TREE = {
    "bilora/__init__.py": "",
    "bilora/a.py": "import numpy\nfrom bilora import b\n",
    "bilora/b.py": "def f():\n    from bilora.pack import thing\n",
    "bilora/pack/__init__.py": "from .inner import thing\nfrom . import other\n",
    "bilora/pack/inner.py": "thing = 1\n",
    "bilora/pack/other.py": "from ..c import x\n",
    "bilora/c.py": "x = 1\n",
    "bilora/unused.py": "",
}


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, text in TREE.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(sources, "ROOT", tmp_path)
    sources._imports.cache_clear()
    yield tmp_path
    sources._imports.cache_clear()


def test_closure_follows_every_kind_of_import(tree: Path) -> None:
    reached = ["bilora.a", "bilora.b", "bilora.c", "bilora.pack", "bilora.pack.inner", "bilora.pack.other"]
    assert sources.closure(["bilora.a"]) == reached
    assert sources.closure(["bilora.a"], without=["bilora.pack"]) == ["bilora.a", "bilora.b"]
    assert sources.closure(["numpy"]) == []


@pytest.mark.parametrize(("file", "changes"), [("c.py", True), ("pack/__init__.py", True), ("unused.py", False)])
def test_digest_changes_with_the_files_that_count(tree: Path, file: str, changes: bool) -> None:
    before = sources.source_digest(sources.closure(["bilora.a"]))
    path = tree / "bilora" / file
    path.write_text(path.read_text() + "# edited\n")
    assert (sources.source_digest(sources.closure(["bilora.a"])) != before) == changes


def test_a_method_counts_for_its_own_trainings_only() -> None:
    methods = ["bilora.methods.lora", "bilora.methods.bilora"]
    own = sources.closure(["bilora.methods.bilora"])
    assert "bilora.methods.bilora" in own
    shared = sources.closure(["bilora.training.run"], without=methods)
    assert {"bilora.methods", "bilora.training.mixin", "bilora.tasks.task", "bilora.adapters.swap"} <= set(shared)
    assert not set(methods) & set(shared)
    assert not any(module.startswith("analysis") for module in shared)


def test_a_measure_does_not_count_for_the_others() -> None:
    reached = sources.closure(["analysis.sharpness.random"])
    assert "analysis.core.objective" in reached
    assert "analysis.curvature.eigen" not in reached
