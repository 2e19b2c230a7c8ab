"""Looks of methods: fixed by name, and apart for every eye."""

import itertools

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from analysis.plots.style import spare_styles, style_of, styles_for
from bilora.methods import ALIASES, METHODS
from tests.plausible_rows import METHODS as LABELS

# Machado et al. (2009), full deficiency, on linear RGB.
EYES = {
    "normal": np.eye(3),
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
TO_XYZ = [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
WHITE = [0.95047, 1.0, 1.08883]


def lab(colour: str, eye: str = "normal") -> np.ndarray:
    """CIE L*a*b* of ``colour`` as ``eye`` sees it."""
    gamma = np.array(to_rgb(colour))
    linear = np.where(gamma <= 0.04045, gamma / 12.92, ((gamma + 0.055) / 1.055) ** 2.4)
    xyz = np.array(TO_XYZ) @ np.clip(np.array(EYES[eye]) @ linear, 0, 1) / WHITE
    x, y, z = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def apart(one: str, other: str) -> float:
    """Distance of two colours to the eye that tells them apart worst (1: just visible side by side)."""
    return min(float(np.linalg.norm(lab(one, eye) - lab(other, eye))) for eye in EYES)


def test_every_registered_method_has_a_look_of_its_own():
    looks = {name: style_of(name) for name in METHODS}
    assert len({look.colour for look in looks.values()}) == len(METHODS)
    assert len({(look.marker, look.line) for look in looks.values()}) == len(METHODS), "apart in grey"
    for (a, one), (b, other) in itertools.combinations(looks.items(), 2):
        distance = apart(one.colour, other.colour)
        assert distance > 13, (a, b)
        if distance < 20:
            assert one.marker != other.marker, (a, b)
            assert one.line != other.line, (a, b)
    assert max(lab(look.colour)[0] for look in looks.values()) < 80, "readable on white"


def test_a_look_does_not_depend_on_what_else_is_drawn():
    every = styles_for([*METHODS, "mine", "yours, r = 4"])
    for name, look in every.items():
        assert styles_for([name])[name] == look
        assert styles_for([name, "another", *LABELS])[name] == look


def test_known_looks_never_change():
    expected = {"LoRA": ("#0072B2", "o"), "LoRA-SAM": ("#CC79A7", "s"), "Flat-LoRA": ("#009E73", "^")}
    expected |= {"Bi-LoRA": ("#D55E00", "v"), "Full FT": ("#4D4D4D", "D")}
    assert {label: (style_of(label).colour, style_of(label).marker) for label in expected} == expected
    mine = style_of("my method")
    assert (mine.colour, mine.marker, mine.line) == ("#661100", "d", "-")


@pytest.mark.parametrize(
    ("label", "name"),
    [*ALIASES.items(), *zip(LABELS, ["full", "lora", "lora_sam", "flat_lora", "bilora"], strict=True)],
)
def test_spellings_of_a_method_look_alike(label, name):
    assert style_of(label) == style_of(name) == style_of(name.replace("_", "-").upper())


def test_other_labels_look_like_no_method_and_mostly_unlike_each_other():
    labels = [f"variant {number}" for number in range(40)]
    assert not {style_of(label).colour for label in labels} & {style_of(name).colour for name in METHODS}
    assert len({style_of(label) for label in labels}) >= 36
    assert not {look.colour for look in spare_styles(labels).values()} & {style_of(name).colour for name in METHODS}
    assert len({look.colour for look in spare_styles(labels[:10]).values()}) == 10


def test_methods_are_drawn_in_their_order_and_others_after_them():
    assert list(styles_for(["zeta", "Bi-LoRA", "alpha", "LoRA"])) == ["LoRA", "Bi-LoRA", "alpha", "zeta"]
