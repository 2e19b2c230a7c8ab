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
from analysis.core.trained import CONFIG_FILE, auxiliary_factors, check_base
from analysis.frame import rows_frame
from analysis.study.files import read_json
from analysis.study.several import named
from analysis.subspace.compare import compare_adapters
from analysis.subspace.dynamics import run_dynamics
from analysis.subspace.overlap import subspace_overlap
from analysis.subspace.update import inspect_updates
from bilora.errors import UserError
from bilora.tasks import TaskKind, load_model
from bilora.tasks.models import resolve_model
from bilora.training.record import RECORD_FILE
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
    bases = _Bases(base)
    for folder, (method, seed) in zip(folders, named(folders), strict=True):
        rows: list[dict[str, Any]] = []
        saved = (folder / CONFIG_FILE).is_file()
        if not saved and not is_recorded(folder):
            raise UserError(f"{folder} holds neither an adapter nor a recording: give folders of adapters or runs")
        if saved:
            factors = read_factors(folder)
            adapters[method, seed] = factors
            rows += inspect_updates(factors, bases.weights(folder)).rows()
            state = load_method(folder)
            auxiliary = auxiliary_factors(state) if state is not None else {}
            if auxiliary:
                rows += subspace_overlap(factors, auxiliary).rows()
        if is_recorded(folder):
            rows += run_dynamics(read_recording(folder)).rows()
        frames.append(_of(rows, method, seed))
    _check_one_base(folders)
    frames += _comparisons(adapters)
    notes += bases.missing
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


def _check_one_base(folders: Sequence[Path]) -> None:
    """Whether the adapters that have a record were trained on one base model."""
    recorded = {folder: read_json(folder / RECORD_FILE).get("base_fingerprint") for folder in folders}
    known = [(folder, fingerprint) for folder, fingerprint in recorded.items() if fingerprint is not None]
    for folder, fingerprint in known[1:]:
        if fingerprint != known[0][1]:
            raise UserError(f"{known[0][0]} and {folder} were trained on different base models: inspect them apart")


class _Bases:
    """Base models, each loaded once.

    Args:
        given: the one for all adapters; None takes what each names, if it is on this machine.

    Attributes:
        missing: what could not be had, in words.
    """

    def __init__(self, given: str | None) -> None:
        self._given = given
        self._models: dict[tuple[str, TaskKind], Any] = {}
        self.missing: list[str] = []

    def weights(self, folder: Path) -> dict[str, Tensor] | None:
        """Layer → W0 (out, in) of the base of the adapter in ``folder``; None where it is not on this machine.

        Raises:
            UserError: the model given is not there, or the adapter was trained on another one.
        """
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        name = self._given or config.get("base_model_name_or_path") or ""
        kind: TaskKind = "causal_lm" if config.get("task_type") == "CAUSAL_LM" else "classification"
        try:
            model = self._loaded(name, kind)
        except UserError as error:
            if self._given is not None:
                raise
            self.missing.append(f"intruder dimensions are left out ({error}): name the base with --model")
            return None
        check_base(folder, model)
        transposed = bool(config.get("fan_in_fan_out"))
        found = {path: getattr(module, "weight", None) for path, module in model.named_modules()}
        matrices = {path: w.detach() for path, w in found.items() if isinstance(w, Tensor) and w.dim() == 2}
        return {path: weight.T if transposed else weight for path, weight in matrices.items()}

    def _loaded(self, name: str, kind: TaskKind) -> Any:
        if (name, kind) not in self._models:
            if self._given is None and not resolve_model(name).local:
                raise UserError(f"{name} is not on this machine")
            self._models[name, kind] = load_model(name, kind, None if kind == "causal_lm" else 2)
        return self._models[name, kind]
