"""The run folder: everything that is needed to resume a run or to translate with it. It contains data and no code.

    config.yaml   = complete configuration, itself a valid --config
    run_card.json = summary of the run: versions, devices, test scores
    metrics.jsonl = one JSON object for each progress line and evaluation
    train.log     = printed lines; the training process keeps a lock on this file
    bad_batch.npz = batch at which a training diverged
    tokenizer/    = tokenizers of both languages, or one for both
    checkpoints/  = STEP/{params,optimizer,meta}; removed/ is being deleted, and damaged/ cannot be read
    samples/      = sources, references and translations of the test part
    tensorboard/  = event files
    plots/        = pictures

With `training.ema_decay` a checkpoint's `params` is the average, and its `trained` has the parameters themselves.
"""

import contextlib
import dataclasses
import json
import os
import secrets
import tempfile
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

from flax_transformer.config.reading import read_config, write_config
from flax_transformer.config.recipe import Config
from flax_transformer.data.tokenizer_pair import TokenizerPair
from flax_transformer.errors import RunFolderError, shown
from flax_transformer.locks import take_lock
from flax_transformer.object_storage import AnyPath, any_path, on_object_storage, storage_errors
from flax_transformer.parallel import processes
from flax_transformer.small_files import remove_folder, write_atomically

NO_LOCK = (
    "note: this run folder has no lock, since {reason}. Let no second training write to it; nothing here would notice"
)


class RunFolder:
    """Paths and small files of a run folder, on a disk or on object storage.

    Args:
        path: the folder, or its address `gs://BUCKET/FOLDER`.

    Raises:
        ConfigError: an address of storage that is not supported, or whose library is missing.
    """

    def __init__(self, path: AnyPath | str):
        self.path = any_path(path)

    @property
    def config_file(self) -> AnyPath:
        """The complete configuration."""
        return self.path / "config.yaml"

    @property
    def tokenizer(self) -> AnyPath:
        """The folder of the tokenizers."""
        return self.path / "tokenizer"

    @property
    def checkpoints(self) -> AnyPath:
        """The folder of checkpoints."""
        return self.path / "checkpoints"

    @property
    def metrics_file(self) -> AnyPath:
        """The file of metrics, with one JSON object a line."""
        return self.path / "metrics.jsonl"

    @property
    def log_file(self) -> AnyPath:
        """The file of printed lines."""
        return self.path / "train.log"

    @property
    def bad_batch(self) -> AnyPath:
        """The batch at which a training diverged."""
        return self.path / "bad_batch.npz"

    @property
    def tensorboard(self) -> AnyPath:
        """The folder of event files."""
        return self.path / "tensorboard"

    @property
    def plots(self) -> AnyPath:
        """The folder of pictures."""
        return self.path / "plots"

    @property
    def card_file(self) -> AnyPath:
        """The summary of the run, which is written at its end."""
        return self.path / "run_card.json"

    @property
    def test_sources(self) -> AnyPath:
        """The source sentences of the test part, one a line."""
        return self.path / "samples" / "test.sources.txt"

    @property
    def test_references(self) -> AnyPath:
        """The references of the test part, one a line."""
        return self.path / "samples" / "test.references.txt"

    @property
    def test_hypotheses(self) -> AnyPath:
        """The run's translations of the test part, one a line."""
        return self.path / "samples" / "test.hypotheses.txt"

    def check_unused(self, option: str = "--run") -> None:
        """Checks that a new run can be made here.

        Args:
            option: flag that names the folder, for messages.

        Raises:
            RunFolderError: the folder contains a run or other files, or it cannot be written.
            OSError: object storage cannot be reached.
        """
        self._check_name()
        with storage_errors(self.path):
            self._check_empty(option)
        if on_object_storage(self.path):
            if processes.is_first():
                self._try_to_write(option)
            return
        there = next(path for path in (self.path, *self.path.absolute().parents) if path.exists())
        if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
            raise RunFolderError(
                f"{self.path} cannot be made, since {there} cannot be written. Choose another by {option} FOLDER."
            )

    def _check_empty(self, option: str) -> None:
        if self.config_file.exists():
            go_on = f"Go on with it by --run {self.path} --resume, or choose" if option == "--run" else "Choose"
            raise RunFolderError(
                f"{self.path} already holds a run. {go_on} another folder by {option} FOLDER; nothing was changed."
            )
        remains = {"tokenizer", "config.yaml.new"}  # of a process that was killed inside `create`
        if self.path.exists() and not (self.path.is_dir() and {p.name for p in self.path.iterdir()} <= remains):
            raise RunFolderError(f"{self.path} exists and is not an empty folder. Choose another by {option} FOLDER.")

    def _try_to_write(self, option: str) -> None:
        mark = self.path / "config.yaml.new"
        try:
            write_atomically(mark, "")
            with storage_errors(mark):
                mark.unlink()
        except OSError as error:
            raise RunFolderError(
                f"{self.path} cannot be written: {error.strerror or error}. Check the name of the bucket, your "
                f"credentials and the network, or choose another folder by {option} FOLDER."
            ) from error

    def _check_name(self) -> None:
        """Raises a `RunFolderError` unless the path is valid Unicode; TensorStore writes and reads no other."""
        try:
            str(self.path.absolute()).encode()
        except UnicodeEncodeError as error:
            raise RunFolderError(
                f"{shown(str(self.path.absolute()))} cannot be a run folder, since its path is not valid UTF-8. Rename "
                "the part of it that is not."
            ) from error

    def create(self, config: Config, tokenizers: TokenizerPair) -> None:
        """Makes the folder with its tokenizers and its configuration, in this order.

        Raises:
            RunFolderError: as `check_unused`.
        """
        self.check_unused()
        with self.writing():
            remove_folder(self.tokenizer)
            tokenizers.save(self.tokenizer)
            self.update_config(config)

    @contextlib.contextmanager
    def made_whole(self) -> Generator["RunFolder", None, None]:
        """Yields a run folder with a temporary name, which gets this folder's name at the end of the `with` block.

        On object storage it is this folder itself.

        Raises:
            RunFolderError: as `check_unused`.
        """
        if on_object_storage(self.path):  # it renames nothing
            yield self
            return
        target = self.path.resolve()
        if target.is_dir():  # empty, or begun by a training that was killed at once; it may be a mount point
            with tempfile.TemporaryDirectory(prefix="partial-", dir=target) as partial:
                yield (made := RunFolder(Path(partial)))
                remove_folder(self.tokenizer)
                for entry in sorted(made.path.iterdir(), key=lambda entry: entry == made.config_file):
                    entry.rename(target / entry.name)  # last the file that makes the folder a run
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f"{target.name}.partial-", dir=target.parent) as partial:
            yield (made := RunFolder(Path(partial) / "run"))
            self.check_unused("--output")
            made.path.rename(target)

    @contextlib.contextmanager
    def locked(self) -> Generator[tuple[str, ...], None, None]:
        """Keeps the folder's lock inside a `with` block, so that no two trainings delete each other's files.

        It yields lines for the log: one where there is no lock to be had. Of several processes of one training the
        first one keeps the lock.

        Raises:
            RunFolderError: another process trains in the folder.
        """
        with contextlib.ExitStack() as files:

            def take() -> list[str]:
                if on_object_storage(self.path):
                    return [NO_LOCK.format(reason="it lies on object storage")]
                got = take_lock(files.enter_context(self.log_file.open("a", encoding="utf-8")))
                if got is False:
                    raise RunFolderError(
                        f"{self.path} is being trained by another process. Wait for it to end, or stop it and go on by "
                        "--resume; nothing was changed."
                    )
                return [] if got else [NO_LOCK.format(reason="its file system or this system has none")]

            yield tuple(processes.from_first(take))

    @contextlib.contextmanager
    def writing(self) -> Generator[None, None, None]:
        """Turns an `OSError` inside a `with` block, such as one of a full disk, into a `RunFolderError`."""
        try:
            with storage_errors(self.path):
                yield
        except OSError as error:
            file = "" if error.filename is None else f" ({error.filename})"
            remote = on_object_storage(self.path)
            begun = remote or self.config_file.exists()  # storage that has just failed is not asked again
            go_on = "go on by --resume; its checkpoints are whole" if begun else "begin again"
            mend = "Mend the permissions or the network" if remote else "Make room, or mend the file system"
            raise RunFolderError(
                f"the run folder {self.path} cannot be written: {error.strerror or error}{file}. {mend}, and {go_on}."
            ) from error

    def check_shared(self) -> None:
        """Checks that all processes of a training see the same folder.

        Raises:
            RunFolderError: a process does not see a file that process 0 has written.
        """
        if not processes.joined():
            return
        mark = self.path / f"shared-{processes.from_first(lambda: secrets.token_hex(8))}"
        with self.writing():
            processes.from_first(lambda: write_atomically(mark, "All processes must see this file.\n"))
            with storage_errors(mark):
                seen = processes.exchange(mark.exists())
                processes.from_first(mark.unlink)
        if not all(seen):
            raise RunFolderError(
                f"process {seen.index(False)} does not see the run folder {self.path} of process 0: all processes read "
                "and write the same folder. Put it on a disk that all of them share."
            )

    def update_config(self, config: Config) -> None:
        """Writes the configuration atomically, with the changes of a resumed run, such as its number of steps."""
        with self.writing():
            write_config(config, self.config_file)

    @classmethod
    def open(cls, path: AnyPath | str) -> "RunFolder":
        """Returns an existing run folder.

        Raises:
            RunFolderError: there is no run at `path`.
            OSError: object storage cannot be reached.
        """
        folder = cls(path)
        folder._check_name()
        with storage_errors(folder.path):
            found = folder.config_file.is_file()
        if not found:
            raise RunFolderError(
                f"{folder.path} is not a run folder: it has no config.yaml. Give the folder of a training run."
            )
        return folder

    @classmethod
    def of_config(cls, path: AnyPath) -> "RunFolder | None":
        """Returns the run folder that a configuration belongs to, or None if it is a recipe."""
        folder = cls(path.parent)
        with storage_errors(folder.path):
            return folder if path.name == folder.config_file.name and folder.tokenizer.is_dir() else None

    def read_config(self) -> Config:
        """Returns the run's configuration, whose `run` is this folder; raises as `read_config` does.

        The file itself names the folder that the run had when it was written. A run may have been moved or copied.
        """
        with storage_errors(self.path):
            return dataclasses.replace(read_config(self.config_file, of_run=True), run=str(self.path))

    def tokenizers(self) -> TokenizerPair:
        """Returns the run's tokenizers; raises as `TokenizerPair.load` does."""
        with storage_errors(self.path):
            return TokenizerPair.load(self.tokenizer)

    def write_card(self, card: dict[str, Any]) -> None:
        """Writes the run card atomically."""
        with self.writing():
            write_atomically(self.card_file, json.dumps(card, indent=2, ensure_ascii=False) + "\n")

    def write_test(self, sources: Sequence[str], references: Sequence[str], hypotheses: Sequence[str]) -> None:
        """Writes the test part and its translations, one sentence a line."""
        parts = {
            self.test_sources: sources,
            self.test_references: references,
            self.test_hypotheses: hypotheses,
        }
        with self.writing():
            self.test_sources.parent.mkdir(exist_ok=True)
            for file, lines in parts.items():
                write_atomically(file, "".join(f"{line}\n" for line in lines))
