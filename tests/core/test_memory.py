"""Free memory: half of what the machine, or a control group, has is left to others."""

import psutil
import pytest
import torch

from analysis.core.memory import free_memory

CPU = torch.device("cpu")
GIB = 1 << 30


@pytest.fixture
def machine(monkeypatch):
    """A machine with 64 GiB, 60 of them free."""
    memory = psutil.virtual_memory()._replace(total=64 * GIB, available=60 * GIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)


def group(folder, limit, used, cached=0):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\ninactive_file {cached}\n")


def spare(tmp_path, own):
    (tmp_path / "own").write_text(f"4:memory:/elsewhere\n0::/{own}\n")
    return free_memory(CPU, cgroups=tmp_path / "groups", own=tmp_path / "own")


def test_half_of_the_machine_is_left(machine, tmp_path):
    assert spare(tmp_path, "") == 28 * GIB


def test_nothing_is_free_on_a_full_machine(monkeypatch, tmp_path):
    memory = psutil.virtual_memory()._replace(total=64 * GIB, available=20 * GIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    assert spare(tmp_path, "") == 0


@pytest.mark.parametrize("limited", ["", "slurm", "slurm/job"])
def test_the_limit_of_any_group_above_counts(machine, tmp_path, limited):
    group(tmp_path / "groups" / "slurm" / "job", "max", GIB)
    group(tmp_path / "groups" / limited, 8 * GIB, 3 * GIB, cached=GIB)
    assert spare(tmp_path, "slurm/job") == 2 * GIB


def test_a_group_without_limit_or_without_files_changes_nothing(machine, tmp_path):
    group(tmp_path / "groups" / "slurm", "max", GIB)
    assert spare(tmp_path, "slurm") == 28 * GIB
    assert spare(tmp_path, "other") == 28 * GIB
    assert free_memory(CPU, own=tmp_path / "missing") == 28 * GIB
