"""Symmetric matrices behind the interface that the estimators multiply with. No project code."""

import torch


class Dense:
    """A symmetric matrix, or its diagonal, that remembers the vectors it was multiplied by and how many a call had."""

    def __init__(self, matrix, dtype=torch.float64):
        self.matrix = torch.as_tensor(matrix).to(dtype)
        self.size, self.dtype, self.device = len(self.matrix), dtype, torch.device("cpu")
        self.seen, self.calls = [], []

    @property
    def products(self):
        return sum(self.calls)

    def matmat(self, rows):
        self.calls.append(len(rows))
        self.seen += rows.clone()
        return rows * self.matrix if self.matrix.dim() == 1 else rows @ self.matrix
