import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset

from analysis.core import Objective, WeightSpace, dot, gaussian, norm
from bilora.errors import UserError
from tests.oracles import tiny

EXAMPLES = tiny.examples()
BATCHES = [tiny.padded(part) for part in tiny.split(EXAMPLES)]
SPACES = ("full", "lora")


def flat(vector):
    return torch.cat([tensor.flatten() for tensor in vector.values()])


def named(space, vector):
    parts = vector.split([p.numel() for p in space.parameters.values()])
    return {n: v.view_as(p) for (n, p), v in zip(space.parameters.items(), parts, strict=True)}


@pytest.fixture(scope="module")
def adapted():
    return tiny.with_lora(tiny.bert())


@pytest.fixture(scope="module")
def cases(adapted):
    """space name → (WeightSpace, oracle over all examples in one batch)."""
    build = {"full": WeightSpace.full, "lora": WeightSpace.lora}
    factors = tiny.factors_of(adapted)
    return {s: (build[s](adapted), tiny.ClassifierOracle(tiny.bert(), factors, EXAMPLES, s)) for s in SPACES}


@pytest.mark.parametrize("name", SPACES)
def test_loss_and_gradient_are_those_of_all_examples_at_once(cases, name):
    space, oracle = cases[name]
    objective = Objective(BATCHES)
    torch.testing.assert_close(flat(space.parameters).detach(), oracle.point, rtol=0, atol=1e-14)
    assert objective.loss(space) == pytest.approx(oracle.loss(oracle.point).item(), rel=1e-12)
    gradient = objective.gradient(space)
    for index in range(3):
        direction = gaussian(space, 0, index)
        expected = oracle.gradient_by_differences(flat(direction))
        assert dot(gradient, direction) == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize("name", SPACES)
def test_hvp_is_the_dense_hessian_times_the_vector(cases, name):
    space, oracle = cases[name]
    objective, H = Objective(BATCHES), oracle.hessian()
    for index in range(3):
        direction = gaussian(space, 1, index)
        found, expected = flat(objective.hvp(space, direction)), H @ flat(direction)
        assert (found - expected).norm() <= 1e-10 * expected.norm()


@pytest.mark.parametrize("name", SPACES)
def test_hvp_is_symmetric_and_takes_part_of_the_parameters(cases, name):
    space, _ = cases[name]
    objective = Objective(BATCHES)
    u, v = gaussian(space, 2, 0), gaussian(space, 2, 1)
    one, two = dot(objective.hvp(space, u), v), dot(u, objective.hvp(space, v))
    assert one == pytest.approx(two, rel=1e-10)
    first = next(iter(space.parameters))
    part = {n: t if n == first else torch.zeros_like(t) for n, t in u.items()}
    torch.testing.assert_close(flat(objective.hvp(space, {first: u[first]})), flat(objective.hvp(space, part)))


@pytest.mark.parametrize("sizes", [(21,), (1, 20), (3, 6, 6, 6), (7, 7, 7)])
def test_batching_and_order_do_not_matter(cases, sizes):
    space, _ = cases["full"]
    reference, other = Objective(BATCHES), Objective([tiny.padded(p) for p in tiny.split(EXAMPLES[::-1], sizes)])
    assert other.weight == reference.weight == 21
    assert other.loss(space) == pytest.approx(reference.loss(space), rel=1e-12)
    first, second = flat(reference.gradient(space)), flat(other.gradient(space))
    assert (first - second).norm() <= 1e-10 * first.norm()


def test_same_input_same_bits(cases):
    space, _ = cases["full"]
    objective = Objective(BATCHES)
    assert objective.loss(space) == objective.loss(space)
    assert torch.equal(flat(objective.gradient(space)), flat(objective.gradient(space)))
    v = gaussian(space, 0, 0)
    assert torch.equal(flat(objective.hvp(space, v)), flat(objective.hvp(space, v)))


def test_derivatives_follow_a_perturbation(cases):
    space, oracle = cases["full"]
    objective, direction = Objective(BATCHES), gaussian(space, 0, 0)
    with space.perturbed(direction, 0.05):
        loss, gradient = objective.loss(space), objective.gradient(space)
    moved = oracle.point + 0.05 * flat(direction)
    assert loss == pytest.approx(oracle.loss(moved).item(), rel=1e-12)
    moved.requires_grad_(True)
    (expected,) = torch.autograd.grad(oracle.loss(moved), moved)
    assert (flat(gradient) - expected).norm() <= 1e-10 * expected.norm()


def test_accuracy_counts_examples(cases):
    space, oracle = cases["full"]
    with torch.no_grad():
        weights = named(space, oracle.point)
        logits = torch.func.functional_call(oracle.base, weights, kwargs=oracle.batch).logits
    hits = int((logits.argmax(-1) == oracle.labels).sum())
    assert 0 < hits < 21
    found = Objective(BATCHES).evaluate(space)
    assert found["accuracy"] == hits / 21
    assert found["matthews"] == pytest.approx(matthews(logits.argmax(-1), oracle.labels), rel=1e-12)
    assert list(found) == ["loss", "accuracy", "matthews"]


def matthews(predicted, labels):
    """From covariances of indicators, over all examples at once."""
    x, y = (F.one_hot(classes, 3).double() for classes in (predicted, labels))
    x, y = x - x.mean(0), y - y.mean(0)
    return float((x * y).sum() / ((x * x).sum() * (y * y).sum()).sqrt())


def test_examples_that_are_masked_do_not_count(cases):
    space, oracle = cases["full"]
    batches = [{**batch, "labels": batch["labels"].clone()} for batch in BATCHES]
    labels = torch.cat([batch["labels"] for batch in batches])
    for batch in batches:
        batch["labels"][0] = -100
    kept = torch.cat([batch["labels"] for batch in batches]) != -100
    with torch.no_grad():
        predicted = torch.cat([space.model(**batch).logits.argmax(-1) for batch in batches])
    found = Objective(batches).evaluate(space)
    assert found["accuracy"] == float((predicted == labels)[kept].double().mean())
    assert found["matthews"] == pytest.approx(matthews(predicted[kept], labels[kept]), rel=1e-12)
    assert 0 < int(kept.sum()) < len(kept) == len(oracle.labels)


def test_tokens_have_no_matthews_correlation_and_numbers_no_metric():
    batch = tiny.language_batch(tiny.examples(vocabulary=30))
    assert list(Objective([batch]).evaluate(WeightSpace.full(tiny.llama()))) == ["loss", "accuracy"]
    model = tiny.bert()
    model.config.problem_type = "regression"
    batch = {**tiny.padded(EXAMPLES), "labels": torch.zeros(21, 3, dtype=torch.float64)}
    assert list(Objective([batch]).evaluate(WeightSpace.all(model))) == ["loss"]


def test_a_language_model_is_weighted_by_predicted_tokens():
    chosen = tiny.examples((2, 12, 3, 9, 2, 2), vocabulary=30)
    parts = [chosen[:1], chosen[1:4], chosen[4:]]
    batches = [tiny.language_batch(part) for part in parts]
    batches[1]["labels"][0, :6] = -100  # a prompt that is not trained on
    whole = tiny.language_batch(chosen)
    whole["labels"][1, :6] = -100
    model = tiny.llama().eval()
    space, objective = WeightSpace.full(model), Objective(batches)
    with torch.no_grad():
        logits = model(input_ids=whole["input_ids"], attention_mask=whole["attention_mask"]).logits
    targets = whole["labels"][:, 1:].flatten()
    predicted = logits[:, :-1].flatten(0, 1)
    exact = F.cross_entropy(predicted.double(), targets, ignore_index=-100)
    counted = targets != -100
    found = objective.evaluate(space)
    assert objective.weight == int(counted.sum()) == 1 + 6 + 2 + 8 + 1 + 1
    assert found["loss"] == pytest.approx(float(exact), rel=1e-6)
    assert found["accuracy"] == float((predicted.argmax(-1) == targets)[counted].float().mean().double())
    mean_of_means = sum(float(model(**b).loss.detach()) for b in batches) / 3
    assert abs(mean_of_means - float(exact)) > 0.01  # the batches tell right from wrong weights
    one, many = Objective([whole]).gradient(space), objective.gradient(space)
    assert norm({n: one[n] - many[n] for n in one}) <= 1e-5 * norm(one)


def test_labels_that_are_not_shifted_are_counted_where_they_stand():
    batch = {"input_ids": torch.ones(2, 3, dtype=torch.long), "labels": torch.tensor([[5, -100, 7], [-100, 1, 1]])}
    assert Objective([batch]).weight == 3
    assert Objective([batch], shifted=False).weight == 4


def test_batches_without_a_term_in_the_loss_are_skipped():
    masked = tiny.language_batch(tiny.examples((4,), vocabulary=30))
    masked["labels"][:] = -100
    real = tiny.language_batch(tiny.examples((4, 6), vocabulary=30))
    space = WeightSpace.full(tiny.llama())
    assert Objective([masked, real]).loss(space) == Objective([real]).loss(space)
    for empty in ([], [masked]):
        with pytest.raises(UserError, match="nothing to compute a loss from"):
            Objective(empty)


def test_a_dataset_is_bucketed_by_length(cases):
    space, _ = cases["full"]
    data = Dataset.from_list([{"input_ids": ids.tolist(), "labels": label} for ids, label in EXAMPLES])

    def collate(rows):
        return tiny.padded([(torch.tensor(r["input_ids"]), r["labels"]) for r in rows])

    objective = Objective.from_dataset(data, collate, batch_size=6, name="train")
    assert objective.name == "train"
    sizes = [len(b["labels"]) for b in objective.batches]
    assert (len(sizes), max(sizes), sum(sizes)) == (4, 6, 21)
    lengths = [n for b in objective.batches for n in b["attention_mask"].sum(1).tolist()]
    assert all(a >= b for a, b in pairwise(lengths))
    assert objective.loss(space) == pytest.approx(Objective(BATCHES).loss(space), rel=1e-12)
    with pytest.raises(UserError, match="is empty"):
        Objective.from_dataset(data.select([]), collate)
    with pytest.raises(UserError, match="batch_size"):
        Objective.from_dataset(data, collate, batch_size=0)


def test_the_digest_tells_contents_apart():
    other = [dict(b) for b in BATCHES]
    other[0]["labels"] = (other[0]["labels"] + 1) % 3
    assert Objective(BATCHES).digest == Objective(BATCHES, name="other").digest
    assert Objective(BATCHES).digest != Objective(other).digest
    assert Objective(BATCHES).digest != Objective(BATCHES[1:]).digest


def test_a_loss_that_is_not_finite_stays_visible():
    space = WeightSpace.full(tiny.bert())
    broken = {next(iter(space.parameters)): torch.full((8, 8), float("nan"), dtype=torch.float64)}
    objective = Objective(BATCHES)
    with space.perturbed(broken):
        assert math.isnan(objective.loss(space))
        with pytest.raises(UserError, match="need a finite one"):
            objective.gradient(space)
        with pytest.raises(UserError, match="need a finite one"):
            objective.hvp(space, gaussian(space, 0, 0))
    assert math.isfinite(objective.loss(space))


def test_weights_outside_the_loss():
    name = "bert.embeddings.word_embeddings.weight"
    few = Objective([tiny.padded(tiny.examples(vocabulary=30))])
    gradient = few.gradient(WeightSpace.named(tiny.bert(), name.replace(".", r"\.")))
    assert not gradient[name][30:].any()  # words that no example contains
    assert gradient[name][:30].any()
    quadratic = tiny.Quadratic([1.0, 2.0])
    quadratic.spare = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(UserError, match="does not depend"):
        Objective([{"x": torch.zeros(3, 1)}]).gradient(WeightSpace.named(quadratic, "spare"))
    both = Objective([{"x": torch.zeros(3, 1)}]).gradient(WeightSpace.all(quadratic))
    assert not both["spare"].any()
    assert both["theta"].any()


def test_a_model_without_loss_is_refused():
    batches = [{k: v for k, v in b.items() if k != "labels"} for b in BATCHES]
    with pytest.raises(UserError, match="returns no loss"):
        Objective(batches).loss(WeightSpace.full(tiny.bert()))
