"""The start of a new run, with new parameters or those of another run."""

import base64
import contextlib
import tempfile
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flax_transformer.config.recipe import Config
from flax_transformer.data.batching import Position
from flax_transformer.data.parallel_text import Corpus
from flax_transformer.data.preparation import prepare_tokenizers
from flax_transformer.data.tokenizer_pair import TokenizerPair
from flax_transformer.errors import RunFolderError
from flax_transformer.experiment.programs import RunPrograms
from flax_transformer.experiment.text import PreparedText
from flax_transformer.models.build import vocabulary_info
from flax_transformer.object_storage import storage_errors
from flax_transformer.parallel import processes
from flax_transformer.run_folder import RunFolder
from flax_transformer.small_files import remove_folder
from flax_transformer.training.checkpoint import Checkpoints, checksums_of
from flax_transformer.training.loop import CompiledSteps, TrainingStart
from flax_transformer.training.run_log import RunLog, SilentLog
from flax_transformer.training.state import StateLayout, TrainState, init_state

# --- the run and its start


@dataclass(frozen=True)
class Start:
    """The start of a training.

    Attributes:
        checkpoints: checkpoints of the run, open during the training.
        place: place at which the training loop starts.
        steps: compiled train step; without programs if no step is left.
        notes: lines for the log.
    """

    checkpoints: Checkpoints
    place: TrainingStart
    steps: CompiledSteps
    notes: tuple[str, ...] = ()

    def log(self, folder: RunFolder) -> RunLog:
        """Returns the log of the training, without earlier records of what is done again."""
        if not processes.is_first():
            return SilentLog(folder)
        return RunLog(folder, int(self.place.state.step), self.place.owes_evaluation)


class NewRun:
    """A run that does not exist yet.

    Args:
        config: the recipe.
        folder: folder that the run will get.

    Raises:
        RunFolderError: the folder contains a run or other files.
    """

    def __init__(self, config: Config, folder: RunFolder):
        self.config = config
        self.folder = folder
        folder.check_unused()

    def tokenizers(self, corpus: Corpus) -> TokenizerPair:
        """Returns the tokenizers of the run.

        Raises:
            InputError: as `tokenizers_of_new_run` does.
        """
        return tokenizers_of_new_run(self.config, corpus)

    @contextlib.contextmanager
    def start(self, text: PreparedText, programs: RunPrograms) -> Generator[Start, None, None]:
        """Makes the run's folder, keeps its lock, and yields the start of the training.

        The folder is made last. So a mistake in the input leaves no folder behind.

        Raises:
            InputError: the training cannot start from the run of `init_from`, or programs do not fit the memory.
        """
        params = initial_params(self.config, text.tokenizers, programs.layout)
        compiled = programs.compile(text)
        processes.from_first(lambda: self.folder.create(self.config, text.tokenizers))
        try:
            self.folder.check_shared()
        except RunFolderError:  # so that the same command can be given again
            if processes.is_first():
                remove_folder(self.folder.path)
            raise
        with (
            self.folder.locked() as notes,
            training_checkpoints(self.config, self.folder, text.tokenizers) as checkpoints,
        ):
            state = initial_state(self.config, text.tokenizers, programs.layout, params)
            checksums_of(state)  # compiles the checksums that every checkpoint needs
            yield Start(checkpoints, TrainingStart(state, Position(0, 0)), compiled.steps, (*notes, compiled.text))


# --- tokenizers


def tokenizers_of_new_run(config: Config, corpus: Corpus) -> TokenizerPair:
    """Returns the tokenizers of the run of `init_from`, or those that are learnt from the training text.

    Raises:
        InputError: the text is bad, or the training cannot start from the run of `init_from`.
    """
    if config.init_from is not None:
        return _parent(config.init_from, config).tokenizers()
    if not processes.joined():
        return prepare_tokenizers(corpus.train, config.tokenizer)
    return _tokenizers_of_first(corpus, config)


def _tokenizers_of_first(corpus: Corpus, config: Config) -> TokenizerPair:
    """Returns the tokenizers that process 0 prepares. The others get their files, since hosts may share no cache."""
    with tempfile.TemporaryDirectory() as folder:

        def files() -> dict[str, str]:
            prepare_tokenizers(corpus.train, config.tokenizer).save(Path(folder))
            return {file.name: base64.b64encode(file.read_bytes()).decode() for file in Path(folder).iterdir()}

        for name, content in processes.from_first(files).items():
            (Path(folder) / name).write_bytes(base64.b64decode(content))
        return TokenizerPair.load(Path(folder))


# --- checkpoints and parameters


def training_checkpoints(config: Config, folder: RunFolder, tokenizers: TokenizerPair) -> Checkpoints:
    """Returns the checkpoints of a run; its configuration says how many are kept."""
    keep = config.training.keep_newest, config.training.keep_best
    return Checkpoints(folder.checkpoints, keep, tokenizers.fingerprint)


def initial_params(config: Config, tokenizers: TokenizerPair, layout: StateLayout) -> Any:
    """Returns the best parameters of the run of `init_from`, in the shardings of `layout`, or None without such a run.

    Raises:
        RunFolderError: the training cannot start from that run, or its tokenizers are others.
    """
    if config.init_from is None:
        return None
    parent = _parent(config.init_from, config)
    with Checkpoints(parent.checkpoints, tokenizers=tokenizers.fingerprint) as checkpoints:
        return checkpoints.undisturbed(
            lambda: checkpoints.restore_params(checkpoints.choose("best"), layout.abstract.params)
        )


def initial_state(config: Config, tokenizers: TokenizerPair, layout: StateLayout, params: Any) -> TrainState:
    """Returns the state before the first step, with `params` or, if they are None, new parameters."""
    state = init_state(config.model, vocabulary_info(tokenizers), layout, config.training.seed)
    return state if params is None else state.starting_from(params)


def _parent(path: str, config: Config) -> RunFolder:
    """Returns the run at `path`, which the run of `config` starts from.

    Raises:
        RunFolderError: there is no run, or its tokenizer was learnt with other settings.
    """
    parent = RunFolder(path)
    with storage_errors(parent.path):
        found = parent.config_file.is_file()
    if not found:
        raise RunFolderError(
            f"--init-from {path}: there is no run, since that folder has no config.yaml. Give the folder of a training "
            "run; if it was moved, give its new place."
        )
    if parent.read_config().tokenizer != config.tokenizer:
        raise RunFolderError(
            f"--init-from {path}: its tokenizer was learnt with other settings than section 'tokenizer' asks for. Its "
            "parameters mean something only with its own tokenizer, which the new run takes over: copy section "
            f"'tokenizer' from {parent.config_file}."
        )
    return parent
