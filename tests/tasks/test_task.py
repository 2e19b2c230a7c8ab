import pandas as pd
import pytest
from pydantic import ValidationError

from bilora.errors import UserError
from bilora.tasks import TaskSpec, load_task


def texts(task, split):
    return task.tokenizer.batch_decode(list(getattr(task, split)["input_ids"]), skip_special_tokens=True)


def test_rotten_tomatoes_task(tokenizer):
    spec = TaskSpec(train_examples=100, validation_examples=40, max_length=32)
    task = load_task(spec, tokenizer)
    assert (len(task.train), len(task.validation)) == (100, 40)
    assert (sum(task.train["labels"]), sum(task.validation["labels"])) == (50, 20)
    assert (task.num_labels, task.label_names) == (2, ("negative", "positive"))
    assert max(map(len, task.train["input_ids"])) <= 32
    assert not set(texts(task, "train")) & set(texts(task, "validation"))
    assert load_task(spec, tokenizer).fingerprint == task.fingerprint
    assert load_task(spec.model_copy(update={"seed": 1}), tokenizer).fingerprint != task.fingerprint


def test_more_training_examples_keep_those_there_were(csv, tokenizer):
    data = csv()
    few, many = (load_task(TaskSpec(data=data, train_examples=n, validation_examples=8), tokenizer) for n in (10, 20))
    assert texts(many, "train")[:10] == texts(few, "train")
    assert texts(many, "validation") == texts(few, "validation")


def test_a_fifth_is_held_out(csv, tokenizer):
    task = load_task(TaskSpec(data=csv()), tokenizer)
    assert (len(task.train), len(task.validation), sum(task.validation["labels"])) == (32, 8, 4)


def test_no_text_is_in_both_splits(csv, reviews, tokenizer):
    repeated = pd.concat([reviews, reviews.assign(text=reviews.text.str.upper() + " ")])
    task = load_task(TaskSpec(data=csv(frame=repeated)), tokenizer)
    assert len(task.train) + len(task.validation) == 40
    assert not set(texts(task, "train")) & set(texts(task, "validation"))


def test_texts_of_validation_and_test_files_are_not_trained_on(csv, reviews, tokenizer, tmp_path):
    csv("d/train.csv", reviews)
    csv("d/validation.csv", reviews[:10])
    csv("d/test.csv", reviews[10:16])
    task = load_task(TaskSpec(data=str(tmp_path / "d")), tokenizer)
    assert (len(task.train), len(task.validation)) == (24, 10)


def test_collation_pads_to_the_longest(csv, tokenizer):
    task = load_task(TaskSpec(data=csv()), tokenizer)
    rows = [task.train[i] for i in range(6)]
    longest = max(len(row["input_ids"]) for row in rows)
    batch = task.collate(rows)
    assert batch["input_ids"].shape == (6, longest)
    assert batch["attention_mask"].sum(1).tolist() == [len(row["input_ids"]) for row in rows]
    assert batch["labels"].tolist() == [row["labels"] for row in rows]


def test_causal_lm_ignores_padding_even_where_it_is_the_end_token(csv, tokenizer):
    import copy

    ended = copy.deepcopy(tokenizer)
    ended.eos_token = ended.pad_token = "[SEP]"
    task = load_task(TaskSpec(data=csv(), kind="causal_lm", max_length=64), ended)
    rows = [task.train[i] for i in range(6)]
    batch = task.collate(rows)
    assert task.num_labels is None
    assert len({len(row["input_ids"]) for row in rows}) > 1
    for row, labels, ids in zip(rows, batch["labels"].tolist(), batch["input_ids"].tolist(), strict=True):
        count = len(row["input_ids"])
        assert labels[:count] == ids[:count] == row["input_ids"]
        assert ended.eos_token_id in row["input_ids"]
        assert set(labels[count:]) <= {-100}


def test_asking_for_too_much(csv, tokenizer):
    data = csv()
    for field, value, message in [
        ("train_examples", 33, r"train_examples is 33, but .* has 32 to give"),
        ("validation_examples", 40, r"validation_examples is 40, but .* has 39 to give"),
        ("max_length", 513, "choose at most 512"),
    ]:
        with pytest.raises(UserError, match=message):
            load_task(TaskSpec(data=data, **{field: value}), tokenizer)


def test_too_little_to_split(csv, tokenizer):
    one = csv(frame=pd.DataFrame({"text": ["same", "Same"], "label": [0, 1]}))
    with pytest.raises(UserError, match="leaves none for validation"):
        load_task(TaskSpec(data=one), tokenizer)


def test_unknown_key_and_bad_range():
    for bad in ({"colour": 1}, {"train_examples": 0}, {"max_length": 1}, {"kind": "regression"}):
        with pytest.raises(ValidationError):
            TaskSpec(**bad)
