"""The balanced gauge of LoRA factors: the pair of the same product in which both share the singular values.

    B·A = U·S·Vᵀ (thin),    B' = U·√S,    A' = √S·Vᵀ,    so that  s·B'·A' = s·B·A  and  B'ᵀ·B' = A'·A'ᵀ = S

``B·M`` and ``M⁻¹·A`` give the same merged weight for every invertible M, yet not the same sharpness in the space of the
factors. The balanced pair depends on the product alone, and has the smallest ‖A‖² + ‖B‖² of all pairs of that product.
"""

import torch

from analysis.core.factors import Factors


@torch.no_grad()
def balanced(factors: Factors) -> Factors:
    """The balanced pair of the same product, of the same rank r, dtype and device; computed in float64.

    Singular values come in descending order, those at rounding level count as zero and leave zero columns of B and zero
    rows of A. The entry of largest magnitude in every column of B is positive, so that the pair is unique as long as no
    singular value is repeated. The scale s stays outside: it does not change the pair.

    Cost: QR decompositions of B and Aᵀ and a singular value decomposition of r × r; the product is not formed.
    """
    B, A = factors.B.detach().double(), factors.A.detach().double()
    left_basis, left = torch.linalg.qr(B)
    right_basis, right = torch.linalg.qr(A.mT)
    U, S, Vh = torch.linalg.svd(left @ right.mT, full_matrices=False)
    rounding = S[0] * max(B.shape[0], A.shape[1]) * torch.finfo(S.dtype).eps
    S = torch.where(rounding < S, S, 0.0)
    U, Vh = left_basis @ U, Vh @ right_basis.mT
    largest = U.gather(0, U.abs().argmax(dim=0, keepdim=True))  # (1, k)
    signs = torch.where(largest < 0, -1.0, 1.0)
    balanced_B, balanced_A = B.new_zeros(B.shape), A.new_zeros(A.shape)
    kept = len(S)  # fewer than r where r exceeds a side of the layer
    balanced_B[:, :kept] = U * signs * S.sqrt()
    balanced_A[:kept] = (Vh * signs.mT) * S.sqrt()[:, None]
    return Factors(balanced_B.to(factors.B.dtype), balanced_A.to(factors.A.dtype), factors.scale)
