"""What two runs left behind, compared to the bit: figures, checksums, files, lines, programs."""

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from commits.program_text import ProgramText, difference, read_program, sameness

# Figures of a run that must be equal; the others are times, or follow from these.
TRAIN_FIGURES = ("step", "loss", "accuracy", "gradient_norm", "learning_rate", "source_tokens", "target_tokens")
VALIDATION_FIGURES = ("step", "loss", "accuracy", "bleu", "chrf", "exact_match")

LEAST_SAMENESS = 0.5  # share of instructions that two programs have in common if one has become the other


@dataclass(frozen=True)
class Verdict:
    """One line of the result.

    Attributes:
        recipe: of the run.
        what: was compared.
        equal: None where a difference is no fault; of a time, whether a loss is excluded.
        detail: how much was compared, or what differs.
    """

    recipe: str
    what: str
    equal: bool | None
    detail: str

    @property
    def row(self) -> tuple[str, str, str, str]:
        """The cells of a row."""
        words = {True: "equal", False: "**DIFFERENT**", None: "differs, allowed"}
        if self.what.startswith("time"):
            words = {True: "no loss of 5 %", False: "**a loss of 5 % is not excluded**", None: ""}
        return self.recipe, self.what, words[self.equal], self.detail


def records(run: Path, kind: str, names: tuple[str, ...]) -> list[dict[str, Any]]:
    """Returns the figures of a kind in the order in which a run wrote them; one that is not there is None."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [{name: line.get(name) for name in names} for line in lines if line["kind"] == kind]


def compare_records(recipe: str, runs: tuple[Path, Path]) -> Iterator[Verdict]:
    """Compares the figures that two trainings wrote."""
    for kind, names in (("train", TRAIN_FIGURES), ("validation", VALIDATION_FIGURES)):
        old, new = (records(run, kind, names) for run in runs)
        detail = f"{len(old)} records of {', '.join(names[1:])}"
        for a, b in zip(old, new, strict=False):
            if different := [name for name in names if a[name] != b[name]]:
                name = different[0]
                detail = f"step {a['step']}: {name} {a[name]!r} -> {b[name]!r}"
                break
        if kind == "train" and old:
            detail += f"; last loss {old[-1]['loss']:.6f}"
        yield Verdict(recipe, f"{kind} records", bool(old) and old == new, detail)


def checksums(run: Path) -> dict[str, Any]:
    """Returns the checksum of every array in the run's checkpoints, by its path."""
    found = {}
    for meta in sorted(run.glob("checkpoints/*/meta/metadata")):
        of_step = json.loads(meta.read_text(encoding="utf-8"))["checksums"]
        found |= {f"{meta.parts[-3]}/{tree}/{path}": s for tree, sums in of_step.items() for path, s in sums.items()}
    return found


def compare_mappings(recipe: str, what: str, old: dict[str, Any], new: dict[str, Any]) -> Verdict:
    """Compares two mappings, of which none may be empty."""
    different = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    detail = f"{len(old)} compared"
    if different:
        detail = f"{len(different)} of {len(old)}, such as {different[0]}"
    return Verdict(recipe, what, bool(old) and not different, detail)


def contents(folder: Path) -> dict[str, bytes]:
    """Returns the bytes of every file below a folder, by its path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def compare_lines(recipe: str, what: str, files: tuple[Path, Path]) -> Verdict:
    """Compares two files of one line for each sentence, as bytes."""
    old, new = (file.read_bytes().split(b"\n") for file in files)
    different = [n for n, (a, b) in enumerate(itertools.zip_longest(old, new), start=1) if a != b]
    detail = f"{len(old) - 1} lines"
    if different:
        detail = f"{len(different)} of {len(old) - 1} lines, the first is {different[0]}"
    return Verdict(recipe, what, len(old) > 1 and not different, detail)


def compare_programs(recipe: str, folders: list[tuple[Path, Path]], names: tuple[str, ...]) -> Iterator[Verdict]:
    """Compares programs: those of the first commit with the same, or else the most alike, of the second.

    Args:
        recipe: of both.
        folders: parts of the recipe, as the first and as the second commit left them.
        names: of the programs of the first commit that must be equal in the second, under whatever name.
    """

    def read(which: int) -> dict[str, ProgramText]:
        paths = sorted(path for pair in folders for path in (pair[which] / "programs").iterdir())
        programs = [read_program(path) for path in paths]
        return {program.digest: program for program in programs}  # one for each, however often it was made

    old, new = read(0), read(1)
    left = [program for digest, program in new.items() if digest not in old]
    for name in sorted({program.module for program in old.values()}, key=lambda name: (name not in names, name)):
        mine = [(digest in new, program) for digest, program in old.items() if program.module == name]
        if same := sum(found for found, _ in mine):
            yield Verdict(recipe, f"program {name}", True, f"{same} equal as text")
        for program in (program for found, program in mine if not found):
            nearest = max(left, key=lambda other: sameness(program, other), default=None)
            detail = "nothing like it"
            if nearest is not None and sameness(program, nearest) > LEAST_SAMENESS:
                left.remove(nearest)
                detail = f"with {nearest.module}: {difference(program, nearest)}"
            yield Verdict(recipe, f"program {name}", False if name in names else None, detail)
    if missing := set(names) - {program.module for program in old.values()}:
        yield Verdict(recipe, "programs", False, f"none is called {', '.join(sorted(missing))}")
    for program in left:
        detail = f"new, {program.instructions.total()} instructions"
        yield Verdict(recipe, f"program {program.module}", None, detail)
