"""The LoRA factors of a layer."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Factors:
    """A low-rank weight ``scale·B·A`` in factored form."""

    B: Tensor  # (out_features, r)
    A: Tensor  # (r, in_features)
    scale: float  # s
