"""A plane that is dear to compute, kept beside the points of its surface."""

import json
import os
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from analysis.core.ranks import from_first_rank, rank
from analysis.core.space import WeightSpace
from analysis.landscape.plane import Plane
from analysis.landscape.store import PointStore


def kept_plane(space: WeightSpace, store: PointStore | None, identity: str, make: Callable[[], Plane]) -> Plane:
    """The plane that an earlier call kept, or that of ``make``: the same bits for a run that continues, on every rank.

    Points belong to a plane to the last bit, which eigenvectors of a second computation need not share. Only planes
    through the space's own weights, without marks, are kept.

    Args:
        space: whose vectors the axes are.
        store: of the points; the plane lies beside it. None: nothing is kept.
        identity: names everything that the plane depends on.
        make: computes it.
    """
    path = store.beside("plane.safetensors") if store is not None and rank() == 0 else None
    found = None if path is None else _read(space, path, identity)
    plane = from_first_rank(found)
    if plane is None:
        plane = from_first_rank(make())
        if path is not None:
            _write(path, identity, plane)
    return plane


def _read(space: WeightSpace, path: Path, identity: str) -> Plane | None:
    """None where there is none, or another's."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("plane_of") != identity:
                return None
            u, v = (
                {
                    name: file.get_tensor(f"{number}.{name}").to(parameter)
                    for name, parameter in space.parameters.items()
                }
                for number in (0, 1)
            )
            rest = json.loads(metadata["plane"])
    except (OSError, SafetensorError, ValueError, KeyError):
        return None
    return Plane(rest["kind"], (u, v), None, tuple(rest["axis_labels"]), rest["cosine"], tuple(rest["window"]))


def _write(path: Path, identity: str, plane: Plane) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{number}.{name}": tensor.detach().cpu().contiguous()
        for number, axis in enumerate(plane.axes)
        for name, tensor in axis.items()
    }
    rest = {"kind": plane.kind, "axis_labels": plane.axis_labels, "cosine": plane.cosine, "window": plane.window}
    unfinished = path.with_name(f"{path.name}.tmp")
    save_file(tensors, unfinished, metadata={"plane_of": identity, "plane": json.dumps(rest)})
    os.replace(unfinished, path)
