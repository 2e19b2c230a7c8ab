"""The memory that a basis says it takes is what it takes."""

import pytest
import torch

from analysis.curvature import basis
from analysis.curvature.basis import Basis, stored_bytes


@pytest.mark.parametrize(("length", "size", "expected"), [(1, 10, 640), (16, 10, 640), (17, 10, 1280)])
def test_vectors_are_stored_sixteen_at_a_time(length, size, expected):
    assert stored_bytes(length, size, torch.float32) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("length", [1, 3, 4, 9])
def test_long_vectors_stand_in_smaller_matrices(monkeypatch, length, dtype):
    size = 100
    monkeypatch.setattr(basis, "BLOCK", 3 * size * dtype.itemsize)  # three vectors a matrix
    held = Basis(size, dtype, torch.device("cpu"))
    for _ in range(length):
        held.append(torch.zeros(size, dtype=dtype))
    taken = sum(block.untyped_storage().nbytes() for block in held._blocks)
    assert stored_bytes(length, size, dtype) == taken == -(-length // 3) * 3 * size * dtype.itemsize
