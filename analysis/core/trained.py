"""Loading a trained adapter onto the base model it was trained on."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from analysis.core.factors import Factors
from bilora.errors import UserError
from bilora.tasks import base_fingerprint
from bilora.training.record import RECORD_FILE
from bilora.training.saved import SavedMethod, load_method

CONFIG_FILE = "adapter_config.json"
ADAPTER_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."


@dataclass(frozen=True)
class Trained:
    """A trained adapter, ready to be measured."""

    model: PeftModel
    """In ``eval()``, nothing trainable."""
    auxiliary: dict[str, Factors] | None = None
    """Bi-LoRA's auxiliary factors by layer, with s2 as scale; None for other methods and foreign adapters."""
    method: str | None = None
    """Registry name of the training method; None for an adapter this project did not train."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """The method's settings."""
    folder: Path | None = None
    """Where it was loaded from."""


def load_trained(folder: Path, model: PreTrainedModel) -> Trained:
    """Put the adapter of ``folder`` (PEFT's files, and ours where there are any) onto its base ``model``.

    ``model`` itself becomes part of the result: PEFT wraps its layers in place. On an error it is unchanged.

    Raises:
        UserError: no adapter in ``folder``, a damaged file, or an adapter that was trained on another base model
            (shapes that do not fit, or another fingerprint than the one recorded in ``train.json``).
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder: give the folder of a trained adapter")
    for name in (CONFIG_FILE, ADAPTER_FILE):
        if not (folder / name).is_file():
            raise UserError(f"{folder} has no {name}: give the folder of a PEFT adapter saved as safetensors")
    try:
        json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{folder / CONFIG_FILE} is damaged ({error}): save the adapter again") from error
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise UserError("the base model carries an adapter already: load the adapter onto a fresh base model")
    check_base(folder, model)
    saved = load_method(folder)
    try:
        adapted = PeftModel.from_pretrained(model, str(folder)).eval()
    except (ValueError, RuntimeError, TypeError) as error:
        reason = " ".join(line.strip() for line in str(error).splitlines()[:2])
        raise UserError(f"PEFT cannot load the adapter of {folder} onto this base model: {reason}") from error
    if saved is None:
        return Trained(adapted, folder=folder)
    return Trained(adapted, auxiliary_factors(saved) or None, saved.name, saved.settings, folder)


def auxiliary_factors(saved: SavedMethod) -> dict[str, Factors]:
    """Bi-LoRA's auxiliary factors by layer, with s2 as scale; none of another method's state."""
    scales: dict[str, float] = json.loads(saved.metadata.get("scales", "{}"))
    return {
        layer: Factors(saved.tensors[f"auxiliary.{layer}.B"], saved.tensors[f"auxiliary.{layer}.A"], scale)
        for layer, scale in scales.items()
        if f"auxiliary.{layer}.A" in saved.tensors
    }


def check_base(folder: Path, model: PreTrainedModel) -> None:
    """Whether the adapter of ``folder`` was trained on this base, by its shapes and by its record if it has one.

    Raises:
        UserError: it was not.
    """
    _check_shapes(folder, model)
    _check_fingerprint(folder, model)


def _check_shapes(folder: Path, model: nn.Module) -> None:
    """Every saved factor fits the linear layer of its name, every other saved tensor the parameter of its name."""
    modules = dict(model.named_modules())
    parameters = dict(model.named_parameters())
    try:
        with safe_open(folder / ADAPTER_FILE, framework="pt") as file:
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise UserError(f"{folder / ADAPTER_FILE} is damaged ({error}): save the adapter again") from error
    for key, shape in shapes.items():
        name = key.removeprefix(PREFIX)
        layer, is_factor, kind = name.partition(".lora_")
        if not is_factor:
            expected = tuple(parameters[name].shape) if name in parameters else shape
            if shape != expected:
                raise UserError(_other_base(folder, name, shape, expected))
            continue
        if layer not in modules:
            raise UserError(f"{folder} adapts {layer}, which this base model lacks: give the base it was trained on")
        weight = getattr(modules[layer], "weight", None)
        if weight is None or kind[0] not in "AB" or len(shape) != 2:
            continue
        outputs, inputs = reversed(weight.shape) if isinstance(modules[layer], Conv1D) else weight.shape
        if (kind[0] == "A" and shape[1] != inputs) or (kind[0] == "B" and shape[0] != outputs):
            raise UserError(_other_base(folder, layer, shape, (outputs, inputs)))


def _other_base(folder: Path, name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> str:
    return (
        f"{folder} was trained on another base model: its {name} is {found}, which does not fit {expected}; "
        "give the base model it was trained on"
    )


def _check_fingerprint(folder: Path, model: PreTrainedModel) -> None:
    record = folder / RECORD_FILE
    if not record.is_file():
        return
    try:
        expected = json.loads(record.read_text()).get("base_fingerprint")
    except (ValueError, AttributeError) as error:
        raise UserError(f"{record} is damaged ({error}): train the adapter again") from error
    if expected is not None and expected != base_fingerprint(model):
        raise UserError(
            f"{folder} was trained on another base model (its fingerprint differs): give the base it was trained on"
        )
