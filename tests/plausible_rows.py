"""Invented rows in the shape a study writes, for tests of what is drawn from rows. Nothing here was measured."""

import numpy as np
import pandas as pd

METHODS = ["Full FT", "LoRA", "LoRA-SAM", "Flat-LoRA", "Bi-LoRA"]
SHARPNESS = {"Full FT": 1.1, "LoRA": 1.0, "LoRA-SAM": 0.8, "Flat-LoRA": 0.6, "Bi-LoRA": 0.45}
RADII = [0.05, 0.1, 0.2, 0.5]
LAYERS = [
    f"encoder.layer.{block}.{module}"
    for block in range(3)
    for module in ("attention.self.query", "attention.self.value", "attention.output.dense", "intermediate.dense")
]
COLUMNS = {
    "study": "invented", "method": "", "seed": 0, "cell": "c0ffee", "measure": "", "space": "", "quantity": "",
    "kind": "", "split": "", "layer": "", "label": "", "radius": np.nan, "y": np.nan, "index": -1, "value": np.nan,
    "standard_error": np.nan, "induced_norm": np.nan, "residual": np.nan, "chance": np.nan,
}  # fmt: skip


def plausible_rows(methods: list[str] = METHODS, seeds: int = 3, directions: int = 5) -> pd.DataFrame:
    """Every measure of every method and seed; full fine-tuning has no LoRA space."""
    rng, rng_curvature = np.random.default_rng(0), np.random.default_rng(1)
    rng_landscapes, rng_groups = np.random.default_rng(2), np.random.default_rng(3)
    rng_runs, rng_robustness = np.random.default_rng(4), np.random.default_rng(5)
    rows: list[dict[str, object]] = []
    for method in methods:
        for seed in range(seeds):
            spaces = ["full"] if method == "Full FT" else ["lora", "full"]
            scale = SHARPNESS.get(method, 0.7) * np.exp(0.12 * rng.standard_normal())
            measured = [*_quality(rng)]
            for space in spaces:
                measured += _sharpness(rng, space, scale, directions)
                measured += _spectrum(rng, space, scale)
                measured += _landscape(rng, space, scale, directions)
                measured += _density(rng_curvature, space, scale)
            measured += _subspace(rng, method)
            measured += _runs(rng_runs, method)
            if method != "Full FT":
                measured += _layers(rng_curvature, scale)
            for space in spaces:
                measured += _surface(rng_landscapes, space, scale, "filter")
                measured += _worst_case(rng_landscapes, space, scale)
                measured += _m_sharpness(rng_groups, space, scale)
                measured += _connectivity(rng_landscapes, method, space, scale)
            measured += _robustness(rng_robustness, method, scale)
            for kind in ("eigenvectors", "adapters", "trajectory"):
                measured += _surface(rng_landscapes, "full", scale, kind)
            rows += [{**COLUMNS, "method": method, "seed": seed, **row} for row in measured]
    return pd.DataFrame(rows)


def _quality(rng):
    for split, loss, accuracy in (("train", 0.20, 0.93), ("validation", 0.45, 0.81)):
        for quantity, value in (("loss", loss), ("accuracy", accuracy)):
            noisy = value + 0.01 * rng.standard_normal()
            yield {"measure": "quality", "quantity": quantity, "split": split, "value": noisy}


def _sharpness(rng, space, scale, directions):
    stretch = 3.0 if space == "lora" else 1.0
    for kind in ("isotropic", "filter"):
        for radius in RADII:
            rises = scale * (stretch * radius) ** 2 * (1 + 0.5 * rng.standard_normal(directions))
            common = {"measure": "random", "space": space, "kind": kind, "split": "train", "radius": radius}
            for index, rise in enumerate(rises):
                yield {
                    **common,
                    "quantity": "loss_rise",
                    "index": index,
                    "value": rise,
                    "induced_norm": radius * stretch,
                }
            error = rises.std(ddof=1) / np.sqrt(directions)
            yield {**common, "quantity": "loss_rise_mean", "value": rises.mean(), "standard_error": error}
    for radius in [0.0, *RADII]:
        rise = scale * 2 * radius * stretch * (1 + 0.1 * rng.standard_normal())
        common = {"measure": "adversarial", "space": space, "kind": "gradient", "split": "train", "radius": radius}
        norm = {"induced_norm": radius * stretch}
        yield {**common, **norm, "quantity": "loss", "value": 0.2 + rise}
        yield {**common, **norm, "quantity": "accuracy", "value": max(0.5, 0.93 - 0.3 * rise)}
        yield {**common, **norm, "quantity": "matthews", "value": max(0.0, 0.86 - 0.6 * rise)}
        if radius:
            yield {**common, **norm, "quantity": "loss_rise", "value": rise}
            yield {**common, "quantity": "first_order", "value": scale * radius}


def _spectrum(rng, space, scale):
    for rank, value in enumerate((9.0, 5.0, 3.2, -2.5, 1.9), start=1):
        size = value * scale * (2.0 if space == "lora" else 1.0) * (1 + 0.1 * rng.standard_normal())
        residual = 10 ** rng.uniform(-5, -3)
        common = {"measure": "spectrum", "space": space, "split": "train"}
        yield {**common, "quantity": "eigenvalue", "index": rank, "value": size, "residual": residual}
    yield {"measure": "spectrum", "space": space, "split": "train", "quantity": "products", "value": 24}


def _density(rng, space, scale):
    """A bulk at 0 and six single eigenvalues of ten thousand."""
    size, stretch = 10_000, scale * (2.0 if space == "lora" else 1.0)
    alone = stretch * np.array([9.0, 5.0, 3.2, 1.9, -0.8, -2.5]) * (1 + 0.1 * rng.standard_normal(6))
    centres, weights = np.append(alone, 0.0), np.append(np.full(6, 1 / size), 1 - 6 / size)
    widths = np.append(0.25 * abs(alone), 0.05 * stretch)
    at = 0.05 * np.sinh(np.linspace(-6, 7, 61))
    bells = np.exp(-0.5 * ((at[:, None] - centres) / widths) ** 2) / (widths * np.sqrt(2 * np.pi))
    common = {"measure": "density", "space": space, "split": "train"}
    for index, (radius, value) in enumerate(zip(at, bells @ weights, strict=True)):
        error = 0.3 * value
        place = {"radius": radius, "index": index}
        yield {**common, **place, "quantity": "density", "value": value, "standard_error": error}
    yield {**common, "quantity": "trace", "value": size * float(centres @ weights), "standard_error": 0.5}
    yield {**common, "quantity": "runs", "value": 8}


def _layers(rng, scale):
    common = {"measure": "layers", "space": "lora", "split": "train"}
    for depth, layer in enumerate(LAYERS):
        value = 2.0 * scale * np.exp(rng.standard_normal() - 0.1 * depth)
        of_layer = {**common, "layer": layer}
        residual = 10 ** rng.uniform(-5, -3)
        yield {**of_layer, "quantity": "eigenvalue", "index": 1, "value": value, "residual": residual}
        yield {**of_layer, "quantity": "converged", "index": 1, "value": 1.0}
        yield {**of_layer, "quantity": "trace", "value": 30 * value, "standard_error": 0.5 * value}


def _landscape(rng, space, scale, directions):
    stretch = 2.0 if space == "lora" else 1.0
    for index in range(directions):
        tilt, bend = 0.05 * rng.standard_normal(), scale * stretch * (1 + 0.4 * rng.standard_normal())
        for alpha in np.linspace(-1, 1, 21).round(3):
            loss, norm = 0.2 + tilt * alpha + abs(bend) * alpha**2, abs(alpha) * stretch
            yield {
                "measure": "landscape", "space": space, "quantity": "loss", "kind": "filter", "split": "train",
                "radius": alpha, "index": index, "value": loss, "induced_norm": norm,
            }  # fmt: skip


def _surface(rng, space, scale, kind, points=11):
    """A bowl with a ripple on ``points``² points, a third "evaluated"; marks at the same places in every seed."""
    stretch = 2.0 if space == "lora" else 1.0
    tilt = 0.02 * rng.standard_normal(2)
    low, high = (-1.0, 1.0) if kind in ("filter", "eigenvectors") else (-0.5, 2.5)
    at, steep = np.linspace(low, high, points).round(3), 0.8 if high == 1 else 0.1

    def loss(x, y):
        bowl = scale * stretch * (x**2 + 0.4 * y**2 + 0.3 * x * y)
        return 0.2 + (tilt @ (x, y) + bowl + 0.05 * np.sin(3 * x) ** 2) * np.exp(steep * (x**2 + y**2))

    common = {"measure": "surface", "space": space, "kind": kind, "split": "train"}
    for index, (y, x) in enumerate((y, x) for y in at for x in at):
        place = {**common, "radius": x, "y": y, "index": index, "value": loss(x, y)}
        yield {**place, "quantity": "loss", "residual": 0.01 if index % 3 else np.nan}
    labels = {
        "filter": ("x, in filter norms", "y, in filter norms"),
        "eigenvectors": ("along v₁ (λ = 9.1), distance", "along v₂ (λ = 5.2), distance"),
        "adapters": ("distance from seed 0 to seed 1", "distance across"),
        "trajectory": ("1st principal axis, distance", "2nd principal axis, distance"),
    }[kind]
    for index, label in enumerate(labels, start=1):
        yield {**common, "quantity": "axis", "index": index, "label": label, "value": 1.0}
    marks = []
    if kind == "adapters":
        marks = [("seed 0", 0.0, 0.0, 0.0), ("seed 1", 2.0, 0.0, 0.0), ("seed 2", 0.9, 1.8, 0.0)]
    if kind == "trajectory":
        steps = np.linspace(1, 0, 6)
        marks = [(f"step {20 * n}", 2 * t, 2 * t * (1.6 * t - 0.6), 0.1 * t) for n, t in enumerate(steps)]
        for index, share in enumerate((0.86, 0.09), start=1):
            yield {**common, "quantity": "explained_variance", "index": index, "value": share}
    for index, (label, x, y, off) in enumerate(marks):
        place = {"label": label, "radius": x, "y": y, "index": index, "residual": off}
        yield {**common, **place, "quantity": "mark", "value": loss(x, y) + off**2}
    worth = {"cosine": 0.003, "evaluated": points**2 // 3 + 1, "interpolation_error": 0.01, "precision_error": 0.0}
    for quantity, value in worth.items():
        yield {**common, "quantity": quantity, "value": value}


def _worst_case(rng, space, scale, steps=20):
    stretch = 3.0 if space == "lora" else 1.0
    for radius in RADII:
        rise = scale * 3 * radius * stretch * (1 + 2 * radius) * (1 + 0.1 * rng.standard_normal())
        common = {"measure": "worst_case", "space": space, "kind": "isotropic", "split": "train", "radius": radius}
        other = 1 - 0.1 * abs(rng.standard_normal())
        found = {"loss_rise": 1.0, "loss_rise_pga": 1.0, "loss_rise_apgd": other, "loss_rise_one_step": 0.7 * other}
        for quantity, share in found.items():
            yield {**common, "quantity": quantity, "value": share * rise, "induced_norm": radius * stretch}
        for step in range(steps + 1):
            value = rise * (1 - 0.3 * np.exp(-0.3 * step))
            yield {**common, "quantity": "best_rise", "index": step, "value": value}


def _m_sharpness(rng, space, scale, examples=256):
    stretch = 3.0 if space == "lora" else 1.0
    for m in (8, 32, 128):
        common = {"measure": "m_sharpness", "space": space, "kind": f"m={m}", "split": "train"}
        for quantity, value in (("groups", examples // m), ("steps", 1), ("restarts", 1)):
            yield {**common, "quantity": quantity, "value": value}
        for radius in RADII[:3]:
            rise = scale * 2 * radius * stretch * (256 / m) ** 0.4 * (1 + 0.1 * rng.standard_normal())
            spread = {"standard_error": rise * 0.8 / np.sqrt(examples / m), "induced_norm": radius * stretch}
            yield {**common, **spread, "quantity": "loss_rise", "radius": radius, "value": rise}


def _connectivity(rng, method, space, scale):
    hill = 0.4 * scale * (1.5 if space == "lora" else 1.0) * (1 + 0.1 * rng.standard_normal())
    ends = 0.2 + 0.02 * rng.standard_normal(2)
    common = {"measure": "connectivity", "space": space, "split": "train", "label": f"{method} – start"}
    for t in np.linspace(0, 1, 11).round(3):
        loss = (1 - t) * ends[0] + t * ends[1] + 4 * hill * t * (1 - t)
        yield {**common, "quantity": "loss", "radius": t, "value": loss}
    yield {**common, "quantity": "barrier", "value": hill}


def _subspace(rng, method):
    if method == "Bi-LoRA":
        for layer in ["", *LAYERS]:
            for kind in ("column", "row"):
                value = rng.uniform(0.03, 0.3)
                yield {
                    "measure": "subspace", "space": "lora", "quantity": "overlap", "kind": kind, "layer": layer,
                    "value": value, "chance": 8 / 384,
                }  # fmt: skip
    if method == "Full FT":
        return
    shares = {"gradient": 0.7, "gradient_rank_r": 0.6, "filter_noise": 0.95, "lora_sam": 0.0}
    if method == "Bi-LoRA":
        shares["auxiliary"] = 0.85
    for kind, share in shares.items():
        for layer in ["", *LAYERS[:2]]:
            value = min(1.0, max(0.0, share + 0.02 * rng.standard_normal()))
            yield {
                "measure": "subspace", "space": "lora", "quantity": "outside_share", "kind": kind, "split": "train",
                "layer": layer, "value": value, "chance": 0.96,
            }  # fmt: skip


def _robustness(rng, method, scale):
    """Rounded weights, read noise, and the auxiliary's own rise."""
    common = {"space": "full", "split": "train", "quantity": "loss_rise"}
    for kind, rise in (("int8", 1e-3), ("nf4", 0.02), ("nf4 base", 0.015)):
        value = scale * rise * (1 + 0.1 * rng.standard_normal())
        yield {**common, "measure": "quantisation", "kind": kind, "value": value}
    for sigma in (0.02, 0.05, 0.1):
        noise = {**common, "measure": "read_noise", "kind": "base", "radius": sigma}
        for index in range(4):
            value = scale * sigma**2 * (8 + rng.standard_normal())
            yield {**noise, "index": index, "value": value, "induced_norm": 30 * sigma}
    if method == "Bi-LoRA":
        for kind, rise in (("auxiliary", 0.004), ("gradient", 0.05)):
            value = rise * (1 + 0.2 * rng.standard_normal())
            yield {**common, "measure": "ascent_gap", "kind": kind, "value": value, "induced_norm": 0.05}


def _runs(rng, method):
    """Dynamics of a recorded run, the spectrum of its update, and how well perturbations ascend."""
    if method == "Full FT":
        return
    update = {"measure": "update", "space": "full", "quantity": "singular_value"}
    for layer in LAYERS:
        for index in range(1, 9):
            yield {**update, "layer": layer, "index": index, "value": 0.5 / index * np.exp(0.1 * rng.standard_normal())}
    shares = {"lora_sam": 0.7, "gradient": 0.95, "gradient_rank_r": 0.9, "filter_noise": 0.02, "isotropic": 0.0}
    shares |= {"auxiliary": 0.4} if method == "Bi-LoRA" else {}
    for kind, share in shares.items():
        where = {"measure": "efficiency", "quantity": "efficiency", "kind": kind, "space": "full", "radius": 0.05}
        yield {**where, "split": "train", "value": share + 0.03 * rng.standard_normal(), "induced_norm": 0.05}
    outside = {"LoRA-SAM": 1e-4, "Flat-LoRA": 0.96, "Bi-LoRA": 0.5}
    for step in range(0, 41, 10):
        dynamics = {"measure": "dynamics", "space": "full", "index": step}
        close = 1 - np.exp(-step / 12) + 0.01 * rng.standard_normal()
        yield {**dynamics, "quantity": "cosine_to_end", "kind": "primary", "value": close}
        if method in outside:
            yield {**dynamics, "quantity": "outside_share", "value": outside[method], "chance": 0.97}
        if method == "Bi-LoRA":
            yield {**dynamics, "quantity": "cosine_to_end", "kind": "auxiliary", "value": (step / 40) ** 2}
            yield {**dynamics, "quantity": "cosine", "kind": "primary_auxiliary", "value": -0.1}
        if method == "LoRA-SAM":
            for kind, size in (("B_eps_A", 1e-2), ("eps_B_A", 5e-2), ("eps_B_eps_A", 5e-4)):
                value = size * np.exp(0.2 * rng.standard_normal())
                yield {**dynamics, "quantity": "perturbation_part", "kind": kind, "value": value}
            yield {**dynamics, "quantity": "second_order_ratio", "value": 0.01}
