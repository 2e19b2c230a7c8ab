"""Random generators addressed by what they are for, not by how many numbers were drawn before."""

import hashlib

import torch


def generator_for(*parts: object, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator whose seed is a hash of ``parts``.

    The same parts give the same stream whatever else has been drawn, so that a noise or a direction named by
    ``(seed, step, parameter name)`` is the same for every compared method, after a resume and on every rank.

    Args:
        parts: values whose ``repr`` identifies the stream, for example ``(seed, step, "encoder.0.query.weight")``.
        device: where the numbers will be drawn. Streams differ between CPU and CUDA.
    """
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return torch.Generator(device=device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)
