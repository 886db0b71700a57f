"""Optimised XLA programs as text that two commits can be compared by.

XLA numbers its instructions in the order in which they were made, and writes source lines beside them. Neither is part
of what a program computes. XLA's own canonical form leaves both out, and has each computation where it is called.
"""

import hashlib
import re
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from jaxlib import _hlo  # XLA's printer; JAX has no public name for it

NAME = re.compile(r"\btmp_\d+\b")


@dataclass(frozen=True)
class ProgramText:
    """An optimised program.

    Attributes:
        module: the name that JAX gives it, such as "jit_step".
        signature: types and layouts of what it reads and writes, and what it may overwrite.
        body: one instruction a line, in the order in which they run.
    """

    module: str
    signature: str
    body: str

    @cached_property
    def digest(self) -> str:
        """Of all but the name."""
        return hashlib.sha256(f"{self.signature}\n{self.body}".encode()).hexdigest()

    @cached_property
    def instructions(self) -> Counter[str]:
        """How often each instruction occurs, known by operation, types and attributes, not by what it reads."""
        return Counter(NAME.sub("", line).strip() for line in self.body.splitlines() if " = " in line)


def read_program(path: Path) -> ProgramText:
    """Returns the program in a file that XLA has written under `--xla_dump_hlo_as_text`, or a JAX `as_text()`.

    Raises:
        ValueError: the file holds no program.
    """
    text = path.read_text(encoding="utf-8")
    head = re.match(r"HloModule ([\w.\-]+), (.*)", text)
    if head is None:
        raise ValueError(f"{path}: expected a program that begins with HloModule, got {text[:80]!r}.")
    form = _hlo.HloPrintOptions.canonical()
    form.print_backend_config = form.print_control_dependencies = form.print_large_constants = True
    form.print_ids = False
    _, _, body = _hlo.hlo_module_from_text(text).to_string(form).partition("\nENTRY ")
    return ProgramText(head[1], head[2], body.partition("\n")[2])


def sameness(program: ProgramText, other: ProgramText) -> float:
    """Returns the share of instructions that two programs have in common, in [0, 1]; larger is more alike."""
    ours, theirs = program.instructions, other.instructions
    return 2 * (ours & theirs).total() / max(ours.total() + theirs.total(), 1)


def difference(program: ProgramText, other: ProgramText) -> str:
    """Returns in one line how far two programs are alike."""
    ours, theirs = program.instructions, other.instructions
    if ours == theirs:
        return "same instructions, with other operands, settings or order"
    only = [f"{sign}{count} {line}" for sign, more in (("-", ours - theirs), ("+", theirs - ours))
            for line, count in more.most_common(3)]  # fmt: skip
    common = (ours & theirs).total()
    shown = "; ".join(text if len(text) <= 160 else f"{text[:160]}..." for text in only).replace("|", "\\|")
    return f"{common} of {ours.total()} and {theirs.total()} instructions in common; {shown}"
