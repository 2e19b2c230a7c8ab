"""bilora: fine-tuning that looks for flat minima, and the methods it is compared with."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from bilora.methods import METHODS, BiLora, FlatLora, FullFineTuning, Lora, LoraSam, Method, build_method
    from bilora.training import BiLoraTrainer, MethodMixin

# Imported on first use: torch and transformers take seconds, which `bilora --help` should not.
_HOMES = {
    **dict.fromkeys(
        ("METHODS", "BiLora", "FlatLora", "FullFineTuning", "Lora", "LoraSam", "Method", "build_method"),
        "bilora.methods",
    ),
    **dict.fromkeys(("BiLoraTrainer", "MethodMixin"), "bilora.training"),
}

__all__ = [
    "METHODS",
    "BiLora",
    "BiLoraTrainer",
    "FlatLora",
    "FullFineTuning",
    "Lora",
    "LoraSam",
    "Method",
    "MethodMixin",
    "build_method",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'bilora' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
