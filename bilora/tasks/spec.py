"""What to train on: a validated description of a task."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt

TaskKind = Literal["classification", "causal_lm"]


class TaskSpec(BaseModel):
    """A task: where its text is, which columns to read, how many examples to take.

    Attributes:
        data: the built-in ``rotten_tomatoes``, a CSV, TSV, JSON, JSONL or Parquet file, or a folder with
            ``train.*`` and, if it has them, ``validation.*`` and ``test.*`` (a test file is never trained on).
        kind: ``classification`` of a text, or ``causal_lm``: prediction of its next token.
        text_column: column that holds the text.
        label_column: column that holds the class, as strings or as integers 0..n-1; not read for ``causal_lm``.
        train_examples: how many examples to train on, None for all.
        validation_examples: how many to validate on, None for all. Where the data has no validation file, they are
            held out of the training examples, and None holds out a fifth.
        max_length: longest text, in tokens; longer ones are cut.
        seed: seed of the split and of the choice of examples, apart from the seed of training, so that compared
            trainings see the same examples.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: str = "rotten_tomatoes"
    kind: TaskKind = "classification"
    text_column: str = "text"
    label_column: str = "label"
    train_examples: PositiveInt | None = None
    validation_examples: PositiveInt | None = None
    max_length: int = Field(default=128, ge=2)
    seed: int = 0
