"""Worker processes: one thread each, no noise, no life after their parent."""

import multiprocessing
import os
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def one_thread_each() -> Iterator[None]:
    """Environment in which spawned processes use one thread; the parent's is put back afterwards."""
    wanted = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def start_worker() -> None:
    """Runs first in every worker: one torch thread, quiet libraries, and an end when the parent ends."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    import torch
    import transformers
    from tqdm import tqdm  # type: ignore[import-untyped]

    # Libraries' progress bars share a lock between processes, which a stopped worker could not give back.
    tqdm.set_lock(threading.RLock())
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def _end_with(parent: Any) -> None:
    # A killed parent cannot stop its workers; left alone they would hold locks and memory.
    parent.join()
    os._exit(1)


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Processes started inside the block never see Ctrl-C: it reaches their parent alone, which then stops them."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
