import numpy as np
import pytest

from bilora.tasks.splits import stratified_order, unseen


@pytest.mark.parametrize("seed", range(30))
def test_order_is_a_permutation_and_every_prefix_stratified(seed):
    rng = np.random.default_rng(seed)
    shares = rng.dirichlet(np.ones(4))
    labels = rng.choice(4, size=rng.integers(1, 60), p=shares).tolist()
    order = stratified_order(labels, seed, "test")
    assert sorted(order) == list(range(len(labels)))
    shuffled = np.array(labels)[order]
    for label, size in zip(*np.unique(labels, return_counts=True), strict=True):
        taken = np.cumsum(shuffled == label)
        expected = np.arange(1, len(labels) + 1) * size / len(labels)
        assert np.abs(taken - expected).max() <= len(set(labels)) / 2 + 1e-9


def test_order_depends_on_seed_and_purpose_alone():
    labels = [0, 1] * 20
    assert stratified_order(labels, 0, "a") == stratified_order(labels, 0, "a")
    assert stratified_order(labels, 0, "a") != stratified_order(labels, 1, "a")
    assert stratified_order(labels, 0, "a") != stratified_order(labels, 0, "b")


@pytest.mark.parametrize(
    ("texts", "others", "kept"),
    [
        (["a", "b", "A ", "c", "b"], [], [0, 1, 3]),
        (["Good  film", "bad film"], ["good film"], [1]),
        (["ß", "SS"], [], [0]),
    ],
)
def test_unseen(texts, others, kept):
    assert unseen(texts, others) == kept
