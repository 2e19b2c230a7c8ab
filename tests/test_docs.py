"""Generated pages are what their generator writes now."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_generated_pages_are_up_to_date():
    spec = importlib.util.spec_from_file_location("docs_make", ROOT / "docs" / "make.py")
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    for path, text in make.pages().items():
        assert text == path.read_text(encoding="utf-8"), f"{path.name}: run `make docs`"
