"""Tall matrices of a few vectors, stored as rows in the weights' own dtype; products with them run in float64."""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from analysis.core.vectors import tensor_dot

Coefficients = NDArray[np.float64]

ROWS = 16
"""Vectors stored in one matrix, by which memory grows, unless they are long."""
BLOCK = 256 << 20
"""Bytes that such a matrix takes at most, if it holds more than one vector."""
COLUMNS = 1 << 14
"""Entries of each vector converted to float64 at a time on a CPU: a tile of 2 MiB, which stays in the cache."""
LAUNCHED = 1 << 22
"""The same elsewhere, where a tile costs launches."""
LITTLE = 0.3
"""Share of a vector's length: a remainder below it is projected again."""


def stored_bytes(length: int, size: int, dtype: torch.dtype) -> int:
    """Memory that a basis of ``length`` vectors takes."""
    rows = _rows(size, dtype)
    return -(-length // rows) * rows * size * dtype.itemsize


def _rows(size: int, dtype: torch.dtype) -> int:
    return max(1, min(ROWS, BLOCK // (size * dtype.itemsize)))


class Basis:
    """Vectors as rows; orthonormal where each is appended after :meth:`project_out` and scaling to length 1.

    Args:
        size: entries of a vector.
        dtype: in which they are stored.
        device: where.
    """

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device) -> None:
        self._blocks: list[Tensor] = []
        self._size, self._dtype, self.device = size, dtype, device
        self._rows = _rows(size, dtype)
        self.length = 0

    def append(self, vector: Tensor) -> None:
        """Add a row."""
        if self.length == len(self._blocks) * self._rows:
            self._blocks.append(torch.empty(self._rows, self._size, dtype=self._dtype, device=self.device))
        self._blocks[-1][self.length % self._rows] = vector
        self.length += 1

    def row(self, index: int) -> Tensor:
        """Row ``index``, (size,)."""
        return self._blocks[index // self._rows][index % self._rows]

    def products(self, vector: Tensor) -> Tensor:
        """⟨row, vector⟩ of every row, (length,), float64."""
        found = torch.zeros(self.length, dtype=torch.float64, device=self.device)
        for rows, columns, tile in self._tiles():
            found[rows] += tile @ vector[columns].double()
        return found

    def project_out(self, vector: Tensor) -> Tensor:
        """Take the projection on the rows away from ``vector``, (size,) of float64, in place.

        It is taken away a second time where little is left, which is then mostly rounding ("twice is enough": Parlett,
        The Symmetric Eigenvalue Problem, section 6.9).

        Returns:
            What was taken away, as coefficients of the rows, (length,).
        """
        before = tensor_dot(vector, vector)
        taken = self._project_once(vector)
        if tensor_dot(vector, vector) < LITTLE**2 * before:
            taken = taken + self._project_once(vector)
        return taken

    def _project_once(self, vector: Tensor) -> Tensor:
        coefficients = self.products(vector)
        for rows, columns, tile in self._tiles():
            vector[columns] -= coefficients[rows] @ tile
        return coefficients

    def combination(self, coefficients: Coefficients) -> Tensor:
        """Σ_i coefficients_i·row_i, float64: (size,), or (m, size) for coefficients (length, m)."""
        weights = torch.from_numpy(np.ascontiguousarray(coefficients.T)).to(self.device)
        result = torch.zeros(*weights.shape[:-1], self._size, dtype=torch.float64, device=self.device)
        for rows, columns, tile in self._tiles():
            result[..., columns] += weights[..., rows] @ tile
        return result

    def compressed(self, coefficients: Coefficients) -> "Basis":
        """A basis of combinations of the rows: ``coefficients`` (length, m)."""
        result = Basis(self._size, self._dtype, self.device)
        for column in coefficients.T:
            result.append(self.combination(column))
        return result

    def truncate(self, length: int) -> None:
        """Forget the rows from ``length`` on."""
        self.length = min(self.length, length)
        del self._blocks[-(-self.length // self._rows) :]

    def residual_norms(self, images: "Basis", coefficients: Coefficients, values: Coefficients) -> Coefficients:
        """‖Σ_i c_ij·images_i − values_j·Σ_i c_ij·row_i‖ of every column j of ``coefficients``, (m,)."""
        weights = torch.from_numpy(np.ascontiguousarray(coefficients.T)).to(self.device)
        scale = torch.from_numpy(values).to(self.device).unsqueeze(1)
        squares = torch.zeros(len(weights), dtype=torch.float64, device=self.device)
        for (_, own), (_, theirs) in zip(self._columns(), images._columns(), strict=True):
            pairs = zip(own, theirs, strict=True)
            parts = [weights[:, rows] @ image - scale * (weights[:, rows] @ tile) for (rows, tile), (_, image) in pairs]
            squares += torch.stack(parts).sum(0).square().sum(1)
        return squares.sqrt().cpu().numpy()

    def _columns(self) -> Iterator[tuple[slice, list[tuple[slice, Tensor]]]]:
        """Per stretch of columns: where it lies, and every block's rows there in float64."""
        step = COLUMNS if self.device.type == "cpu" else LAUNCHED
        for start in range(0, self._size, step):
            columns = slice(start, start + step)
            tiles = []
            for i, block in enumerate(self._blocks):
                rows = slice(i * self._rows, min((i + 1) * self._rows, self.length))
                tiles.append((rows, block[: rows.stop - rows.start, columns].double()))
            yield columns, tiles

    def _tiles(self) -> Iterator[tuple[slice, slice, Tensor]]:
        for columns, tiles in self._columns():
            for rows, tile in tiles:
                yield rows, columns, tile
