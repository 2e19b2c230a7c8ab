"""Studies small enough for tests, on the real MiniLM and the real sentences."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

# Worker processes inherit sys.path: this lets them import study_work.
sys.path.insert(0, str(Path(__file__).parent))

TINY = """\
name: tiny
task: {data: rotten_tomatoes, train_examples: 32, validation_examples: 16, max_length: 16}
model: minilm
lora: {r: 4}
training: {max_steps: 4, per_device_train_batch_size: 4, learning_rate: 1e-3, save_steps: 1}
methods:
  LoRA: {method: lora}
  Bi-LoRA: {method: bilora, rho: 0.05}
seeds: [0]
measures:
  - {measure: quality, examples: 8}
  - {measure: random, kind: filter, radii: [0.2], directions: 2, examples: 4}
"""


@pytest.fixture
def study_file(tmp_path: Path) -> Callable[..., Path]:
    """Writes the tiny study with pieces of its text replaced: ``study_file({"old": "new"})``."""

    def write(replacements: dict[str, str] | None = None, name: str = "study.yaml") -> Path:
        text = TINY
        for old, new in (replacements or {}).items():
            assert text.count(old) == 1, f"{old!r} must occur once"
            text = text.replace(old, new)
        path = tmp_path / name
        path.write_text(text)
        return path

    return write
