from pathlib import Path

import pandas as pd
import pytest

from bilora.tasks import load_tokenizer

SENTENCES = [
    "A warm and funny film .",
    "Dull from the first minute to the last .",
    "The cast is splendid and so is the script .",
    "I wanted my money back after ten minutes .",
    "Quietly moving , and never sentimental .",
    "A mess of half finished ideas .",
    "Sharp writing and a great ending .",
    "Nothing here is worth your time .",
    "One of the best of the year .",
    "It limps towards an ending nobody wanted .",
]


@pytest.fixture(scope="session")
def tokenizer():
    return load_tokenizer("minilm")


@pytest.fixture
def reviews() -> pd.DataFrame:
    """Forty distinct sentences, half of each class."""
    texts = [f"{text} {number}" for number in range(4) for text in SENTENCES]
    return pd.DataFrame({"text": texts, "label": [1, 0] * 20})


@pytest.fixture
def csv(tmp_path: Path, reviews: pd.DataFrame):
    """Writes a table as CSV and gives its path: the reviews, with columns replaced."""

    def write(name: str = "reviews.csv", frame: pd.DataFrame | None = None, **columns: object) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        (reviews if frame is None else frame).assign(**columns).to_csv(path, index=False)
        return str(path)

    return write
