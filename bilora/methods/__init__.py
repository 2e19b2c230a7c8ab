"""Training methods: one file each, found by name."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from bilora.errors import UserError
from bilora.methods.base import Method, Step
from bilora.methods.bilora import BiLora
from bilora.methods.flat_lora import FlatLora
from bilora.methods.full import FullFineTuning
from bilora.methods.lora import Lora
from bilora.methods.lora_sam import LoraSam

METHODS: dict[str, type[Method]] = {cls.name: cls for cls in (FullFineTuning, Lora, LoraSam, FlatLora, BiLora)}


def method_class(name: str) -> type[Method]:
    """The method registered as ``name``.

    Raises:
        UserError: no such method.
    """
    if name not in METHODS:
        raise UserError(f"unknown method {name!r}: choose one of {', '.join(METHODS)}")
    return METHODS[name]


def build_method(name: str, settings: Mapping[str, Any] | None = None) -> Method:
    """The method registered as ``name`` with ``settings`` over its defaults.

    Raises:
        UserError: unknown method or setting, or a value out of range.
    """
    cls = method_class(name)
    known = [field.name for field in fields(cls)]
    unknown = sorted(set(settings or {}) - set(known))
    if unknown:
        raise UserError(f"{name} has no setting {unknown[0]!r}: it takes {', '.join(known) or 'none'}")
    return cls(**(settings or {}))


__all__ = [
    "METHODS",
    "BiLora",
    "FlatLora",
    "FullFineTuning",
    "Lora",
    "LoraSam",
    "Method",
    "Step",
    "build_method",
    "method_class",
]
