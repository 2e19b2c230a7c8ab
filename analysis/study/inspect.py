"""What recordings and adapter files say by themselves, without examples: the rows of ``bilora inspect``."""

import json
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import pandas as pd
from torch import Tensor

from analysis.core.adapter_files import read_factors
from analysis.core.factors import Factors
from analysis.core.trained import CONFIG_FILE, auxiliary_factors
from analysis.frame import rows_frame
from analysis.study.several import named
from analysis.subspace.compare import compare_adapters
from analysis.subspace.dynamics import run_dynamics
from analysis.subspace.overlap import subspace_overlap
from analysis.subspace.update import inspect_updates
from bilora.errors import UserError
from bilora.tasks import TaskKind, load_model
from bilora.tasks.models import resolve_model
from bilora.training.recording import is_recorded, read_recording
from bilora.training.saved import load_method


def inspect_folders(folders: Sequence[Path], base: str | None = None) -> tuple[pd.DataFrame, list[str]]:
    """The rows of several adapters and runs, with the columns ``method`` and ``seed``, and what is missing, in words.

    Of a saved adapter: its updates, intruder dimensions where the base model is on this machine, its overlap with
    Bi-LoRA's auxiliary pair. Of a recorded run, finished or not: its dynamics. Of several adapters: how alike they are.

    Args:
        folders: of adapters (PEFT) or runs.
        base: the base model; None takes what the adapters name, if that is a built-in or a local folder.

    Raises:
        UserError: a folder with neither adapter nor recording, damaged files, adapters of different base models.
    """
    frames: list[pd.DataFrame] = []
    adapters: dict[tuple[str, int], Mapping[str, Factors]] = {}
    notes: list[str] = []
    weights: dict[str, Tensor] = {}
    for folder, (method, seed) in zip(folders, named(folders), strict=True):
        rows: list[dict[str, Any]] = []
        saved = (folder / CONFIG_FILE).is_file()
        if not saved and not is_recorded(folder):
            raise UserError(f"{folder} holds neither an adapter nor a recording: give folders of adapters or runs")
        if saved:
            factors = read_factors(folder)
            adapters[method, seed] = factors
            if not weights:
                weights = _base_weights(folder, base, notes)
            rows += inspect_updates(factors, weights or None).rows()
            state = load_method(folder)
            auxiliary = auxiliary_factors(state) if state is not None else {}
            if auxiliary:
                rows += subspace_overlap(factors, auxiliary).rows()
        if is_recorded(folder):
            rows += run_dynamics(read_recording(folder)).rows()
        frames.append(_of(rows, method, seed))
    frames += _comparisons(adapters)
    if not any(is_recorded(folder) for folder in folders):
        notes.append("no run was recorded: train with --record N for what happens over steps")
    return pd.concat(frames, ignore_index=True), list(dict.fromkeys(notes))


def _of(rows: list[dict[str, Any]], method: str, seed: int) -> pd.DataFrame:
    frame = rows_frame(rows)
    frame.insert(0, "method", method)
    frame.insert(1, "seed", seed)
    return frame


def _comparisons(adapters: Mapping[tuple[str, int], Mapping[str, Factors]]) -> list[pd.DataFrame]:
    """Methods at one training seed, where some share one; else every pair. The first of a pair is its method."""
    pairs = [*combinations(adapters, 2)]
    alike = [(first, second) for first, second in pairs if first[1] == second[1]]
    frames = []
    for first, second in alike or pairs:
        other = second[0] if first[1] == second[1] else f"{second[0]}, seed {second[1]}"
        rows = compare_adapters(adapters[first], adapters[second], f"with {other}").rows()
        frames.append(_of(rows, *first))
    return frames


def _base_weights(folder: Path, base: str | None, notes: list[str]) -> dict[str, Tensor]:
    """Layer → W0; empty, with a note, where the base model is not on this machine."""
    config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    name = base or config.get("base_model_name_or_path") or ""
    try:
        if base is None and not resolve_model(name).local:
            raise UserError(f"{name or 'the base model'} is not on this machine")
        kind: TaskKind = "causal_lm" if config.get("task_type") == "CAUSAL_LM" else "classification"
        model = load_model(name, kind, None if kind == "causal_lm" else 2)
    except UserError as error:
        if base is not None:
            raise
        notes.append(f"intruder dimensions are left out ({error}): name the base with --model")
        return {}
    weights = {}
    for path, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.dim() == 2:
            weights[path] = weight.detach().T if config.get("fan_in_fan_out") else weight.detach()
    return weights
