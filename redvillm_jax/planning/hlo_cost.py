"""Computes a lower bound on the time of a compiled TPU program, from its optimized HLO and a chip's rates.

The compiler writes `estimated_cycles` on the instructions that it schedules itself. Kernels (custom calls), collectives
and asynchronous copies have no estimate; this module charges them. The text of the HLO is the schedule: instructions
run in its order.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping

from redvillm_jax.runtime.chips import Chip

CHECKED = {"jax": "0.10.2", "libtpu": "0.0.42.1"}  # the versions whose HLO text was checked last
BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2} | {
    name: size for size, names in ((4, ("s32", "u32", "f32")), (8, ("s64", "u64", "f64", "c64"))) for name in names
}
FREE = {  # no work of their own
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id"),
    *("iota", "opt-barrier", "add-dependency", "reshape", "broadcast", "domain"),
}
FREE_CALLS = {"AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound", "AssumeAlignment", "Sharding"}
MOVES = {"GatherScatterIndicesBitpacked"}  # small custom calls that only move bytes
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")


class Unpriced(Exception):
    """Raised for a custom call, loop or type of unknown cost: the program has no bound."""


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of HLO. shape: its type as text; operands: their names; text: the line after the operands."""

    name: str
    opcode: str
    shape: str
    operands: tuple[str, ...]
    text: str

    def called(self, key: str) -> str:
        """Returns the name of the computation in an attribute such as `body`."""
        return re.search(rf"\b{key}=%?([\w.\-]+)", self.text).group(1)

    @property
    def cycles(self) -> int | None:
        """The compiler's estimate; None without one."""
        found = re.search(r'"estimated_cycles":"(\d+)"', self.text)
        return int(found.group(1)) if found else None

    @property
    def source(self) -> str:
        """The JAX operation that made the instruction, or ""."""
        found = re.search(r'op_name="([^"]*)"', self.text)
        return found.group(1) if found else ""


@dataclasses.dataclass(frozen=True)
class Charge:
    """Time that an instruction adds. kind: compute | kernel | collective | copy | other; seconds: of all `times`."""

    kind: str
    name: str
    source: str
    times: int
    seconds: float
    busy: float  # with the part that other work hides


def parse(hlo: str) -> tuple[dict[str, list[Instruction]], str]:
    """Returns the computations by name, and the entry's name."""
    computations: dict[str, list[Instruction]] = {}
    entry = ""
    for line in hlo.splitlines():
        if line.endswith("{") and not line.startswith(" ") and (head := re.match(r"(ENTRY )?%?([\w.\-]+) \(", line)):
            current = computations.setdefault(head.group(2), [])
            entry = head.group(2) if head.group(1) else entry
        elif found := re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = ", line):
            current.append(read_instruction(found.group(1), line[found.end() :]))
    return computations, entry


def read_instruction(name: str, rest: str) -> Instruction:
    """Reads an instruction from the text after its `name = `."""
    shape_end = closing(rest, 0) if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:shape_end], rest[shape_end:].lstrip()
    opening = rest.index("(")
    end = closing(rest, opening)
    operands = tuple(re.findall(r"%([\w.\-]+)", rest[opening:end]))
    if rest[:opening] == "constant":
        return Instruction(name, "constant", shape, (), rest[opening:])
    return Instruction(name, rest[:opening], shape, operands, rest[end:])


def closing(text: str, start: int) -> int:
    """Returns the position after the parenthesis that closes the one at `start`."""
    depth = 0
    for found in re.finditer(r"[()]", text[start:]):
        depth += 1 if found.group() == "(" else -1
        if depth == 0:
            return start + found.end()
    raise ValueError(f"unbalanced: {text[:80]}")


def num_bytes(shape: str) -> float:
    """Returns the bytes of a type such as `bf16[2,128]{1,0}`, or of a tuple of types. Raises Unpriced."""
    total = 0.0
    for kind, sizes in re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", shape):
        if kind == "token":
            continue
        if kind not in BYTES and not kind.startswith("f8"):
            raise Unpriced(f"type {kind}")
        count = 1
        for size in filter(None, sizes.split(",")):
            count *= int(size)
        total += count * BYTES.get(kind, 1)
    return total


def trip_count(computations: Mapping[str, list[Instruction]], loop: Instruction) -> int:
    """Returns the number of a loop's iterations: the constant that its condition compares with a counter from 0.

    Raises Unpriced when the condition has no such constant, or several.
    """
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.text)
    if known:
        return int(known.group(1))
    condition = computations[loop.called("condition")]
    limits = [i for i in condition if i.opcode == "constant" and i.shape.startswith(("s32[]", "u32[]"))]
    if len(limits) != 1:
        raise Unpriced(f"loop {loop.name} of unknown length")
    return int(re.search(r"\((\d+)\)", limits[0].text).group(1))


def charges(hlo: str, chip: Chip, kernels: Mapping[str, float]) -> list[Charge]:
    """Returns the time that each instruction adds to a program.

    kernels: flops of one call of a custom kernel, by the beginning of its name. A kernel call takes max(flops / half
    the chip's peak, bytes / HBM bandwidth); an unknown kernel raises Unpriced. A collective takes its bytes / the
    bandwidth of the chip's links, an asynchronous copy its bytes / HBM bandwidth. The transfers of a channel run one
    after the other; a transfer adds the time for which the program waits at its end.
    """
    computations, entry = parse(hlo)
    return list(_run(computations, entry, chip, kernels, 1))


def _run(
    computations: Mapping[str, list[Instruction]], name: str, chip: Chip, kernels: Mapping[str, float], times: int
) -> Iterator[Charge]:
    """Simulates one computation that runs `times` times."""
    now = 0.0
    free = {"collective": 0.0, "copy": 0.0}  # the time at which each channel has finished its transfers
    ends: dict[str, tuple[str, float, float]] = {}  # running transfers: kind, end, length
    shapes = {i.name: i.shape for i in computations[name]}
    for i in computations[name]:
        kind, seconds, busy = "compute", 0.0, 0.0
        if i.opcode == "while":
            inner = list(_run(computations, i.called("body"), chip, kernels, times * trip_count(computations, i)))
            yield from inner
            now += sum(c.seconds for c in inner) / times
            continue
        if i.opcode in ("call", "conditional"):
            raise Unpriced(f"{i.opcode} {i.name}")
        base = i.opcode.removesuffix("-start").removesuffix("-done")
        if i.opcode.endswith("-start"):
            moved = sum(num_bytes(shapes.get(o, "")) for o in i.operands)
            kind, length = transfer(i, base, moved, computations, chip)
            free[kind] = max(free[kind], now) + length
            ends[i.name] = kind, free[kind], length
            continue
        if i.opcode.endswith("-done"):
            kind, end, busy = ends.pop(i.operands[0])
            seconds = max(0.0, end - now)
        elif base in COLLECTIVES:
            moved = sum(num_bytes(shapes.get(o, "")) for o in i.operands)
            kind, busy = transfer(i, base, moved, computations, chip)
            seconds = max(free[kind], now) + busy - now
            free[kind] = now + seconds
        elif i.opcode == "custom-call":
            target = re.search(r'custom_call_target="([^"]*)"', i.text).group(1)
            moved = num_bytes(i.shape) + sum(num_bytes(shapes.get(o, "")) for o in i.operands)
            if target in FREE_CALLS:
                continue
            if target in MOVES:
                kind, seconds = "other", moved / chip.hbm_bandwidth
            else:
                flops = next((f for prefix, f in kernels.items() if i.name.startswith(prefix)), None)
                if flops is None:
                    raise Unpriced(f"custom call {i.name} ({target})")
                kind, seconds = "kernel", max(flops / (0.5 * chip.peak_flops), moved / chip.hbm_bandwidth)
            busy = seconds
        elif i.cycles is not None:
            seconds = busy = i.cycles / chip.clock
        elif i.opcode not in FREE:
            moved = num_bytes(i.shape) + sum(num_bytes(shapes.get(o, "")) for o in i.operands)
            kind, seconds = "other", moved / chip.hbm_bandwidth
            busy = seconds
        now += seconds
        if busy:
            yield Charge(kind, i.name, i.source, times, seconds * times, busy * times)


def transfer(
    i: Instruction, base: str, moved: float, computations: Mapping[str, list[Instruction]], chip: Chip
) -> tuple[str, float]:
    """Returns the channel of a transfer of `moved` operand bytes, and its seconds on that channel.

    A collective is a ring over all members of a group in both directions: an all-gather receives the other members'
    shards, a reduce-scatter sends as much, an all-reduce does both.
    """
    if base == "async":  # a wrapped collective or slice
        inner = next(x for x in computations[i.called("calls")] if x.opcode not in FREE)
        return transfer(inner, inner.opcode, moved, computations, chip)
    if base in ("copy", "slice", "dynamic-slice", "dynamic-update-slice", "send", "recv"):
        if base == "slice":  # the operand is the whole array
            moved = num_bytes(re.sub(r"^\(\(.*?\)\), ", "", i.shape))
        return "copy", moved / chip.hbm_bandwidth
    size = group_size(i)
    sent = {
        "all-gather": moved * (size - 1),
        "all-reduce": 2 * moved * (size - 1) / size,
        "reduce-scatter": moved * (size - 1) / size,
        "all-to-all": moved * (size - 1) / size,
        "collective-permute": moved,
    }
    if base not in sent:
        raise Unpriced(f"{i.opcode} {i.name}")
    directions = 1 if base == "collective-permute" else 2
    return "collective", sent[base] / (directions * chip.link_bandwidth)


def group_size(i: Instruction) -> int:
    """Returns the number of devices in one group of a collective."""
    if i.opcode.startswith("collective-permute"):
        return 2
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", i.text):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found.group(1)))
        size = 1
        for axis in re.findall(r"'(\w+)'", found.group(2)):
            size *= int(sizes[axis])
        return size
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", i.text):
        return int(found.group(1))
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", i.text):
        return len(found.group(1).split(","))
    raise Unpriced(f"{i.opcode} {i.name}: unknown groups")
