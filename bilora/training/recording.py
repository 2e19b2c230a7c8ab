"""What a recorded run leaves behind: its factors and perturbations over time, as safetensors.

    <run>/recording/00000010.safetensors     while it trains: one file a moment, each complete or not there
    <run>/recording.safetensors              afterwards: all moments in one file

Everything of a layer is thin or a number, never of the weight's own size:

    A, B                       the factors that the step started from
    eps_A, eps_B               what was added to them while the descent gradient was taken; absent where nothing was
    auxiliary_A, auxiliary_B   Bi-LoRA's pair in force then
    noise                      of a perturbation E of W itself: ‖E‖² and ‖(I − P_B)·E·(I − P_A)‖²
    gradients                  norms of the gradients of A and B, and of the auxiliary's, before clipping

Tensors are float32, which holds bfloat16 and float16 exactly, or float64.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bilora.errors import UserError

FILE_NAME = "recording.safetensors"
FOLDER_NAME = "recording"
FORMAT = "1"


@dataclass(frozen=True, eq=False)
class LayerMoment:
    """One layer at one moment."""

    A: Tensor  # (r, n)
    B: Tensor  # (m, r)
    scale: float  # s
    eps_A: Tensor | None = None  # (r, n)
    eps_B: Tensor | None = None  # (m, r)
    auxiliary_A: Tensor | None = None  # (r2, n)
    auxiliary_B: Tensor | None = None  # (m, r2)
    auxiliary_scale: float = 1.0  # s2
    noise: tuple[float, float] | None = None  # ‖E‖², ‖(I − P_B)·E·(I − P_A)‖²
    gradients: tuple[float, ...] = ()  # norms of ∂A, ∂B and, where there is an auxiliary, ∂A2, ∂B2

    def factor_step(self) -> tuple[Tensor, Tensor] | None:
        """eps_B and eps_A, zero where one was not perturbed; None where neither was."""
        if self.eps_A is None and self.eps_B is None:
            return None
        eps_B = torch.zeros_like(self.B) if self.eps_B is None else self.eps_B
        return eps_B, torch.zeros_like(self.A) if self.eps_A is None else self.eps_A


TENSORS = ("A", "B", "eps_A", "eps_B", "auxiliary_A", "auxiliary_B")
NUMBERS = ("scale", "auxiliary_scale", "noise", "gradients")


@dataclass(frozen=True, eq=False)
class Moment:
    """A run at the start of optimizer step ``step``, with the perturbation that step applied.

    The last moment of a finished run has ``step`` equal to the number of steps, and factors alone.

    Attributes:
        step: from 0.
        layers: by name in the base model.
        numbers: the method's metrics after the update (``c_over_rho``, …), ``learning_rate``, and at some moments
            ``loss`` and ``loss_perturbed``: of the step's last micro-batch without and with the perturbation, under the
            same dropout masks.
    """

    step: int
    layers: Mapping[str, LayerMoment]
    numbers: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class About:
    """What is recorded: the method, its settings, the seed, every how many steps, and how many there will be."""

    method: str
    settings: Mapping[str, Any]
    seed: int
    every: int
    total: int


@dataclass(frozen=True)
class Recording:
    """The moments of a run, read when asked for.

    Attributes:
        about: of what.
        steps: those recorded, in order.
        finished: whether the run has ended.
    """

    about: About
    steps: tuple[int, ...]
    finished: bool
    _places: Mapping[int, Path]
    _notes: Mapping[int, Mapping[str, Any]]

    def at(self, step: int) -> Moment:
        """The moment of a recorded step.

        Raises:
            UserError: the step was not recorded.
        """
        if step not in self._places:
            raise UserError(f"step {step} was not recorded: choose among {self.steps[0]} … {self.steps[-1]}")
        note = self._notes[step]
        prefix = f"{step}/" if self.finished else ""
        layers = {}
        with _opened(self._places[step]) as file:
            for layer, held in note["layers"].items():
                tensors = {name: file.get_tensor(f"{prefix}{layer}/{name}") for name in held["tensors"]}
                layers[layer] = LayerMoment(**tensors, **{name: _tuple(held[name]) for name in NUMBERS})
        return Moment(step, layers, note["numbers"])

    def __iter__(self) -> Iterator[Moment]:
        return map(self.at, self.steps)

    def __len__(self) -> int:
        return len(self.steps)


def write_moment(folder: Path, moment: Moment, about: About) -> Path:
    """Write one moment of the run in ``folder``, atomically."""
    path = _moments_of(folder) / f"{moment.step:08d}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    held = {
        layer: {name: getattr(found, name) for name in TENSORS if getattr(found, name) is not None}
        for layer, found in moment.layers.items()
    }
    # One dtype in all files: their tensors stay aligned when they are joined.
    wide = any(tensor.dtype == torch.float64 for tensors in held.values() for tensor in tensors.values())
    dtype = torch.float64 if wide else torch.float32
    tensors = {
        f"{layer}/{name}": tensor.detach().to("cpu", dtype).contiguous()
        for layer, named in held.items()
        for name, tensor in named.items()
    }
    layers = {
        layer: {"tensors": [*held[layer]], **{name: getattr(found, name) for name in NUMBERS}}
        for layer, found in moment.layers.items()
    }
    note = {"layers": layers, "numbers": dict(moment.numbers)}
    metadata = {"format": FORMAT, "about": json.dumps(vars(about)), "moments": json.dumps({moment.step: note})}
    temporary = path.with_suffix(".tmp")
    save_file(tensors, temporary, metadata=metadata)
    os.replace(temporary, path)
    return path


def read_recording(run: str | Path) -> Recording:
    """The recording of a run, finished or in progress, by the run's folder.

    Raises:
        UserError: there is none, or a file is damaged.
    """
    run = Path(run)
    whole = run / FILE_NAME
    files = [whole] if whole.is_file() else moment_files(run)
    if not files:
        raise UserError(f"{run} holds no recording: train with --record N")
    places: dict[int, Path] = {}
    notes: dict[int, Mapping[str, Any]] = {}
    about = None
    for path in files:
        metadata = _metadata(path)
        about = About(**json.loads(metadata["about"]))
        for step, note in json.loads(metadata["moments"]).items():
            places[int(step)], notes[int(step)] = path, note
    assert about is not None
    return Recording(about, tuple(sorted(places)), whole.is_file(), places, notes)


def is_recorded(run: str | Path) -> bool:
    """Whether a folder holds a recording."""
    return (Path(run) / FILE_NAME).is_file() or bool(moment_files(Path(run)))


def moment_files(run: Path) -> list[Path]:
    """The single moments of a run in progress, in order of their steps."""
    return sorted(_moments_of(run).glob("*.safetensors"))


def step_of(path: Path) -> int:
    """The step of a single moment's file."""
    return int(path.stem)


def join_moments(run: Path) -> Path:
    """Put the single moments of a run into one file, a piece at a time, and remove them.

    A safetensors file is the length of its header, the header, and the tensors' bytes; so files are joined without
    loading a tensor.
    """
    files, target = moment_files(run), run / FILE_NAME
    header: dict[str, Any] = {}
    moments: dict[str, Any] = {}
    about, start = "", 0
    for path in files:
        found, size = _header(path)
        metadata = found.pop("__metadata__")
        about = metadata["about"]
        moments |= json.loads(metadata["moments"])
        for key, entry in found.items():
            begin, end = entry["data_offsets"]
            header[f"{step_of(path)}/{key}"] = {**entry, "data_offsets": [start + begin, start + end]}
        start += size
    header["__metadata__"] = {"format": FORMAT, "about": about, "moments": json.dumps(moments)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    temporary = target.with_suffix(".tmp")
    with temporary.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for path in files:
            with path.open("rb") as source:
                _skip_header(source)
                shutil.copyfileobj(source, out)
    os.replace(temporary, target)
    shutil.rmtree(_moments_of(run))
    return target


def reopen(run: Path) -> None:
    """Undo :func:`join_moments` for a run that was killed after its last step and before it was finished."""
    whole = run / FILE_NAME
    if not whole.exists():
        return
    recording = read_recording(run)
    for moment in recording:
        write_moment(run, moment, recording.about)
    whole.unlink()


def _moments_of(run: Path) -> Path:
    return run / FOLDER_NAME


def _skip_header(file: BinaryIO) -> bytes:
    return file.read(int.from_bytes(file.read(8), "little"))


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file, and the size of its tensors in bytes."""
    with path.open("rb") as file:
        header: dict[str, Any] = json.loads(_skip_header(file))
        return header, path.stat().st_size - file.tell()


def _metadata(path: Path) -> dict[str, str]:
    with _opened(path) as file:
        metadata: dict[str, str] = file.metadata() or {}
    if metadata.get("format") != FORMAT or not {"about", "moments"} <= metadata.keys():
        raise UserError(f"{path} is no recording of this version of bilora: record the run again")
    return metadata


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, FileNotFoundError) as error:
        raise UserError(f"{path} is damaged ({error}): record the run again") from error


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
