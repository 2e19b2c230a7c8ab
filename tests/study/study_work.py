"""Work for cells in engine tests: importable in worker processes."""

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from analysis.study.store import Store


@dataclass(frozen=True)
class Note:
    """Writes its process and a line to ``log``, waits, then does ``what``: finish, raise, or die."""

    log: Path
    text: str
    what: str = "finish"
    seconds: float = 0.0

    def __call__(self, folder: Path, store: Store) -> dict[str, Any]:
        with self.log.open("a") as stream:
            stream.write(f"{self.text}\n")
        time.sleep(self.seconds)
        if self.what == "raise":
            raise ValueError(f"{self.text} cannot\nmore")
        if self.what == "die":
            os._exit(9)
        (folder / "note.txt").write_text(self.text)
        return {"threads": os.environ["OMP_NUM_THREADS"]}
