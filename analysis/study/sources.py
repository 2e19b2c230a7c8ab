"""Which source files a result depends on: the static import closure of a module, inside this project."""

import ast
import hashlib
from collections.abc import Collection, Iterable
from functools import cache
from pathlib import Path

import bilora

ROOT = Path(bilora.__file__).resolve().parent.parent
"""The folder that holds the packages ``bilora`` and ``analysis``."""

PACKAGES = ("analysis", "bilora")


def module_file(name: str) -> Path | None:
    """The source file of the project's module ``name``, found without importing it; None for other modules."""
    if name.split(".")[0] not in PACKAGES:
        return None
    base = ROOT.joinpath(*name.split("."))
    for file in (base / "__init__.py", base.with_suffix(".py")):
        if file.is_file():
            return file
    return None


@cache
def _imports(name: str) -> frozenset[str]:
    """Modules of the project that the module ``name`` names in its import statements, wherever they stand.

    ``from package import thing`` counts as ``package.thing`` where that is a module, and else as ``package``.
    """
    file = module_file(name)
    if file is None:
        return frozenset()
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_bytes(), filename=str(file))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                anchor = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1])
                base = f"{anchor}.{base}" if base else anchor
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                found.add(inner if module_file(inner) else base)
    return frozenset(module for module in found if module_file(module) is not None)


def closure(modules: Iterable[str], without: Collection[str] = ()) -> list[str]:
    """``modules`` and every module of the project they import, directly or not, sorted.

    A package's ``__init__`` counts only where something is imported from it by name. Modules in ``without`` are not
    entered.
    """
    reached: set[str] = set()
    pending = [module for module in modules if module_file(module) is not None]
    while pending:
        module = pending.pop()
        if module in reached:
            continue
        reached.add(module)
        pending.extend(_imports(module) - set(without))
    return sorted(reached)


def source_digest(modules: Iterable[str]) -> str:
    """sha256 over the names and sources of the project's ``modules``."""
    digest = hashlib.sha256()
    for module in sorted(modules):
        file = module_file(module)
        if file is not None:
            digest.update(module.encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def training_code(method_module: str, method_modules: Iterable[str]) -> str:
    """Digest of the sources that determine a training with the method defined in ``method_module``.

    The registry imports every method; the files of the others (``method_modules``) do not count.
    """
    own = closure([method_module])
    shared = closure(["bilora.training.run"], without=[m for m in method_modules if m not in own])
    return source_digest({*own, *shared})


def measure_code(measure_module: str) -> str:
    """Digest of the sources that determine a measurement by the function defined in ``measure_module``."""
    core = ("analysis.core.objective", "analysis.core.space", "analysis.core.trained")
    # What hands the examples and the space to the measure counts too, but not all the measures it knows.
    around = ("analysis.study.work", "analysis.study.subset", "analysis.frame")
    return source_digest({*closure([measure_module, *core]), *around})


def presentation_code() -> str:
    """Digest of the sources, templates among them, that turn rows into tables, figures and the page."""
    modules = closure(["analysis.statistics", "analysis.plots", "analysis.report", "analysis.study.results"])
    digest = hashlib.sha256(source_digest(modules).encode())
    for file in sorted(ROOT.joinpath("analysis", "report").glob("report.*")):
        digest.update(file.name.encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()
