"""The LoRA factors in an adapter's folder, without its base model."""

import json
import math
import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from analysis.core.factors import Factors
from analysis.core.trained import ADAPTER_FILE, CONFIG_FILE, PREFIX
from bilora.errors import UserError

_KEY = re.compile(r"^(?P<layer>.+)\.lora_(?P<factor>[AB])\.(?:[^.]+\.)?weight$")
_OTHERS = re.compile(r"\.lora_(embedding_[AB]|magnitude_vector)")


def read_factors(folder: str | Path) -> dict[str, Factors]:
    """Layer → factors of the plain LoRA adapter that PEFT saved in ``folder``, in the file's order of layers.

    Raises:
        UserError: no adapter there, a damaged file, or an adapter whose merged weight is not ``W0 + s·B·A`` of linear
            layers.
    """
    folder = Path(folder)
    config, path = _config(folder), folder / ADAPTER_FILE
    if not path.is_file():
        raise UserError(f"{folder} has no {ADAPTER_FILE}: save the adapter as safetensors")
    found: dict[str, dict[str, Any]] = {}
    try:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (not a dict)
                match = _KEY.match(key.removeprefix(PREFIX))
                if match:
                    found.setdefault(match["layer"], {})[match["factor"]] = file.get_tensor(key)
                elif _OTHERS.search(key):
                    raise UserError(f"{folder} adapts {key.removeprefix(PREFIX)}: only LoRA on linear layers is read")
    except SafetensorError as error:
        raise UserError(f"{path} is damaged ({error}): save the adapter again") from error
    for layer, pair in found.items():
        if pair.keys() != {"A", "B"} or pair["A"].dim() != 2 or pair["A"].shape[0] != pair["B"].shape[1]:
            raise UserError(f"{path}: the factors of {layer} are no pair of a linear layer: save the adapter again")
    if not found:
        raise UserError(f"{folder} holds no LoRA factors: give the folder of a LoRA adapter")
    return {
        layer: Factors(pair["B"], pair["A"], _scale(config, layer, pair["A"].shape[0])) for layer, pair in found.items()
    }


def _config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise UserError(f"{folder} has no {CONFIG_FILE}: give the folder of a PEFT adapter")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        kind = config["peft_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}): save the adapter again") from error
    if kind != "LORA":
        raise UserError(f"{folder} holds a {kind} adapter: only LoRA has factors A and B to inspect")
    if config.get("use_dora"):
        raise UserError(f"{folder} holds a DoRA adapter, whose merged weight is not W0 + s·B·A: it is not inspected")
    return dict(config)


def _scale(config: dict[str, Any], layer: str, rank: int) -> float:
    """s, with PEFT's patterns: a key names the end of a layer's path, as a regular expression."""
    patterns = config.get("alpha_pattern") or {}
    own = next((alpha for key, alpha in patterns.items() if re.match(rf"(.*\.)?({key})$", layer)), None)
    alpha = config.get("lora_alpha", rank) if own is None else own
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)
