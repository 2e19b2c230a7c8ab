"""What a study reads from outside: data files and base models, told apart by content and not by place."""

import hashlib
import platform
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

from analysis.study.store import file_digest
from bilora.tasks import TaskSpec, resolve_model
from bilora.tasks.packages import ROTTEN_TOMATOES
from bilora.tasks.sources import BUILT_IN_DATA, SPLITS

PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "tokenizers", "numpy")
"""Libraries whose version may change a number."""


def library_versions() -> dict[str, str]:
    """Version of each of :data:`PACKAGES`, and of Python."""
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in PACKAGES}}


def data_identity(task: TaskSpec) -> dict[str, Any]:
    """The task as it counts for a result: its settings, with the content of its files in place of their path.

    Raises:
        UserError: the package that carries a built-in is missing.
    """
    identity = task.model_dump(mode="json")
    path = ROTTEN_TOMATOES.path() if task.data in BUILT_IN_DATA else Path(task.data)
    if path.is_dir():
        files = [file for file in path.iterdir() if file.is_file() and file.stem in SPLITS]
    else:
        files = [path] if path.is_file() else []
    return {**identity, "data": path.suffix, "content": content_digest(files)}


def model_identity(name: str) -> dict[str, Any]:
    """The base model as it counts for a result: the content of its files, or the name it has on the hub.

    Raises:
        UserError: no such local model.
    """
    spec = resolve_model(name)
    if not spec.local:
        return {"hub": name}
    folder = Path(spec.location)
    files = [folder / spec.gguf_file] if spec.gguf_file else [f for f in folder.iterdir() if f.is_file()]
    return {"content": content_digest(files)}


def content_digest(files: Iterable[Path]) -> str:
    """sha256 over names and contents, in the order of names."""
    digest = hashlib.sha256()
    for file in sorted(files, key=lambda file: file.name):
        digest.update(file.name.encode() + b"\0" + bytes.fromhex(file_digest(file)))
    return digest.hexdigest()
