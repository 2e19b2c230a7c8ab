import math

import pytest
import torch

from analysis.core import added, dot, norm, scaled


def test_dot_keeps_float64_accuracy_at_ten_million_entries():
    # A float32 sum would be off by 1e-7 at the very least, and by 1e-3 if it adds one by one.
    v = {"w": torch.rand(10_000_000, generator=torch.Generator().manual_seed(0)) + 1}
    exact = math.fsum((part.double() ** 2).sum().item() for part in v["w"].split(1000))
    assert dot(v, v) == pytest.approx(exact, rel=1e-11)


def test_dot_sums_over_parameters_whatever_their_layout():
    u = {"a": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "b": torch.tensor([5.0])}
    v = {"b": torch.tensor([2.0]), "a": torch.tensor([[1.0, 10.0], [100.0, 1000.0]]).T}
    assert dot(u, v) == 1 + 200 + 30 + 4000 + 10
    assert norm({"a": torch.tensor([3.0]), "b": torch.tensor([4.0])}) == 5


def test_linear_combinations_leave_their_arguments_alone():
    u, v = {"a": torch.tensor([1.0, 2.0])}, {"a": torch.tensor([10.0, 20.0])}
    assert added(u, v, -0.5)["a"].tolist() == [-4, -8]
    assert scaled(u, 3)["a"].tolist() == [3, 6]
    assert (u["a"].tolist(), v["a"].tolist()) == ([1, 2], [10, 20])


@pytest.mark.parametrize("other", [{"b": torch.zeros(2)}, {"a": torch.zeros(1)}, {}])
def test_vectors_over_different_parameters_do_not_mix(other):
    u = {"a": torch.zeros(2)}
    for operation in (dot, added):
        with pytest.raises(ValueError, match=r"different parameters|differ"):
            operation(u, other)
