"""How much memory is free, on the device and within what a container or a scheduler grants, and how much was taken."""

import sys
from pathlib import Path

import psutil
import torch

CGROUPS = Path("/sys/fs/cgroup")


def free_memory(device: torch.device, *, cgroups: Path = CGROUPS, own: Path = Path("/proc/self/cgroup")) -> int:
    """Bytes that may be taken while half of the memory stays free for others; 0 where less than half is free.

    On CUDA what torch has set aside and does not use counts as free. On the CPU the limits of control groups
    (version 2: containers, Slurm) count as well as the machine's memory.

    Args:
        device: where.
        cgroups: where control groups are mounted.
        own: which of them this process belongs to.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return max(0, free - total // 2)
    memory = psutil.virtual_memory()
    spare = memory.available - memory.total // 2
    for used, limit in _limits(cgroups, own):
        spare = min(spare, limit // 2 - used)
    return max(0, spare)


def peak_memory() -> int:
    """The largest resident set of this process so far, in bytes; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _limits(cgroups: Path, own: Path) -> list[tuple[int, int]]:
    """(used, granted) bytes of this process' control group and of those it lies in, where they have a limit."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return []
    paths = [line.removeprefix("0::/") for line in lines if line.startswith("0::/")]
    found = []
    for path in paths:
        folder = cgroups / path
        for group in (folder, *folder.parents):
            if not group.is_relative_to(cgroups):
                break
            try:
                limit = int((group / "memory.max").read_text())
                cached = _field(group / "memory.stat", "inactive_file")
                found.append((int((group / "memory.current").read_text()) - cached, limit))
            except (OSError, ValueError):  # no such controller, or "max": no limit
                continue
    return found


def _field(file: Path, name: str) -> int:
    fields = dict(line.split() for line in file.read_text().splitlines())
    return int(fields.get(name, 0))
