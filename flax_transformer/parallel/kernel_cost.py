"""What one instruction of a compiled program reads, writes and computes.

Bytes are those of main memory. An update in place counts the slice that it reads and writes. An operand of which a
kernel reads slices counts those. Libraries hide their arithmetic, so `library_flops` and `sort_passes` have a formula
for each call. `program_cost.py` adds up the instructions of a program.
"""

import math
import re

from flax_transformer.parallel.program_text import Computation, Line, all_arrays, first_shape, num_bytes, num_elements

SPLASH_PRODUCTS = {"splash_mha_fwd": 2, "splash_mha_dq": 3, "splash_mha_dkv": 4}
SORTED_IN_A_BLOCK = 2048  # elements that XLA's own sort orders in one kernel


def call_target(line: Line) -> str:
    """Returns what a line calls in a library, or ""."""
    found = re.search(r'custom_call_target="([^"]*)"', line.attributes) if line.opcode == "custom-call" else None
    return found[1] if found else ""


def called_bytes(line: Line, operands: list[str]) -> int:
    """Returns the bytes of the arrays of a call. A result that changes an operand in place counts with the operand."""
    in_place = {int(place) for place in re.findall(r"\{(\d+)\}: \(\d+, \{", line.attributes)}
    results = [x for place, x in enumerate(all_arrays(line.result)) if place not in in_place]
    read = sum(num_bytes(text) for text in operands if not text.startswith("s8["))  # cuBLAS works in bytes
    return read + sum(x.num_bytes for x in results if x.in_memory and x.kind != "s8")


def is_in_place(line: Line) -> bool:
    """Returns whether a line changes a part of its first operands, and keeps the rest."""
    return line.opcode in ("dynamic-update-slice", "scatter")


def updated_bytes(lines: dict[str, Line], line: Line) -> int:
    """Returns the bytes that a line writes in place."""
    if line.opcode == "dynamic-update-slice":
        return num_bytes(lines[line.operands[1]].result)
    arity = (len(line.operands) - 1) // 2  # arrays, indices, updates
    return sum(num_bytes(lines[name].result) for name in line.operands[arity + 1 :])


class Fusion:
    """The bytes that a fusion reads and writes.

    Args:
        computations: those of the program, since a TPU's fusion may hold others.
        name: its computation.
    """

    def __init__(self, computations: dict[str, Computation], name: str):
        self.computations, self.computation = computations, computations[name]
        self.users: dict[str, list[tuple[Line, int]]] = {}
        for line in self.computation.lines.values():
            if line.opcode != "bitcast":
                for place, operand in enumerate(line.operands):
                    self.users.setdefault(self.computation.source(operand).name, []).append((line, place))
        parameters = [line for line in self.computation.lines.values() if line.opcode == "parameter"]
        self.parameters = {line.place: line for line in parameters}

    def inner(self, line: Line) -> "Fusion | None":
        """Returns the fusion that a line of this one holds, if it is one."""
        name = line.called() if line.opcode == "fusion" else None
        return None if name is None else Fusion(self.computations, name)

    def bytes_read(self, place: int) -> int:
        """Returns the bytes that are read of the operand at a place."""
        parameter, lines, total = self.parameters[place], self.computation.lines, 0
        whole = num_bytes(parameter.result)
        for user, at in self.users.get(parameter.name, []):
            if user.opcode in ("dynamic-slice", "slice", "gather") and at == 0:
                total += min(num_bytes(user.result), whole)
            elif user.opcode == "tuple" or (user.opcode == "dynamic-update-slice" and at == 0):
                continue
            elif user.opcode == "scatter" and at < (len(user.operands) - 1) // 2:
                total += updated_bytes(lines, user)  # it adds to what is there
            elif (inner := self.inner(user)) is not None:
                total += inner.bytes_read(at)
            else:
                return whole
        return min(total, whole)

    def bytes_written(self, name: str, result: int) -> int:
        """Returns the bytes that are written of a result, of which `result` bytes are in main memory."""
        line = self.computation.source(name)
        if is_in_place(line):
            return min(updated_bytes(self.computation.lines, line), result)
        inner = self.inner(line)
        return result if inner is None else inner.bytes_written(inner.computation.root.name, result)

    def total(self, line: Line) -> int:
        """Returns the bytes that the line of the fusion reads and writes."""
        root = self.computation.source(self.computation.root.name)
        names = root.operands if root.opcode == "tuple" else (self.computation.root.name,)
        results = [array.num_bytes * array.in_memory for array in all_arrays(line.result)]
        passed = "output_to_operand_aliasing" in line.attributes  # a parameter that is returned is the operand itself
        total = sum(map(self.bytes_read, self.parameters))
        if len(names) != len(results):  # one line makes several arrays
            return total + sum(results)
        for name, result in zip(names, results, strict=True):
            if not (passed and self.computation.source(name).opcode == "parameter"):
                total += self.bytes_written(name, result)
        return total


def overlapping_bytes(computation: Computation, line: Line) -> int:
    """Returns the bytes of main memory that a copy between memories reads and writes."""
    source = all_arrays(computation.lines[line.operands[0]].result)[0]
    made = all_arrays(line.result)[1 if line.opcode == "slice-start" else 0]  # operand and slice, or copy and operand
    return made.num_bytes * (source.in_memory + made.in_memory)


def sizes_of(line: Line, attribute: str) -> list[int]:
    """Returns the numbers of an attribute such as dimensions={0,1}."""
    found = re.search(rf"{attribute}=\{{([\d,]*)\}}", line.attributes)
    return [int(n) for n in found[1].split(",") if n] if found else []


def dot_flops(computation: Computation, line: Line) -> float:
    """Returns 2 * (elements of the result) * (summed elements) of a product."""
    shape = first_shape(computation.lines[line.operands[0]].result)
    return 2.0 * num_elements(line.result) * math.prod(shape[axis] for axis in sizes_of(line, "lhs_contracting_dims"))


def convolution_flops(computation: Computation, line: Line) -> float:
    """Returns the operations of a product that libtpu writes as a convolution.

    Left, right and result have b m k, b k n and b m n elements. So b m n k is the square root of their product divided
    by b. A dilated window has b elements; without one, b is 1.
    """
    left, right = (num_elements(computation.lines[name].result) for name in line.operands[:2])
    window = re.search(r"window=\{size=([\dx]+)[^}]*lhs_dilate", line.attributes)
    batch = math.prod(int(n) for n in window[1].split("x")) if window else 1
    return 2.0 * math.sqrt(float(left) * right * num_elements(line.result) / batch)


def library_flops(target: str, operands: list[str], result: str) -> float:
    """Returns the operations of a call into a library, or of a kernel of this project.

    cuBLAS: left, right and result have b m k, b k n and b m n elements. So b m n k is the square root of their product
    divided by b.

    cuDNN, and `short_attention`: attention makes two products of b N matrices [T, H] x [H, S] forward, and five
    backward. The splash kernels for a TPU make seven backward, in two kernels. Blocks that they leave out count, too.

    Args:
        target: names of the call.
        operands: types of its operands, in order.
        result: type of its result.
    """
    shapes = [first_shape(operand) for operand in operands]
    if "cublas" in target:
        sizes = math.prod(shapes[0]) * math.prod(shapes[1]) * math.prod(first_shape(result))
        return 2.0 * math.sqrt(sizes / math.prod(shapes[0][:-2]))
    for kernel, products in SPLASH_PRODUCTS.items():
        if kernel in target:  # [B, N, T, H] and [B, M, S, H] behind the tables of blocks
            query, key = [shape for shape in shapes if len(shape) == 4][:2]
            return 2.0 * products * math.prod(query) * key[2]
    backward = "backward" in target.lower()
    if "fmha" in target:  # [B, T, N, H] and [B, S, M, H]
        return 2.0 * (5 if backward else 2) * math.prod(shapes[0]) * shapes[1][1]
    if "short_attention" in target:  # [B, T, 3, N, H], or [B, T, 1, N, H] and [B, S, 2, N, H]
        keys = shapes[1] if len(shapes[1]) == 5 else shapes[0]
        return 2.0 * (5 if backward else 2) * math.prod(shapes[0]) / shapes[0][2] * keys[1]
    return 0.0


def sort_passes(length: int) -> int:
    """Returns how often XLA's bitonic sort reads and writes its arrays; blocks are sorted in one kernel."""
    stages = math.ceil(math.log2(max(length, 2))) - int(math.log2(SORTED_IN_A_BLOCK))
    return 1 + sum(stage + 1 for stage in range(1, stages + 1))
