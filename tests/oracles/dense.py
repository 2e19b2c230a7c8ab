"""Dense Hessian and Gauss–Newton matrix of a mean cross entropy, from plain tensors. No project code.

    L = 1/N·Σ_i −log p_i[y_i],   p_i = softmax(z_i),   J_i = ∂z_i/∂theta
    H = ∇²L,   G = 1/N·Σ_i J_iᵀ·(diag p_i − p_i·p_iᵀ)·J_i

z_i: the logits of example or predicted token i. Source of G: Schraudolph 2002
(fast curvature matrix–vector products); Martens 2020 (new insights on the natural gradient).
"""

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.oracles.tiny import SCALE

IGNORED = -100


def flat(tensors):
    """All entries, one tensor after the other."""
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def relative_error(found, expected):
    """‖found − expected‖ / ‖expected‖ in float64."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


class DenseOracle:
    """Mean cross entropy of a model on one whole batch, as a function of one flat vector.

    Args:
        model: plain, without adapter; it runs without dropout.
        batch: arguments of its forward; one label an example, or one a token.
        parts: the tensors the vector is made of, in their order.
        weights: tensors shaped like ``parts`` → the model's parameters that they determine, by name.
        shifted: whether position t predicts the label of token t+1, or its own.
    """

    def __init__(self, model, batch, parts, weights, shifted=True):
        if hasattr(model, "config"):
            # Attention written out; that of Llama rounds its softmax to float32, torch's own does not.
            model.config._attn_implementation = "sdpa" if model.config.model_type == "llama" else "eager"
        self.model, self.parts, self.weights = model.eval(), parts, weights
        self.point = flat(parts)
        self.inputs = {key: tensor for key, tensor in batch.items() if key != "labels"}
        self.by_token, self.shifted = batch["labels"].dim() == 2, shifted
        targets = batch["labels"][:, 1:] if self.by_token and shifted else batch["labels"]
        targets = targets.flatten()
        self.counted = targets != IGNORED
        self.targets = targets[self.counted]

    @classmethod
    def named(cls, model, batch, names, transposed=(), shifted=True):
        """The vector is the parameters ``names``; those ``transposed`` enter it transposed."""
        values = {name: model.get_parameter(name).detach() for name in names}
        parts = [value.T if name in transposed else value for name, value in values.items()]

        def weights(pieces):
            named = zip(names, pieces, strict=True)
            return {name: piece.T if name in transposed else piece for name, piece in named}

        return cls(model, batch, parts, weights, shifted)

    @classmethod
    def full(cls, base, factors, batch):
        """The vector is the merged weights ``W + s·B·A`` of the layers in ``factors``."""
        names = [f"{layer}.weight" for layer, _, _ in factors]
        merged = [base.get_parameter(f"{layer}.weight").detach() + SCALE * B @ A for layer, A, B in factors]
        return cls(base, batch, merged, lambda pieces: dict(zip(names, pieces, strict=True)))

    @classmethod
    def lora(cls, base, factors, batch):
        """The vector is A, then B, of each layer in ``factors``."""
        frozen = {f"{layer}.weight": base.get_parameter(f"{layer}.weight").detach() for layer, _, _ in factors}

        def weights(pieces):
            pairs = zip(pieces[::2], pieces[1::2], strict=True)
            return {name: W + SCALE * B @ A for (name, W), (A, B) in zip(frozen.items(), pairs, strict=True)}

        return cls(base, batch, [tensor for _, A, B in factors for tensor in (A, B)], weights)

    def logits(self, vector):
        """(N, classes): one row for each term of the loss."""
        sizes = [part.numel() for part in self.parts]
        pieces = [p.view(part.shape) for p, part in zip(vector.split(sizes), self.parts, strict=True)]
        with sdpa_kernel(SDPBackend.MATH):
            logits = torch.func.functional_call(self.model, self.weights(pieces), kwargs=self.inputs).logits
        if self.by_token:
            logits = (logits[:, :-1] if self.shifted else logits).flatten(0, 1)
        return logits[self.counted]

    def loss(self, vector):
        return F.cross_entropy(self.logits(vector), self.targets)

    def hessian(self):
        """(n, n): the gradient differentiated along each axis."""
        point = self.point.clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(self.loss(point), point, create_graph=True)
        return _jacobian(gradient, point)

    def gauss_newton(self):
        """(n, n), from the rows of the Jacobian of the logits."""
        point = self.point.clone().requires_grad_(True)
        logits = self.logits(point)
        J = _jacobian(logits.flatten(), point).view(*logits.shape, -1)
        p = logits.detach().softmax(1)
        curvature = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
        return J.flatten(0, 1).T @ (curvature @ J).flatten(0, 1) / len(p)


def _jacobian(outputs, point, chunk=64):
    """(outputs, n), ``chunk`` rows at a time."""
    axes = torch.eye(len(outputs), dtype=outputs.dtype).split(chunk)
    rows = [torch.autograd.grad(outputs, point, axis, retain_graph=True, is_grads_batched=True)[0] for axis in axes]
    return torch.cat(rows)
