"""What the body of a compiled loop does, read from the program's text: bytes of device memory that its instructions
move, kernels that it launches.

An instruction reads its operands and writes its results. Where a fusion takes slices of an operand alone, it reads the
slices; where it writes into an operand in place, it writes the update. A kernel (a custom call) whose grid visits
every block once reads its operands once; one that walks pages reads no more than the pool, if no page is shared. What
lies in a memory on the chip (a TPU's `S(1)`) is free. Results without a buffer of their own, such as tuples, move
nothing.
"""

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

from tsopsd_jax.plan.collectives import Instruction, computations_of, operands

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
"""Instructions that move nothing and are no kernels."""
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4}
_SLICES = ("dynamic-slice", "slice", "gather")


class Loop(NamedTuple):
    """A loop of a compiled program: the instructions of its body, and all computations by name."""

    body: list[Instruction]
    computations: dict[str, list[Instruction]]

    @property
    def bytes_moved(self) -> int:
        """Bytes of device memory read and written in one turn; loops inside it count once."""
        return sum(bytes_by_instruction(self.body, self.computations).values())

    @property
    def launches(self) -> int:
        """Kernels and copies of one turn, on a GPU."""
        return sum(i.op not in FREE and not i.op.endswith("-done") for i in self.body)


def loop_of(text: str, scope: str) -> Loop:
    """Find the one loop of a program whose `jax.named_scope` is `scope`.

    Raises:
        ValueError: there is none, or more than one.
    """
    computations, _ = computations_of(text)
    loops = [i for found in computations.values() for i in found if i.op == "while" and f'{scope}/while"' in i.rest]
    body = re.search(r"body=%?([\w.\-]+)", loops[0].rest) if len(loops) == 1 else None
    if body is None:
        raise ValueError(f"expected one loop in the scope {scope}, got {len(loops)}")
    return Loop(computations[body[1]], computations)


def size(shape: str) -> int:
    """Count the bytes of an instruction's result in device memory, its parts added up."""
    found = 0
    for dtype, dims, layout in re.findall(r"([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?", shape):
        if "S(1)" not in layout:
            found += _BYTES.get(dtype, 0) * math.prod(int(n) for n in dims.split(",") if n)
    return found


class Product(NamedTuple):
    """A matrix product, also one that is a call of a library: dtypes of its factors and of its result."""

    name: str
    factors: tuple[str, ...]
    result: str


def products(computations: Mapping[str, list[Instruction]]) -> list[Product]:
    """List the matrix products of a program."""
    found = []
    for instructions in computations.values():
        dtype = {i.name: i.shape.split("[")[0].lstrip("(") for i in instructions}
        for i in instructions:
            if i.op in ("dot", "convolution") or (i.op == "custom-call" and "gemm" in i.rest):
                found.append(Product(i.name, tuple(dtype[name] for name in operands(i)[:2]), dtype[i.name]))
    return found


def bytes_by_instruction(body: list[Instruction], computations: Mapping[str, list[Instruction]]) -> dict[str, int]:
    """Count what each instruction of `body` reads and writes, {name: bytes}; loops inside it count once."""
    shapes, by_name = {i.name: i.shape for i in body}, {i.name: i for i in body}
    found: dict[str, int] = {}

    def origin(name: str) -> str:
        while name in by_name and by_name[name].op == "bitcast":
            name = operands(by_name[name])[0]
        return name

    for i in body:
        if i.op in FREE or i.op.endswith("-done"):
            continue
        if i.op in ("while", "call", "conditional"):
            names = re.findall(r"(?:body|condition|to_apply|calls|branch_computations)=\{?%?([\w.\-]+)", i.rest)
            inner = [bytes_by_instruction(computations[name], computations) for name in names if name in computations]
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
            # What a kernel is given several times, to take different blocks of it, is counted once.
            read = {origin(name): size(shapes[name]) for name in operands(i) if name in shapes}
            found[i.name] = size(i.shape) + sum(read.values())
    return found


def _of_fusion(fusion: Instruction, inside: list[Instruction], shapes: Mapping[str, str]) -> int:
    by_name = {i.name: i for i in inside}
    users: dict[str, list[Instruction]] = {}
    for i in inside:
        for name in operands(i):
            users.setdefault(name, []).append(i)

    def through(name: str) -> list[Instruction]:
        """List what uses a value, bitcasts seen through."""
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
