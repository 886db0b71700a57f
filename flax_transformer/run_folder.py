"""A run folder: all that is needed to go on with a run or to translate with it. Data only, no code.

config.yaml      the complete configuration, itself a valid --config
run_card.json    what was run, on what, and what came out
metrics.jsonl    one JSON object for each progress line and evaluation
train.log        what was printed; the process that trains holds a lock on it
bad_batch.npz    the batch at which a training gave up, if it did
tokenizer/       the tokenizers of both languages, or one for both
checkpoints/     STEP/{params,optimizer,meta}; with training.ema_decay params is the average, and trained lies beside
samples/         the test part: sources, references, translations
tensorboard/  plots/
"""

import contextlib
import json
import os
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

from flax_transformer.config.reading import read_config, write_config
from flax_transformer.config.recipe import Config
from flax_transformer.data.tokenizer_pair import TokenizerPair
from flax_transformer.errors import RunFolderError
from flax_transformer.locks import take_lock


class RunFolder:
    """Paths and small files of a run."""

    def __init__(self, path: Path | str):
        self.path = Path(path)

    @property
    def config_file(self) -> Path:
        """The complete configuration."""
        return self.path / "config.yaml"

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.path / "checkpoints"

    @property
    def metrics_file(self) -> Path:
        """One JSON object a line."""
        return self.path / "metrics.jsonl"

    @property
    def log_file(self) -> Path:
        """What was printed."""
        return self.path / "train.log"

    @property
    def bad_batch(self) -> Path:
        """The batch at which a training gave up."""
        return self.path / "bad_batch.npz"

    @property
    def tensorboard(self) -> Path:
        """The folder of event files."""
        return self.path / "tensorboard"

    @property
    def plots(self) -> Path:
        """The folder of pictures."""
        return self.path / "plots"

    @property
    def card_file(self) -> Path:
        """What was run and what came out; written when the run has ended."""
        return self.path / "run_card.json"

    @property
    def test_sources(self) -> Path:
        """The test part's source sentences, one a line."""
        return self.path / "samples" / "test.sources.txt"

    @property
    def test_references(self) -> Path:
        """Their references."""
        return self.path / "samples" / "test.references.txt"

    @property
    def test_hypotheses(self) -> Path:
        """Their translations by the run."""
        return self.path / "samples" / "test.hypotheses.txt"

    def check_unused(self, option: str = "--run") -> None:
        """Returns if a new run can be made here; `option` is the flag that names the folder.

        Raises:
            RunFolderError: the folder holds a run already, or something that is not a run.
        """
        if self.config_file.exists():
            go_on = f"Go on with it by --run {self.path} --resume, or choose" if option == "--run" else "Choose"
            raise RunFolderError(
                f"{self.path} already holds a run. {go_on} another folder by {option} FOLDER; nothing was changed."
            )
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise RunFolderError(f"{self.path} exists and is not an empty folder. Choose another by {option} FOLDER.")

    def create(self, config: Config, tokenizers: TokenizerPair) -> None:
        """Makes the folder, with its tokenizers and, once they are there, its configuration.

        Raises:
            RunFolderError: as `check_unused`.
        """
        self.check_unused()
        tokenizers.save(self.path / "tokenizer")
        self.update_config(config)

    @contextlib.contextmanager
    def held(self) -> Generator[None, None, None]:
        """Keeps other trainings out of the folder: each would remove what the other is writing.

        Raises:
            RunFolderError: another process trains in it.
        """
        with self.log_file.open("a", encoding="utf-8") as log:
            if not take_lock(log):
                raise RunFolderError(
                    f"{self.path} is being trained by another process. Wait for it to end, or stop it and go on by "
                    "--resume; nothing was changed."
                )
            yield

    def update_config(self, config: Config) -> None:
        """Writes the configuration, all or nothing: what a resumed run changes (steps, intervals) is kept too."""
        partial = self.path / "config.partial"
        write_config(config, partial)
        os.replace(partial, self.config_file)

    @classmethod
    def open(cls, path: Path | str) -> "RunFolder":
        """Returns an existing run folder.

        Raises:
            RunFolderError: there is no run at `path`.
        """
        folder = cls(path)
        if not folder.config_file.is_file():
            raise RunFolderError(
                f"{path} is not a run folder: it has no config.yaml. Give the folder of a training run."
            )
        return folder

    def read_config(self) -> Config:
        """Returns the run's configuration; errors as `config.read_config`."""
        return read_config(self.config_file, of_run=True)

    def tokenizers(self) -> TokenizerPair:
        """Returns the run's tokenizers; errors as `TokenizerPair.load`."""
        return TokenizerPair.load(self.path / "tokenizer")

    def write_card(self, card: dict[str, Any]) -> None:
        """Writes the run card, all or nothing."""
        partial = self.path / "run_card.partial"
        partial.write_text(json.dumps(card, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(partial, self.card_file)

    def write_test(self, sources: Sequence[str], references: Sequence[str], hypotheses: Sequence[str]) -> None:
        """Writes the test part and its translations, one sentence a line."""
        self.test_sources.parent.mkdir(exist_ok=True)
        for file, lines in (
            (self.test_sources, sources),
            (self.test_references, references),
            (self.test_hypotheses, hypotheses),
        ):
            file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
