"""Random changes of files: bytes, JSON values, nesting. For scripts/fuzz.py."""

import contextlib
import json
import random
import struct
import sys
from collections.abc import Iterator
from typing import Any

# fmt: off
VALUES = [None, True, False, -1, 0, 1, 2**31, 2**63, -(2**63), 10**400, 1e308, -1e308, float("nan"), float("inf"),
          "", "\x00", "\ud800", "\u202e", "../../etc/passwd", "/dev/zero", "x" * 5000, "1e999", "{}",
          [], {}, [[]], [None], {"": None}]
PIECES = [b"\x00", b"\xff\xfe", b"\xed\xa0\x80", b"null", b"NaN", b"1e999", b"-1", b"9" * 400, b"9" * 5000,
          b"[" * 3000, b'{"a":' * 3000, b"\n", b'"', b"\\ud800", b"\xe2\x80\xae", b"{%", b"{{", b"}}",
          b"!!python/object/apply:os.system", b"&a [*a]", b"<<: *a", b"- ", b": ", b"\t", b"\r", b"\xef\xbb\xbf",
          b"../", b"%s%n", b"\x7f" * 8]
# fmt: on


def deep(levels: int) -> Any:
    """Nest lists so many levels deep."""
    value: Any = []
    for _ in range(levels):
        value = [value]
    return value


def change_bytes(data: bytes, dice: random.Random) -> bytes:
    """Change some bytes: flipped bits, pieces cut out, doubled, overwritten or put in; or a shorter file."""
    out = bytearray(data)
    for _ in range(dice.choice((1, 1, 1, 2, 4, 16))):
        at = dice.randrange(len(out) + 1)
        end = min(len(out), at + dice.choice((1, 2, 8, 100, 1000)))
        how = dice.randrange(7)
        if how == 0 and at < len(out):
            out[at] ^= 1 << dice.randrange(8)
        elif how == 1:
            del out[at:end]
        elif how == 2:
            out[at:at] = out[at:end]
        elif how == 3:
            out[at:at] = dice.choice(PIECES)
        elif how == 4:
            out[at:end] = dice.randbytes(end - at)
        elif how == 5:
            out[at : at + 8] = struct.pack("<q", dice.choice((-1, 0, 1, 2**31, 2**40, 2**62, -(2**63))))
        elif dice.random() < 0.3:
            del out[at:]
    return bytes(out)


def change_value(value: Any, dice: random.Random) -> Any:
    """Change plain data in one place: another value, a key that is gone, renamed or new."""
    if isinstance(value, dict) and value and dice.random() < 0.9:
        key = dice.choice(list(value))
        how = dice.randrange(8)
        if how == 0:
            return {k: v for k, v in value.items() if k != key}
        if how == 1:
            return {(k + "_" if k == key else k): v for k, v in value.items()}
        if how == 2:
            return value | {dice.choice(["", "x", "\ud800", key.upper()]): dice.choice(VALUES)}
        return value | {key: change_value(value[key], dice)}
    if isinstance(value, list) and value and dice.random() < 0.9:
        at = dice.randrange(len(value))
        how = dice.randrange(6)
        if how == 0:
            return value[:at] + value[at + 1 :]
        if how == 1:
            return value[:at] + [value[at]] * dice.choice((2, 50)) + value[at:]
        return [*value[:at], change_value(value[at], dice), *value[at + 1 :]]
    if dice.random() < 0.05:
        return deep(dice.choice((50, 900, 3000)))
    return dice.choice(VALUES)


@contextlib.contextmanager
def deeper() -> Iterator[None]:
    """Let JSON be nested as deep as changes nest it."""
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(50_000)
    try:
        yield
    finally:
        sys.setrecursionlimit(before)


def dumped(value: Any) -> bytes:
    return json.dumps(value).encode()


def changed(data: bytes, suffix: str, dice: random.Random) -> bytes:
    """Change a file: as what its name says that it holds, or as bytes."""
    if dice.random() < 0.35:
        return change_bytes(data, dice)
    with deeper():
        return change_content(data, suffix, dice)


def change_content(data: bytes, suffix: str, dice: random.Random) -> bytes:
    """Change a file as what its name says that it holds."""
    times = dice.choice((1, 1, 2, 3))
    if suffix == ".safetensors":
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
        for _ in range(times):
            header = change_value(header, dice)
        text = dumped(header)
        stated = dice.choice([len(text)] * 6 + [0, len(text) + 1, 2**40, 2**63, len(data)])
        return stated.to_bytes(8, "little") + text + data[8 + size :]
    if suffix in (".jsonl",):
        lines = data.splitlines(keepends=True)
        for _ in range(times):
            at = dice.randrange(len(lines))
            lines[at] = dumped(change_value(json.loads(lines[at]), dice)) + b"\n"
        return b"".join(lines)
    if suffix in (".json", ".yaml"):
        import yaml

        value = json.loads(data) if suffix == ".json" else yaml.safe_load(data)
        for _ in range(times):
            value = change_value(value, dice)
        return dumped(value)  # JSON is YAML, too
    return change_bytes(data, dice)
