"""The text of a compiled program: its computations, their lines, and the sizes of their arrays.

XLA writes every computation with one line for each instruction. A line names its result, its operation, its operands
and its attributes. `program_cost.py` reads costs from these lines.

A TPU stores an array in tiles, such as T(8,128). Each of the two dimensions that change fastest is padded to whole
tiles. So a dimension of 64 takes the memory of 128.
"""

import dataclasses
import math
import re

BYTES = {
    "pred": 1, "s4": 1, "u4": 1, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2,
    "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16,
}  # fmt: skip

# --- The text of a program


@dataclasses.dataclass(frozen=True)
class Line:
    """One instruction of a program.

    Attributes:
        name: its name, by which others use it.
        result: type of its result, such as "bf16[32,64]{1,0}", or a tuple of types.
        opcode: name of its operation.
        operands: names of the instructions that it reads.
        attributes: the rest of the line; of a constant its value.
        root: whether its computation returns its result.
        place: number of a parameter among those of its computation, otherwise -1.
    """

    name: str
    result: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    root: bool
    place: int = -1

    def called(self, attribute: str = "calls|to_apply") -> str | None:
        """Returns the computation that the line names under an attribute."""
        found = re.search(rf"\b(?:{attribute})=%?([\w.\-]+)", self.attributes)
        return found[1] if found else None

    @property
    def label(self) -> str:
        """The path of the operation in the source program, as JAX writes it."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else self.opcode


@dataclasses.dataclass(frozen=True)
class Computation:
    """A computation: its lines by name, in order."""

    lines: dict[str, Line]

    @property
    def root(self) -> Line:
        """The line whose result is returned."""
        return next(line for line in self.lines.values() if line.root)

    def source(self, name: str) -> Line:
        """Returns the line behind bitcasts of the line `name`."""
        line = self.lines[name]
        while line.opcode == "bitcast":
            line = self.lines[line.operands[0]]
        return line


LINE = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) .*\{$")


def _arguments(rest: str) -> tuple[str, str]:
    """Returns the text up to the bracket that closes the operands, and the text behind it."""
    depth = 1
    for place, sign in enumerate(rest):
        depth += (sign == "(") - (sign == ")")
        if not depth:
            return rest[:place], rest[place + 1 :]
    return rest, ""


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """Returns the computations of a program in XLA's text form, by name, and the name of the entry."""
    found: dict[str, Computation] = {}
    current, entry = "", ""
    for line in text.splitlines():
        if header := HEADER.match(line):
            current = header[2]
            found[current] = Computation({})
            entry = current if header[1] else entry
        elif item := LINE.match(line):
            arguments, attributes = _arguments(item[5])
            operands = tuple(re.findall(r"%([\w.\-]+)", arguments))
            if item[4] == "constant":
                operands, attributes = (), arguments
            place = int(arguments) if item[4] == "parameter" else -1
            parsed = Line(item[2], item[3], item[4], operands, attributes, item[1] is not None, place)
            found[current].lines[parsed.name] = parsed
    return found, entry


def loop_turns(computations: dict[str, Computation], loop: Line, unknown: int) -> int:
    """Returns the number of turns of a loop: as XLA writes it, or the constant that its condition compares with.

    Args:
        computations: all computations of the program.
        loop: the instruction "while".
        unknown: number to assume if the loop ends when a value says so.
    """
    if found := re.search(r'known_trip_count":\s*\{\s*"n":\s*"(\d+)"', loop.attributes):
        return int(found[1])
    condition = computations.get(loop.called("condition") or "")
    if condition is None or condition.root.opcode != "compare":
        return unknown
    for name in condition.root.operands:
        line = condition.source(name)
        if line.opcode == "constant" and (found := re.match(r"(\d+)", line.attributes)):
            return int(found[1])
    return unknown


@dataclasses.dataclass(frozen=True)
class ArrayType:
    """One array of a type.

    Attributes:
        kind: type of its elements, such as "bf16".
        shape: its sizes.
        num_bytes: its bytes where it is stored, with the padding of tiles.
        in_memory: whether it lies in the device's main memory.
    """

    kind: str
    shape: tuple[int, ...]
    num_bytes: int
    in_memory: bool


def _stored_elements(shape: tuple[int, ...], layout: str) -> int:
    """Returns the elements that an array takes in memory; its layout may name a tile."""
    found = re.match(r"\{([\d,]+):T\(([\d,]+)\)", layout)
    sizes = list(shape)
    if found:
        fastest_first = [int(n) for n in found[1].split(",")]
        tile = [int(n) for n in found[2].split(",")]
        for axis, side in zip(fastest_first, reversed(tile), strict=False):
            sizes[axis] = -(-sizes[axis] // side) * side
    return math.prod(sizes)


def all_arrays(result: str) -> list[ArrayType]:
    """Returns each array of a type.

    libtpu marks arrays of its fast memories by S(1) and higher numbers. XLA marks arrays of the host by S(5).
    """
    found = re.findall(r"(\w+)\[([\d,]*)\](\{[^}]*\})?", result)
    arrays = []
    for kind, sizes, layout in found:
        if kind in BYTES:
            shape = tuple(int(n) for n in sizes.split(",") if n)
            stored = BYTES[kind] * _stored_elements(shape, layout)
            arrays.append(ArrayType(kind, shape, stored, not re.search(r"S\([1-9]\)", layout)))
    return arrays


def num_bytes(result: str) -> int:
    """Returns the bytes of main memory of a type."""
    return sum(array.num_bytes for array in all_arrays(result) if array.in_memory)


def first_shape(result: str) -> tuple[int, ...]:
    """Returns the shape of the first array of a type."""
    return next((array.shape for array in all_arrays(result)), ())


def num_elements(result: str) -> int:
    """Returns the number of elements of the largest array of a type."""
    return max((math.prod(array.shape) for array in all_arrays(result)), default=0)
