r"""Units of measurement: taken off an answer, and converted into one another."""

import re
from fractions import Fraction
from typing import NamedTuple

_SCALES = {
    "m": "mm 1/1000 cm 1/100 dm 1/10 m 1 km 1000 in 127/5000 ft 381/1250 yd 1143/1250 mi 201168/125 nm 1/1000000000",
    "g": "mg 1/1000 g 1 kg 1000 t 1000000 lb 45359237/100000 oz 45359237/1600000",
    "s": "ms 1/1000 s 1 min 60 h 3600 day 86400 week 604800",
    "month": "month 1 year 12 decade 120",
    "l": "ml 1/1000 cl 1/100 dl 1/10 l 1",
    "dollar": "dollar 1 cent 1/100",
    "euro": "euro 1", "yen": "yen 1", "rupee": "rupee 1", "pound": "pound 1",
    "degree": "degree 1 arcminute 1/60 arcsecond 1/3600", "radian": "radian 1",
    "N": "N 1 kN 1000", "J": "J 1 kJ 1000", "W": "W 1 kW 1000", "V": "V 1 kV 1000 mV 1/1000", "A": "A 1 mA 1/1000",
    "Pa": "Pa 1 kPa 1000 MPa 1000000", "Hz": "Hz 1 kHz 1000 MHz 1000000", "ohm": "ohm 1 kohm 1000",
    "K": "K 1", "mol": "mol 1 mmol 1/1000",
    "C": "C 1", "F": "F 1", "T": "T 1", "eV": "eV 1", "celsius": "celsius 1", "fahrenheit": "fahrenheit 1",
    "unit": "unit 1",
}  # fmt: skip
# What these measure is made of other units: a newton is 1000 g m / s^2.
_DERIVED = {
    "l": ({"m": 3}, Fraction(1, 1000)), "Hz": ({"s": -1}, 1), "N": ({"g": 1, "m": 1, "s": -2}, 1000),
    "J": ({"g": 1, "m": 2, "s": -2}, 1000), "W": ({"g": 1, "m": 2, "s": -3}, 1000),
    "Pa": ({"g": 1, "m": -1, "s": -2}, 1000),
}  # fmt: skip
_NAMES = {
    "mm": "millimeter millimetre", "cm": "centimeter centimetre", "dm": "decimeter decimetre", "m": "meter metre",
    "km": "kilometer kilometre", "in": "inch inche", "ft": "foot feet", "yd": "yard", "mi": "mile", "mg": "milligram",
    "g": "gram gm", "kg": "kilogram kilo", "t": "tonne", "lb": "lbs", "oz": "ounce", "ms": "millisecond",
    "s": "second sec", "min": "minute", "h": "hour hr", "month": "mo", "year": "yr",
    "ml": "milliliter millilitre mL", "cl": "centiliter", "l": "liter litre L",
    "dollar": "usd buck", "cent": "¢", "euro": "eur", "pound": "gbp", "yen": "jpy yuan rmb cny", "rupee": "inr rs",
    "degree": "deg °", "radian": "rad", "N": "newton", "J": "joule", "W": "watt", "V": "volt", "A": "ampere amp",
    "Pa": "pascal", "Hz": "hertz", "ohm": "Ω \\Omega", "K": "kelvin", "mol": "mole", "C": "coulomb",
    "eV": "electronvolt", "celsius": "°c", "fahrenheit": "°f", "T": "tesla",
}  # fmt: skip


def _table() -> dict[str, tuple[str, Fraction]]:
    """Each name of a unit -> (what it measures, its size there)."""
    units = {}
    for measures, scales in _SCALES.items():
        words = scales.split()
        for name, size in zip(words[::2], words[1::2], strict=True):
            for spelling in (name, *_NAMES.get(name, "").split()):
                units[spelling] = (measures, Fraction(size))
    return units


UNITS = _table()
_PHRASES = {
    "mph": "mi/h",
    "mi/hr": "mi/h",
    "kph": "km/h",
    "kmh": "km/h",
    "kmph": "km/h",
    "fps": "ft/s",
    "rpm": "revolution/min",
}
_MULTIPLES = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}
# Words that say more than what is counted.
_NO_UNIT = re.compile(
    r"(?i)\b(?:and|or|not|to|nor|but|is|are|was|no|none|more|less|least|most|fewer|times|percent(?:age)?|pi|squared|"
    r"cubed|factorial|over|under|hal(?:f|ves)|thirds?|quarters?|mod|plus|minus|below|above|before|after|past|if|when|"
    r"where|for|than|from|except|wrong|[a-z]+ths?|base|with)\b"
)
_ATOM = r"(?:\\text\{[^{}]*\}|\\Omega|°(?: ?[CF](?![a-z]))?|(?<![A-Za-z\\])[A-Za-z][A-Za-z.]*(?:/[A-Za-z]+)*)"
_EXPONENT = r"(?: ?\^ ?(?:\{ ?-?[0-9]+ ?\}|-?[0-9]))?"
_TAIL = re.compile(rf"(?<=[0-9.)}}\]'a-z])(?P<unit>(?: ?(?:\\cdot|\\times|/|\*)? ?{_ATOM}{_EXPONENT})+)\.?\Z")


class Unit(NamedTuple):
    """What is measured, as sorted (name, power) pairs, and how large the unit is there."""

    measures: tuple[tuple[str, int], ...]
    size: Fraction


def read_unit(text: str) -> Unit | None:
    r"""`\text{ m/s}^2`, `square cm`, `miles per hour` -> the unit; a noun nobody knows is a unit of its own;
    else None."""
    text = re.sub(r"\\text\{([^{}]*)\}", r" \1 ", text).replace("\\Omega", " ohm ")
    text = re.sub(r"\\(?:cdot|times)|\*", " ", re.sub(r"\^ ?\{ ?(-?[0-9]+) ?\}", r"^\1", text))
    text = re.sub(r" +(?=\^)", "", re.sub(r"\bper\b", "/", text.replace(".", ""))).strip()
    text = _PHRASES.get(text.lower(), text)
    if not text or "$" in text or _NO_UNIT.search(text):
        return None
    powers: dict[str, int] = {}
    size, sign, prefix = Fraction(1), 1, 1
    for word in re.findall(r"/|[^\s/]+", text):
        if word == "/":
            sign = -1
            continue
        if word.lower() in ("square", "sq", "cubic"):
            prefix = 3 if word.lower() == "cubic" else 2
            continue
        name, _, exponent = word.partition("^")
        if not re.fullmatch(r"-?[1-9]?", exponent):
            return None
        power = sign * prefix * int(exponent or 1)
        measures, scale = _known(name)
        parts, factor = _DERIVED.get(measures, ({measures: 1}, 1))
        for part, times in parts.items():
            powers[part] = powers.get(part, 0) + power * times
        size, prefix = size * (scale * factor) ** power, 1
        sign = 1 if sign == -1 and "per" not in text else sign
    return Unit(tuple(sorted(item for item in powers.items() if item[1])), size) if powers else None


def _known(name: str) -> tuple[str, Fraction]:
    """The unit of that name; unknown names, in the singular, measure themselves."""
    for spelling in (name, name.lower(), name.lower().removesuffix("s"), name.lower().removesuffix("es")):
        if spelling in UNITS:
            return UNITS[spelling]
    return name.lower().removesuffix("s"), Fraction(1)


_MONEY = re.compile(
    r"([+-]?) ?(?:\\text\{ ?(dollar|euro|pound|yen|rupee|won|Rs|USD|EUR|GBP)\.? ?\}|(USD|EUR|GBP|INR|JPY|Rs)\.?)"
    r" ?(?=[-0-9.\\])"
)


class Quantity(NamedTuple):
    """An answer's text without its unit, the unit (None: it has none), and a factor said in words (`million`)."""

    text: str
    unit: Unit | None
    factor: Fraction = Fraction(1)


def measured(text: str) -> list[Quantity]:
    """The ways to read a text as a number with a unit: one, or for `3 hours 20 minutes` one for each of its units."""
    if parts := _compound(text):
        first = parts[0][1]
        total = sum((Fraction(count) * unit.size for count, unit in parts), Fraction(0))
        return [
            Quantity(f"({total / unit.size})", unit) for _, unit in sorted(parts, key=lambda part: part[1] != first)
        ]
    if match := _MONEY.match(text):
        (inner,) = measured(match[1] + text[match.end() :])
        return [inner._replace(unit=read_unit(match[2] or match[3]))]
    match = _TAIL.search(text)
    while match is not None:
        value, tail = text[: match.start()].strip(), match["unit"]
        multiple, tail = _multiple(tail)
        if not tail.strip():
            return [Quantity(value, None, multiple)]
        unit = (
            read_unit(re.sub(r"° ?(?:([CF])|\\text\{ ?([CF]) ?\})", r" °\1\2", tail)) if _is_unit(value, tail) else None
        )
        if unit is not None:
            if re.search(r"\\(?:arc)?(?:sin|cos|tan|cot|sec|csc)(?![a-z])", value) and "°" in tail:
                break  # the sine of an angle is no angle
            return [Quantity(value, unit, multiple)]
        # Perhaps only the end of it: in `5x \text{ cm}` x is no unit.
        match = _TAIL.search(text, match.start() + 1) if match.start() + 1 < len(text) else None
    return [Quantity(text, None)]


def _multiple(tail: str) -> tuple[Fraction, str]:
    """A leading `million` and the like as a number, and what is left."""
    match = re.match(r"((?: |\\text\{ ?)*)([A-Za-z]+)\b", tail)
    if match is None or (number := _MULTIPLES.get(match[2].lower())) is None:
        return Fraction(1), tail
    rest = tail[match.end() :]
    return Fraction(number), rest if "{" not in match[1] else rest.replace("}", "", 1) if rest.strip().startswith(
        "}"
    ) else match[1] + rest


def _is_unit(value: str, tail: str) -> bool:
    """Letters outside of text are variables unless they name a unit, or are words after a plain number."""
    plain = re.sub(r"\\text\{[^{}]*\}|\\cdot|\\times|\\Omega|°(?: ?[CF](?![a-z]))?", " ", tail)
    words = re.findall(r"[A-Za-z][A-Za-z/]*", plain)
    if not words:
        return True
    if all(word not in ("in", "I") and len(word) > 1 and _spelled(word) for word in words):
        return True
    return (
        re.fullmatch(r"[+-]?[0-9][0-9.,]*", value) is not None
        and tail.startswith(" ")
        and len(words) <= 2
        and all(re.fullmatch(r"[a-z]{3,}", word) for word in words)
        and "^" not in tail
    )


def _spelled(word: str) -> bool:
    names = word.lower().split("/")
    if word.lower() in _PHRASES or word.lower() in ("square", "cubic", "sq", "per"):
        return True
    return all(_known(name)[0] in _SCALES and name for name in names)


def _compound(text: str) -> list[tuple[str, Unit]]:
    """`3 hours 20 minutes`, `5 dollars and 50 cents`, `30° 30'`: the parts, from large to small; else nothing."""
    text = re.sub(r"\\text\{([^{}]*)\}", r" \1 ", text).replace("\\and", " and ").replace("''", " arcsecond ")
    text = re.sub(r"(?<=[0-9]) ?\^? ?'", " arcminute ", text) if "°" in text else text
    text = " ".join(text.split())
    part = r"([0-9]+(?:\.[0-9]+)?) ?([A-Za-z°]+)"
    if not re.fullmatch(rf" *{part}(?:[ ,]*(?:and)? *{part})+ *\.?", text):
        return []
    found = [(count, read_unit(name)) for count, name in re.findall(part, text)]
    parts = [(count, unit) for count, unit in found if unit is not None]
    measures = {unit.measures for _, unit in parts}
    falling = all(a[1].size > b[1].size for a, b in zip(parts, parts[1:], strict=False))
    return parts if len(parts) == len(found) and len(measures) == 1 and falling else []
