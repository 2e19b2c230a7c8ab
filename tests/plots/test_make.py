"""``figures/make.py`` as a user runs it."""

import json
import subprocess
import sys
from pathlib import Path

from tests.plausible_rows import plausible_rows

SCRIPT = Path(__file__).parents[2] / "figures" / "make.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, check=False)


def test_the_figures_are_redrawn_from_the_rows_alone(tmp_path):
    rows = plausible_rows(methods=["LoRA", "Bi-LoRA"])
    rows[rows["measure"].isin(["landscape", "spectrum"])].to_parquet(tmp_path / "results.parquet")
    done = run(str(tmp_path / "results.parquet"), "--folder", str(tmp_path / "figures"))
    assert done.returncode == 0, done.stderr
    names = {f"{name}.{kind}" for name in ("landscape", "eigenvalues") for kind in ("png", "csv", "parquet", "json")}
    assert {path.name for path in (tmp_path / "figures").iterdir()} == names | {"table.md"}
    assert "| LoRA | Bi-LoRA |" in (tmp_path / "figures" / "table.md").read_text()
    assert all(path.stat().st_size < 200_000 for path in (tmp_path / "figures").glob("*.png"))
    assert json.loads((tmp_path / "figures" / "landscape.json").read_text())["study"] == ["invented"]
    assert "left out: overlap" in done.stderr


def test_without_a_demo_the_command_says_what_to_run(tmp_path):
    done = run(str(tmp_path / "none.parquet"))
    assert done.returncode == 2
    assert done.stderr.strip().endswith("run `make demo` first")
    assert "Traceback" not in done.stderr
