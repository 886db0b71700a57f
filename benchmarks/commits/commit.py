"""A commit of this repository, run by its commands from files of its own."""

import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path


class Failed(Exception):
    """There is no such commit, or one of its commands failed."""


@dataclass(frozen=True)
class Commit:
    """A commit that can be run.

    Attributes:
        hash: of the commit.
        folder: for its files and for what it computes.
    """

    hash: str
    folder: Path

    @property
    def tree(self) -> Path:
        """The files of the commit."""
        return self.folder / "tree"

    @property
    def short(self) -> str:
        """Enough of the hash."""
        return self.hash[:12]

    def command(
        self, *arguments: str | Path, dump: Path | None = None, cached: bool = False
    ) -> subprocess.CompletedProcess[bytes]:
        """Runs `flax-transformer ARGUMENTS` of this commit.

        Args:
            arguments: of the command.
            dump: folder for the programs that XLA makes.
            cached: whether compiled programs are kept for the next call.

        Raises:
            Failed: the command failed; its messages are shown.
        """
        return self._python("-m", "flax_transformer.cli.main", *map(str, arguments), dump=dump, cached=cached)

    def check_imported(self) -> None:
        """Makes sure that the commit's own files are imported, and not an installed copy.

        Raises:
            Failed: they are not.
        """
        found = self._python("-c", "import flax_transformer; print(flax_transformer.__file__)").stdout.decode().strip()
        if not Path(found).resolve().is_relative_to(self.tree.resolve()):
            raise Failed(f"commit {self.short} imports {found}, which is not in {self.tree}.")

    def _python(
        self, *arguments: str, dump: Path | None = None, cached: bool = False
    ) -> subprocess.CompletedProcess[bytes]:
        mine = ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE", "PYTHONPATH")
        environment = {name: value for name, value in os.environ.items() if name not in mine}
        environment["PYTHONPATH"] = str(self.tree)
        environment["XDG_CACHE_HOME"] = str(self.folder / "cache")  # tokenizers and tokenised text are made anew
        environment["JAX_ENABLE_COMPILATION_CACHE"] = str(cached).lower()
        if dump is not None:
            environment["XLA_FLAGS"] = f"--xla_dump_to={dump} --xla_dump_hlo_as_text --xla_dump_large_constants"
        done = subprocess.run([sys.executable, *arguments], cwd=self.tree, env=environment, capture_output=True)
        if done.returncode not in (0, 4):  # 4: done, but some line was shortened
            said = (done.stdout + done.stderr).decode(errors="replace")
            raise Failed(f"{self.short}: {' '.join(arguments)}: exit code {done.returncode}\n{said[-4000:]}")
        return done


def check_out(name: str, work: Path) -> Commit:
    """Returns a commit of the repository that this file lies in, with its files under `work`.

    Raises:
        Failed: there is no such commit, or its own files are not what is imported.
    """
    repository = Path(__file__).resolve().parents[2]
    git = ["git", "-C", str(repository)]
    found = subprocess.run([*git, "rev-parse", "--verify", f"{name}^{{commit}}"], capture_output=True, text=True)
    if found.returncode:
        raise Failed(f"{name}: no such commit in {repository}.")
    commit = Commit(found.stdout.strip(), work.resolve() / found.stdout.strip())
    if not commit.tree.exists():
        commit.folder.mkdir(parents=True, exist_ok=True)
        partial = commit.folder / "tree.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        archive = subprocess.run([*git, "archive", commit.hash], check=True, capture_output=True)
        subprocess.run(["tar", "-x", "-C", str(partial)], input=archive.stdout, check=True)
        partial.rename(commit.tree)
    commit.check_imported()
    return commit


def kept(folder: Path, what: str, make: Callable[[Path], None]) -> Path:
    """Returns a folder that `make` fills, once; a process that comes while another fills it waits."""
    done = folder / "done.json"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with Path(f"{folder}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            started = time.monotonic()
            make(folder)
            seconds = round(time.monotonic() - started, 1)
            done.write_text(json.dumps({"seconds": seconds}), encoding="utf-8")
            print(f"{datetime.now(UTC):%H:%M:%S} {what}: {seconds:.0f} s", file=sys.stderr, flush=True)
    return folder
