"""Bytes of device memory that a compiled program's instructions move, read from its text: for tests of loops.

An instruction reads its operands and writes its results. Where a fusion takes slices of an operand alone, it reads the
slices; where it writes into an operand in place, it writes the update. A kernel (a custom call) whose grid visits
every block once reads its operands once; one that walks pages reads no more than the pool. What lies in a memory on the
chip (a TPU's `S(1)`) is free. Results without a buffer of their own, such as tuples, move nothing.
"""

import math
import re
from collections.abc import Mapping

FREE = (
    "get-tuple-element",
    "tuple",
    "parameter",
    "constant",
    "bitcast",
    "after-all",
    "partition-id",
    "iota",
    "optimization-barrier",
)
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4}
_SLICES = ("dynamic-slice", "slice", "gather")


def size(shape: str) -> int:
    """Bytes of an instruction's result in device memory, its parts added up."""
    found = 0
    for dtype, dims, layout in re.findall(r"([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?", shape):
        if "S(1)" not in layout:
            found += _BYTES.get(dtype, 0) * math.prod(int(n) for n in dims.split(",") if n)
    return found


def operands(instruction) -> list[str]:
    return re.findall(r"%([\w.\-]+)", instruction.rest.split(")")[0])


def moved(body: list, computations: Mapping[str, list]) -> dict[str, int]:
    """{name of an instruction of `body`: bytes that it reads and writes}; loops inside it count once."""
    shapes = {i.name: i.shape for i in body}
    found: dict[str, int] = {}
    for i in body:
        if i.op in FREE or i.op.endswith("-done"):
            continue
        if i.op in ("while", "call", "conditional"):
            names = re.findall(r"(?:body|condition|to_apply|calls|branch_computations)=\{?%?([\w.\-]+)", i.rest)
            inner = [moved(computations[name], computations) for name in names if name in computations]
            found[i.name] = sum(sum(part.values()) for part in inner)
        elif i.op == "fusion":
            name = re.search(r"calls=%?([\w.\-]+)", i.rest)
            assert name is not None
            found[i.name] = _of_fusion(i, computations[name[1]], shapes)
        elif i.op == "copy-start":
            found[i.name] = size(i.shape)  # both ends of the copy are in its result
        elif i.op in _SLICES:
            found[i.name] = 2 * size(i.shape)
        elif i.op == "dynamic-update-slice":
            found[i.name] = 2 * size(shapes[operands(i)[1]])
        else:
            found[i.name] = size(i.shape) + sum(size(shapes[name]) for name in operands(i) if name in shapes)
    return found


def _of_fusion(fusion, inside: list, shapes: Mapping[str, str]) -> int:
    by_name = {i.name: i for i in inside}
    users: dict[str, list] = {}
    for i in inside:
        for name in operands(i):
            users.setdefault(name, []).append(i)

    def through(name: str) -> list:
        """Those that use a value, bitcasts seen through."""
        return [u for user in users.get(name, []) for u in (through(user.name) if user.op == "bitcast" else [user])]

    def origin(name: str) -> str:
        while by_name[name].op == "bitcast":
            name = operands(by_name[name])[0]
        return name

    total, in_place = 0, set()
    root = next(i for i in inside if i.root)
    results = [by_name[name] for name in operands(root)] if root.op == "tuple" else [root]
    for result in results:
        made = by_name[origin(result.name)]
        if made.op == "dynamic-update-slice":
            into, update = operands(made)[:2]
            total += size(by_name[update].shape)
            in_place.add(origin(into))
        else:
            total += size(result.shape)
    given = operands(fusion)
    for i in inside:
        if i.op != "parameter" or i.name in in_place:
            continue
        at = re.match(r"(\d+)", i.rest)
        assert at is not None
        whole = size(shapes.get(given[int(at[1])], i.shape))
        uses = through(i.name)
        sliced = [u for u in uses if u.op in _SLICES and origin(operands(u)[0]) == i.name]
        total += min(whole, sum(size(u.shape) for u in sliced)) if uses and len(sliced) == len(uses) else whole
    return total
