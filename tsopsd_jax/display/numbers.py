"""Numbers and durations as a person reads them; a dash for what is absent or not finite."""

import math
import sys
from typing import Any

DASH = "-"


def finite(value: Any) -> float | None:
    """Return `value` if it is a finite number that a float can hold, else None."""
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max:
        return value
    return None


def finite_or_nan(value: Any) -> float:
    """Return `value` if it is a finite number, else NaN."""
    return math.nan if (found := finite(value)) is None else found


def fixed(value: Any, form: str = ".0f", scale: float = 1.0) -> str:
    """Format `value` times `scale` as `form` says."""
    return DASH if (found := finite(value)) is None else format(found * scale, form)


def count(value: Any) -> str:
    """Write a count in at most six characters: `9999`, `12.3k`, `1.5M`, `2.0G`."""
    if (number := finite(value)) is None:
        return DASH
    for least, unit, letter in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if abs(number) >= least:
            return f"{number / unit:.1f}{letter}"
    return f"{number:.0f}"


def duration(seconds: Any) -> str:
    """Write a duration by its two largest units: `47s`, `3m 05s`, `2h 07m`, `3d 04h`."""
    if (seconds := finite(seconds)) is None:
        return DASH
    whole = max(0, round(seconds))
    minutes, hours = whole // 60, whole // 3600
    if whole < 60:
        return f"{whole}s"
    if minutes < 60:
        return f"{minutes}m {whole % 60:02d}s"
    if hours < 24:
        return f"{hours}h {minutes % 60:02d}m"
    return f"{hours // 24}d {hours % 24:02d}h"
