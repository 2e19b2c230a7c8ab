"""What stands in two places says the same in both, and nothing imports against the direction of the house."""

import ast
import re
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def name_of(requirement):
    return re.split(r"[<>=!~\[; ]", requirement)[0].lower().replace("_", "-")


def test_environment_yml_keeps_step_with_pyproject():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    (pip,) = [entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict)]
    extras = PROJECT["optional-dependencies"]
    assert sorted(pip) == sorted(PROJECT["dependencies"] + extras["gguf"] + extras["notebooks"])
    assert f"python{PROJECT['requires-python']}" in environment["dependencies"]


def test_every_dependency_is_pinned():
    pins = {name_of(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    declared = [*PROJECT["dependencies"], *(r for extra in PROJECT["optional-dependencies"].values() for r in extra)]
    assert {name_of(r) for r in declared} <= pins


def test_versions_agree():
    import bilora

    assert bilora.__version__ == PROJECT["version"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == PROJECT["version"]
    assert f"## {PROJECT['version']}" in (ROOT / "CHANGELOG.md").read_text()


def imported_roots(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield (node.module or "").split(".")[0]


@pytest.mark.parametrize("package", ["bilora", "analysis"])
def test_imports_go_one_way(package):
    forbidden = {"tests", "notebooks", "figures", "benchmarks"}
    for path in (ROOT / package).rglob("*.py"):
        # The command line is the one place that sees both.
        banned = forbidden | ({"analysis"} if package == "bilora" and "cli" not in path.parts else set())
        found = set(imported_roots(path)) & banned
        assert not found, f"{path.relative_to(ROOT)} imports {found}"


def test_no_pickle_and_no_remote_code():
    for path in [*(ROOT / "bilora").rglob("*.py"), *(ROOT / "analysis").rglob("*.py")]:
        text = path.read_text()
        # A worker process gets its job from its parent, never from a file.
        assert "pickle" not in set(imported_roots(path)) or path.name == "points.py", path
        assert "trust_remote_code=True" not in text, path
        assert "torch.load(" not in text, path
