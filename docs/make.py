"""Write docs/methods.md from the methods' docstrings, and tables of what was last measured into other pages.

python docs/make.py
"""

import csv
import inspect
import json
import math
import os
import sys
import textwrap
from pathlib import Path

from bilora.methods import ALIASES, METHODS, Method

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "methods.md"
README = ROOT / "README.md"
CURVATURE = ROOT / "docs" / "curvature.md"
LANDSCAPES = ROOT / "docs" / "landscapes.md"
CLAIMS = ROOT / "docs" / "claims.md"
FOUND = ROOT / "docs" / "claims.csv"
TIMES = ROOT / "benchmarks" / "train_step.jsonl"
TOOLS = ROOT / "benchmarks" / "curvature.jsonl"
SURFACES = ROOT / "benchmarks" / "landscape.jsonl"
HEAD = """# Training methods

Made by `make docs` from the docstrings in `bilora/methods/`; `bilora methods NAME` prints the same. Notation:
`W = W0 + s·B·A` is the merged weight of an adapted layer, `G = ∂L/∂W`, `eta` the learning rate, `‖·‖` the Frobenius
norm, over all layers unless said otherwise. Passes are forward and backward passes of each micro-batch; what a step
costs in fact is in `benchmarks/train_step.jsonl`.

Settings named `schedule` take {schedules}; what each does is in `bilora/methods/schedules.py`.
"""


def page() -> str:
    """The whole page."""
    from bilora.methods.schedules import SCHEDULES

    lines = [HEAD.format(schedules=", ".join(f"`{name}`" for name in SCHEDULES))]
    lines += ["| name | passes | memory beside LoRA | what it does |", "| --- | --- | --- | --- |"]
    lines += [f"| [`{n}`](#{n}) | {cls.passes:g} | {cls.memory} | {cls.summary} |" for n, cls in METHODS.items()]
    return "\n".join(lines) + "\n\n" + "\n".join(section(cls) for cls in METHODS.values())


def section(cls: type[Method]) -> str:
    """One method: equations, facts, settings."""
    title, _, equations = (inspect.getdoc(sys.modules[cls.__module__]) or "").partition("\n\n")
    also = [alias for alias, name in ALIASES.items() if name == cls.name]
    facts = {
        "Source": cls.source,
        "Passes": f"{cls.passes:g}",
        "Memory beside LoRA": cls.memory,
        "When": cls.when,
        "Also called": ", ".join(f"`{alias}`" for alias in also),
    }
    body = [f"## {cls.name}", "", title, "", "```text", textwrap.dedent(equations).strip("\n"), "```", ""]
    body += [f"- {key}: {value}" for key, value in facts.items() if value]
    settings = cls().settings()
    if settings:
        told = arguments(cls)
        body += ["", "| setting | default | meaning |", "| --- | --- | --- |"]
        body += [f"| `{name}` | `{value}` | {told[name]} |" for name, value in settings.items()]
    return "\n".join(body) + "\n"


def arguments(cls: type[Method]) -> dict[str, str]:
    """Setting → its sentence in the ``Args`` of the class's docstring."""
    text = inspect.getdoc(cls) or ""
    block = text.partition("Args:\n")[2].partition("\n\n")[0]
    told: dict[str, str] = {}
    name = ""
    for line in textwrap.dedent(block).splitlines():
        if line.startswith(" "):
            told[name] += " " + line.strip()
        else:
            name, _, told[name] = line.partition(": ")
    return {
        name: sentence.replace("``", "`").replace(":mod:", "").replace("|", "\\|") for name, sentence in told.items()
    }


def filled(path: Path, name: str, table: str) -> str:
    """The page with ``table`` between its comments ``name:begin`` and ``name:end``."""
    begin, end = f"<!-- {name}:begin -->\n", f"<!-- {name}:end -->"
    before, _, rest = path.read_text(encoding="utf-8").partition(begin)
    return before + begin + table + end + rest.partition(end)[2]


def tools_table() -> str:
    """What the top eigenpairs cost in each tool."""
    head = ("problem", "k", "tool", "products", "CPU s", "gradients", "worst true residual", "met 1e-3")
    lines = [f"| {' | '.join(head)} |", "|---|---|---|---|---|---|---|---|"]
    for line in map(json.loads, TOOLS.read_text().splitlines()):
        numbers = (f"{line['seconds']:.3g}", f"{line['gradient_equivalents']:.0f}", f"{line['max_residual']:.0e}")
        met = "yes" if line["target_met"] else "no"
        cells = (line["setting"], str(line["k"]), line["tool"], str(line["products"]), *numbers, met)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def surfaces_table() -> str:
    """What a loss surface costs in each tool, and how far it is off."""
    head = (
        "variant",
        "points evaluated",
        "CPU s",
        "times as fast by the point of the grid",
        "largest error",
        "rms error",
    )
    lines = [f"| {' | '.join(head)} |", "|---|---|---|---|---|---|"]
    for line in map(json.loads, SURFACES.read_text().splitlines()):
        errors = [f"{line[name]:.1g}" if name in line else "other points" for name in ("max_error", "rms_error")]
        cells = (line["variant"], str(line["points"]), f"{line['seconds']:.3g}", f"{line['speedup']:.2g}", *errors)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def methods_table() -> str:
    """Every method with its passes and its measured and published time over LoRA."""
    times = {(line["model"], line["method"]): line for line in map(json.loads, TIMES.read_text().splitlines())}

    def ratio(model: str, name: str, key: str) -> str:
        value = times.get((model, name), {}).get(key)
        return "" if value is None else f"{value:.2f}"

    lines = ["| name | what it does | passes | MiniLM | SmolLM2 | published |", "|---|---|---|---|---|---|"]
    for name, cls in METHODS.items():
        measured = [ratio(model, name, "ratio_time") for model in ("minilm", "smollm2")]
        cells = [f"`{name}`", cls.summary, f"{cls.passes:g}", *measured, ratio("minilm", name, "published_ratio")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def claims_table() -> str:
    """What the study of the paper's claims found: a line a quantity, a column a method."""
    with FOUND.open(encoding="utf-8", newline="") as file:
        rows = [*csv.DictReader(file)]
    methods = list(dict.fromkeys(row["method"] for row in rows))
    lines = [f"| {' | '.join(['', *methods, 'chance'])} |", f"|{'---|' * (len(methods) + 2)}"]
    for quantity in dict.fromkeys(row["quantity"] for row in rows):
        here = {row["method"]: row for row in rows if row["quantity"] == quantity}
        chance = next((f"{float(row['chance']):.3g}" for row in here.values() if row["chance"]), "")
        cells = [_found(here[method]) if method in here else "" for method in methods]
        lines.append(f"| {' | '.join([quantity, *cells, chance])} |")
    return "\n".join(lines) + "\n"


def _found(row: dict[str, str]) -> str:
    mean, half = float(row["mean"]), float(row["half_width"] or "nan")
    star = r"\*" if row["verdict"] in ("lower", "higher") else ""
    if math.isnan(half):  # a p-value
        return f"{mean:.1g}" if mean > 1e-16 else "< 1e-16"
    digits = 2 if not half else max(0, 1 - math.floor(math.log10(max(abs(mean) / 100, half))))
    if abs(mean) < 1e-3 and digits > 4:
        return f"{mean:.1e} ± {half:.0e}{star}"
    return f"{mean:.{digits}f} ± {half:.{digits}f}{star}"


def pages() -> dict[Path, str]:
    """Every page that this script writes, and what it should hold."""
    return {
        PAGE: page(),
        README: filled(README, "methods", methods_table()),
        CURVATURE: filled(CURVATURE, "tools", tools_table()),
        LANDSCAPES: filled(LANDSCAPES, "surfaces", surfaces_table()),
        CLAIMS: filled(CLAIMS, "found", claims_table()),
    }


def main() -> None:
    for path, text in pages().items():
        temporary = path.with_suffix(".tmp")
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)


if __name__ == "__main__":
    main()
