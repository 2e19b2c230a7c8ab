"""Numbers for readers: as many digits as the interval leaves meaningful."""

import math

_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def spread(mean: float, half_width: float, non_finite: int = 0) -> str:
    """``mean ± half_width`` with two digits of the half width; without an interval three digits of the mean.

    Values that were left out of the mean because they are not finite are counted behind it.
    """
    lost = f" ({non_finite} not finite)" if non_finite else ""
    if not math.isfinite(mean):
        return f"not finite ({non_finite})" if non_finite else "–"
    if not math.isfinite(half_width):
        return number(mean) + lost
    size = max(abs(mean), half_width)
    if size == 0:
        return "0 ± 0" + lost
    exponent = _exponent(size)
    if -4 < exponent < 5:
        places = _places(mean, half_width)
        return f"{_signed(mean, places)} ± {half_width:.{places}f}" + lost
    scale = 10.0**exponent
    places = _places(mean / scale, half_width / scale)
    power = str(exponent).translate(_SUPERSCRIPT)
    return f"({_signed(mean / scale, places)} ± {half_width / scale:.{places}f})·10{power}" + lost


def number(value: float, digits: int = 3) -> str:
    """A number with ``digits`` significant digits, in powers of ten where it is very large or small."""
    if math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    exponent = _exponent(abs(value)) if value else 0
    if -4 < exponent < 5:
        return _signed(value, max(0, digits - 1 - exponent))
    power = str(exponent).translate(_SUPERSCRIPT)
    return f"{_signed(value / 10.0**exponent, digits - 1)}·10{power}"


def p_value(p: float) -> str:
    """A p-value to two digits; very small ones as a bound."""
    if math.isnan(p):
        return "–"
    return "< 0.0001" if p < 1e-4 else number(p, 2)


def enumerated(words: list[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]


def counted(count: int, noun: str) -> str:
    """``1 seed``, ``3 seeds``."""
    return f"{count} {noun}{'s' * (count != 1)}"


def _exponent(size: float) -> int:
    return math.floor(math.log10(size))


def _places(mean: float, half_width: float) -> int:
    """Decimal places for two digits of the half width, but never more than four significant ones of the mean."""
    finest = 1 - _exponent(half_width) if half_width else 3
    coarsest = 3 - _exponent(abs(mean)) if mean else finest
    return max(0, min(finest, max(coarsest, 0)))


def _signed(value: float, places: int) -> str:
    """With a true minus sign."""
    text = f"{value:.{places}f}"
    return text.replace("-", "−") if float(text) else text.removeprefix("-")
