"""Optimised XLA programs as text that two commits can be compared by: names and source lines left out.

XLA numbers its instructions in the order in which they were made, and writes source lines beside them. Neither is part
of what a program computes. Two forms leave them out:

    text    computations in the order in which they are first called, names numbered as they appear
    graph   what each instruction computes from what, whatever stands before it in the text

Equal text is the same program in the same order. An equal graph with another text is the same program, whose
instructions or computations stand in another order. Arguments may have changed places, too: a graph in which those of
one type are not told apart is then equal.
"""

import hashlib
import re
from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

QUOTED = r'"(?:[^"\\]|\\.)*"'
METADATA = re.compile(rf",? ?metadata=\{{(?:[^{{}}\"]|{QUOTED})*\}}")
INDEX_COMMENT = re.compile(r"/\*index=\d+\*/")
HEADER = re.compile(r"(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) \(.*\{$")
INSTRUCTION = re.compile(r"\s+(?P<root>ROOT )?%(?P<name>[\w.\-]+) = (?P<rest>.*)$")
NAME = re.compile(r"%([\w.\-]+)")
PARAMETER = re.compile(r"parameter\(\d+\)")
PREDECESSORS = re.compile(r"predecessors=\{([^}]*)\}")


@dataclass(frozen=True)
class Line:
    """One instruction.

    Attributes:
        name: of its result.
        rest: what stands behind the equals sign.
        root: whether its computation returns it.
    """

    name: str
    rest: str
    root: bool


@dataclass(frozen=True)
class ProgramText:
    """An optimised program.

    Attributes:
        module: the name that JAX gives it, such as "jit_step".
        signature: types and layouts of what it reads and writes, and what it may overwrite.
        computations: the lines of each, by its name.
        entry: name of the one that is run.
    """

    module: str
    signature: str
    computations: dict[str, list[Line]]
    entry: str

    @property
    def num_instructions(self) -> int:
        """Instructions of all computations."""
        return sum(map(len, self.computations.values()))

    @cached_property
    def text(self) -> str:
        """The program in lines, names numbered in the order in which they appear."""
        numbers: dict[str, str] = {}

        def numbered(found: re.Match) -> str:
            return numbers.setdefault(found[1], f"%{len(numbers)}")

        lines, due, seen = [self.signature], [self.entry], {self.entry}
        while due:
            name = due.pop(0)
            lines.append(NAME.sub(numbered, f"%{name} {{"))
            for line in self.computations[name]:
                lines.append(NAME.sub(numbered, f"  {'ROOT ' * line.root}%{line.name} = {line.rest}"))
                for called in NAME.findall(line.rest):
                    if called in self.computations and called not in seen:
                        seen.add(called)
                        due.append(called)
        return "\n".join(lines) + "\n"

    @cached_property
    def digest(self) -> str:
        """Of `text`."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    @cached_property
    def graph(self) -> tuple[str, Counter[str]]:
        """The signature, and how often each instruction occurs, known by all that its result depends on."""
        return self.signature, self._graph(self.computations)

    @cached_property
    def graph_of_any_arguments(self) -> Counter[str]:
        """How often each instruction occurs, where arguments of one type are not told apart."""
        entry = [replace(line, rest=PARAMETER.sub("parameter()", line.rest)) for line in self.computations[self.entry]]
        return self._graph(self.computations | {self.entry: entry})

    def _graph(self, computations: dict[str, list[Line]]) -> Counter[str]:
        roots: dict[str, str] = {}  # of the computations that have been seen
        counts: Counter[str] = Counter()
        for name in self._callees_first():
            known = _hashed(computations[name], roots)
            counts.update(known[line.name] + " root" * line.root for line in computations[name])
            roots[name] = next(known[line.name] for line in computations[name] if line.root)
        return counts

    def _callees_first(self) -> list[str]:
        """Returns the names of the computations, each behind those that it calls."""
        order: dict[str, None] = {}

        def visit(name: str) -> None:
            for line in self.computations[name]:
                for called in NAME.findall(line.rest):
                    if called in self.computations and called not in order:
                        visit(called)
            order.setdefault(name)

        visit(self.entry)
        return list(order)


def _hashed(lines: list[Line], roots: dict[str, str]) -> dict[str, str]:
    """Returns a hash for each instruction of a computation, of what it does and of the hashes of what it reads."""
    known: dict[str, str] = {}

    def operand(found: re.Match) -> str:
        return f"<{known.get(found[1]) or roots.get(found[1]) or found[1]}>"

    def predecessors(found: re.Match) -> str:
        return f"after {sorted(known[name] for name in NAME.findall(found[1]))}"

    for line in lines:
        rest = NAME.sub(operand, PREDECESSORS.sub(predecessors, line.rest))
        known[line.name] = hashlib.sha256(rest.encode()).hexdigest()
    return known


def read_program(path: Path) -> ProgramText:
    """Returns the program in a file that XLA has written under `--xla_dump_hlo_as_text`, or a JAX `as_text()`.

    Raises:
        ValueError: the file holds no program.
    """
    head, *rest = path.read_text(encoding="utf-8").splitlines()
    found = re.match(r"HloModule ([\w.\-]+), (.*)", head)
    if found is None:
        raise ValueError(f"{path}: expected a program that begins with HloModule, got {head[:80]!r}.")
    computations: dict[str, list[Line]] = {}
    entry = current = ""
    for line in rest:
        if line.startswith((" ", "}")):  # an instruction, or the end of a computation
            if current and (instruction := INSTRUCTION.match(line)):
                text = INDEX_COMMENT.sub("", METADATA.sub("", instruction["rest"]))
                computations[current].append(Line(instruction["name"], text, instruction["root"] is not None))
            continue
        header = HEADER.match(line)  # otherwise a line of the tables of files and functions
        current = header["name"] if header else ""
        if header:
            computations[current] = []
            entry = current if header["entry"] else entry
    return ProgramText(found[1], INDEX_COMMENT.sub("", found[2]), computations, entry)


def instructions(program: ProgramText) -> Counter[str]:
    """Returns how often each instruction occurs, known by operation, types and attributes, not by what it reads."""
    found: Counter[str] = Counter()
    for lines in program.computations.values():
        for line in lines:
            found[re.sub(r"(parameter\(|, index=)\d+", r"\1", NAME.sub("%", PREDECESSORS.sub("", line.rest)))] += 1
    return found


def sameness(program: ProgramText, other: ProgramText) -> float:
    """Returns the share of instructions that two programs have in common, in [0, 1]; larger is more alike."""
    ours, theirs = instructions(program), instructions(other)
    return 2 * (ours & theirs).total() / max(ours.total() + theirs.total(), 1)


def difference(program: ProgramText, other: ProgramText) -> str:
    """Returns in one line how far two programs are alike."""
    if program.text == other.text:
        return "equal as text"
    if program.graph == other.graph:
        return "equal, in another order"
    if program.graph_of_any_arguments == other.graph_of_any_arguments:
        return "equal but for the order of arguments"
    ours, theirs = instructions(program), instructions(other)
    if ours == theirs:
        return "same instructions, with other operands"
    only = [f"{sign}{count} {line}" for sign, more in (("-", ours - theirs), ("+", theirs - ours))
            for line, count in more.most_common(3)]  # fmt: skip
    common = (ours & theirs).total()
    shown = "; ".join(text if len(text) <= 160 else f"{text[:160]}..." for text in only).replace("|", "\\|")
    return f"{common} of {ours.total()} and {theirs.total()} instructions in common; {shown}"
