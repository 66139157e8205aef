"""What a compiled program moves between devices, read from its text: kind, mesh axis, bytes, how often.

A collective inside a loop counts as often as the loop runs. Of a loop with a fixed count (layers; the pieces of a
product that waits for its weights) the text tells it; of the others (micro-batches, tiles of the head, decoding steps)
the caller does, by the name that the loop's `jax.named_scope` has.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4}
_BYTES |= {"f64": 8, "s64": 8, "u64": 8}
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\((.*)$")
_AXES = re.compile(r"'([^']+)'(?::\((\d+)\)(\d+))?")
_ORDER = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"
_CALLED = re.compile(
    r"(?:calls|body|to_apply|true_computation|false_computation|branch_computations|called_computations)"
    r"=(\{[^}]*\}|%?[\w.\-]+)"
)


class Moved(NamedTuple):
    """One kind of collective over one mesh axis (`data+fsdp`: over both at once)."""

    kind: str
    axis: str
    bytes: float
    """Sent by each device; an all-reduce counts twice, as a reduce-scatter and an all-gather do."""
    count: float
    """Collectives that run."""
    largest: int = 0
    """Elements of the largest array that one of them gives."""


class Instruction(NamedTuple):
    """A line of a computation."""

    name: str
    root: bool
    shape: str
    op: str
    rest: str


class Program:
    """A compiled program's text, taken apart.

    Args:
        text: of the compiled module.
        mesh: size of each mesh axis, in order; devices are numbered along it.
        loops: how often the loops with these names run.

    Attributes:
        moved: what all collectives move, by kind and axis.
        unknown: op names of loops whose count is neither in the text nor in `loops`; they count once.
    """

    def __init__(self, text: str, mesh: Mapping[str, int], loops: Mapping[str, int]):
        self._mesh, self._loops = mesh, loops
        self._computations, entry = computations_of(text)
        self.unknown: list[str] = []
        self._found: list[tuple[float, Moved]] = []
        self._chains: dict[tuple[str, str], tuple[float, Moved]] = {}
        self._walk(entry, 1.0)
        total: dict[tuple[str, str], Moved] = {}
        for times, one in [*self._found, *self._chains.values()]:
            before = total.get(one[:2], Moved(*one[:2], 0.0, 0.0))
            size, count = before.bytes + times * one.bytes, before.count + times
            total[one[:2]] = Moved(*one[:2], size, count, max(before.largest, one.largest))
        self.moved = [total[key] for key in sorted(total)]

    def _walk(self, computation: str, times: float) -> None:
        for instruction in self._computations[computation]:
            kind = instruction.op.removesuffix("-start")
            if kind in KINDS:
                self._collective(computation, instruction, kind, times)
            inner = times * self._trips(instruction) if instruction.op == "while" else times
            for names in _CALLED.findall(instruction.rest):
                for name in re.findall(r"[\w.\-]+", names):
                    if name in self._computations:
                        self._walk(name, inner)

    def _collective(self, computation: str, instruction: Instruction, kind: str, times: float) -> None:
        if kind == "all-reduce" and "all-reduce-scatter" in computation:
            kind, scattered = "reduce-scatter", False  # fused with the slice that follows: its shape is the whole's
        else:
            scattered = kind == "reduce-scatter"
        axis, n = _group(instruction.rest, self._mesh)
        if n == 1:
            return
        size, elements = _result(instruction)
        whole = size * n if scattered else size
        share = {"all-reduce": 2 * (n - 1) / n, "collective-permute": 1.0}.get(kind, (n - 1) / n)
        found = (times, Moved(kind, axis, whole * share, 1, elements))
        # A TPU's asynchronous collective is written once in every fusion that carries a part of it; it starts in the
        # outermost one, and once.
        chain, channel = (
            re.search(r'chain_id="(\d+)"', instruction.rest),
            re.search(r"channel_id=(\d+)", instruction.rest),
        )
        if chain is None or channel is None:
            self._found.append(found)
        else:
            key = (channel[1], chain[1])
            self._chains[key] = min(found, self._chains.get(key, found))

    def _trips(self, loop: Instruction) -> float:
        known = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.rest)
        if known:
            return int(known[1])
        called = {key: re.search(rf"{key}=%?([\w.\-]+)", loop.rest) for key in ("condition", "body")}
        limit = _counted(*(self._computations[name[1]] for name in called.values() if name))
        if limit is not None:
            return limit
        path = re.search(r'op_name="([^"]*)"', loop.rest)
        scope = (
            re.search(r"(\w+)\)*/while$", path[1]) if path else None
        )  # `name/while`, differentiated `jvp(name)/while`
        name = scope[1] if scope else ""
        if name not in self._loops:
            self.unknown.append(path[1] if path else loop.name)
        return self._loops.get(name, 1)


def computations_of(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """Take a compiled program's text apart: (instructions of each computation by name, the name of the first one).

    Raises:
        ValueError: it is no such text.
    """
    found: dict[str, list[Instruction]] = {}
    entry, current = "", []
    for line in text.splitlines():
        head = _COMPUTATION.match(line)
        if head:
            current = found.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
            continue
        match = _INSTRUCTION.match(line)
        if match:
            root, name, shape, op, rest = match.groups()
            current.append(Instruction(name, root is not None, shape, op, rest))
    if not entry:
        raise ValueError("compiled program: expected an ENTRY computation in its text, got none")
    return found, entry


def _counted(condition: list[Instruction], body: list[Instruction]) -> int | None:
    """Rounds of `for (i = 0; i < constant; i += step)`; None where the limit is not a constant."""
    known = {i.name: i for i in condition}
    root = next((i for i in condition if i.root), None)
    if root is None or root.op != "compare" or "direction=LT" not in root.rest:
        return None
    counter, limit = (known.get(name) for name in operands(root)[:2])
    if counter is None or limit is None or limit.op != "constant" or counter.op != "get-tuple-element":
        return None
    at = re.search(r"index=(\d+)", counter.rest)
    return -(-_constant(limit) // (_step(body, int(at[1])) if at else 1))


def _step(body: list[Instruction], at: int) -> int:
    """What a round adds to the counter: XLA unrolls some loops by two."""
    known = {i.name: i for i in body}
    root = next(i for i in body if i.root)
    names = operands(root)
    add = known.get(names[at]) if root.op == "tuple" and at < len(names) else None
    if add is None or add.op != "add":
        return 1
    added = [known[name] for name in operands(add) if name in known and known[name].op == "constant"]
    return _constant(added[0]) if added else 1


def operands(instruction: Instruction) -> list[str]:
    """Name what an instruction is applied to."""
    return re.findall(r"%([\w.\-]+)", instruction.rest.split(")")[0])


def _constant(instruction: Instruction) -> int:
    return int(instruction.rest.split(")")[0])


def _result(instruction: Instruction) -> tuple[int, int]:
    """(bytes, elements) of what a collective gives; the first half of a `-start`'s tuple is its operands."""
    arrays = re.findall(r"([a-z]\w*)\[([\d,]*)\]", instruction.shape)
    if instruction.op.endswith("-start") and instruction.op != "all-reduce-start":
        given = len(operands(instruction))
        arrays = arrays[given : 2 * given]
    elements = [int(np.prod([int(n) for n in dims.split(",") if n])) for _, dims in arrays]
    return sum(_BYTES[dtype] * n for (dtype, _), n in zip(arrays, elements, strict=True)), sum(elements)


def _group(rest: str, mesh: Mapping[str, int]) -> tuple[str, int]:
    """(mesh axes that a collective goes over, devices in a group)."""
    sizes = tuple(mesh.values())
    pairs = re.search(r"source_target_pairs=\{(\{[\d,{} ]*\})\}", rest)
    groups = _listed(pairs[1]) if pairs else _replica_groups(rest, int(np.prod(sizes)))
    used: set[str] = set()
    for group in groups if pairs else groups[:1]:
        coordinates = np.unravel_index(group, sizes)
        used |= {axis for axis, at in zip(mesh, coordinates, strict=True) if len(set(at.tolist())) > 1}
    return "+".join(axis for axis in mesh if axis in used), len(groups[0]) if used else 1


def _listed(text: str) -> list[list[int]]:
    return [[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d, ]+)\}", text)]


def _replica_groups(rest: str, devices: int) -> list[list[int]]:
    """The groups in any of the forms that XLA writes: `{{0,1},{2,3}}`, `[2,2]<=[2,2]T(1,0)`,
    `mesh['a'=2,'b'=2] {'b'}`."""
    if "replica_groups=" not in rest or "replica_groups={}" in rest:
        return [list(range(devices))]
    form = rest.split("replica_groups=")[1]
    if form.startswith("{{"):
        return _listed(form.split("}}")[0] + "}")
    iota = re.match(r"\[(\d+),(\d+)\]<=" + _ORDER, form)
    if iota:
        return _order(iota[3], iota[4], devices).reshape(int(iota[1]), int(iota[2])).tolist()
    named = re.match(r"mesh\[([^\]]*)\](?:, device_ids=\(" + _ORDER + r"\))? \{([^}]*)\}", form)
    if named is None:
        raise ValueError(f"compiled program: replica groups of a form that is not known: {form[:100]!r}")
    order = _order(named[2] or str(devices), named[3], devices)
    parts = {name: (int(before or 1), int(size or 0)) for name, before, size in _AXES.findall(named[4])}
    dims, inside = [], []
    for name, size in re.findall(r"'([^']+)'=(\d+)", named[1]):
        before, within = parts.get(name, (1, 1))
        within = within or int(size)  # the whole axis, unless a part of it is named
        dims += [before, within, int(size) // (before * within)]
        inside += [False, name in parts, False]
    at = sorted(range(len(dims)), key=lambda i: inside[i])
    count = int(np.prod([n for n, used in zip(dims, inside, strict=True) if used]))
    return order.reshape(dims).transpose(at).reshape(-1, count).tolist()


def _order(dims: str, axes: str | None, devices: int) -> np.ndarray:
    """The devices as `[2,4]T(1,0)` orders them: numbered along axes of these sizes, which are then transposed."""
    order = np.arange(devices).reshape([int(n) for n in dims.split(",")])
    return order.transpose([int(n) for n in axes.split(",")]) if axes else order
