"""Pages in a real browser without a window: what their scripts made of them, and what is seen."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no chromium or chrome is installed")

_NARROWEST = 500  # of a window without a screen, so that narrower pages are shown in a frame
_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--enable-unsafe-swiftshader",
    "--hide-scrollbars", "--virtual-time-budget=20000",
)  # fmt: skip
_LISTEN = """<head><script>
window.errors = [];
addEventListener('error', event => errors.push(event.message));
const say = console.error;
console.error = (...words) => { errors.push(words.join(' ')); say(...words); };
</script>"""


class Framed:
    """A page in a frame of ``width`` and ``height`` pixels at the upper left of the window."""

    def __init__(self, source: str, folder: Path, width: int, height: int) -> None:
        self.source, self.folder, self.width, self.height = source, folder, width, height

    def ask(self, *expressions: str, first: str = "") -> list[Any]:
        """The values of JavaScript ``expressions`` once all is drawn, and last what went wrong on the page.

        ``first`` runs a while before them. They see the page's ``document`` as ``page``, its ``window`` as ``inside``.
        """
        values = ", ".join([*expressions, "inside.errors"])
        script = f"""
            const wait = () => new Promise(resolve => setTimeout(resolve, 3000));
            frame.onload = async () => {{
                const inside = frame.contentWindow, page = frame.contentDocument;
                await wait();
                {first}
                await wait();
                found.textContent = JSON.stringify([{values}]);
            }}"""
        dom = self._run("--dump-dom", script)
        answer = re.search(r'id="found">(\[.*?\])</p>', dom, re.DOTALL)
        assert answer, f"no answer from {BROWSER}: {dom[-500:]}"
        answered: list[Any] = json.loads(html.unescape(answer[1]))
        return answered

    def picture(self) -> np.ndarray:
        """RGB of the page, (height, width, 3), in 0…255."""
        path = self.folder / "screenshot.png"
        self._run(f"--screenshot={path}", "")
        with Image.open(path) as picture:
            return np.asarray(picture.convert("RGB"))[: self.height, : self.width].astype(float)

    def _run(self, what: str, script: str) -> str:
        source = html.escape(self.source.replace("<head>", _LISTEN, 1))
        frame = f'<iframe id="frame" style="width:{self.width}px;height:{self.height}px;border:0" srcdoc="{source}">'
        holder = self.folder / "holder.html"
        holder.write_text(
            f'<meta charset="utf-8"><body style="margin:0">{frame}</iframe><p id="found"></p><script>{script}</script>',
            encoding="utf-8",
        )
        shutil.rmtree(self.folder / "profile", ignore_errors=True)
        own = [
            f"--user-data-dir={self.folder / 'profile'}",
            f"--window-size={max(self.width, _NARROWEST)},{self.height}",
        ]
        command = [str(BROWSER), *_FLAGS, *own, what, holder.as_uri()]
        return subprocess.run(command, capture_output=True, text=True, timeout=180, check=True).stdout
