"""How a run begins: anew, or from the parameters of another run."""

import contextlib
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

from flax_transformer.config.recipe import Config
from flax_transformer.data.batching import Position
from flax_transformer.data.parallel_text import Corpus
from flax_transformer.data.preparation import prepare_tokenizers
from flax_transformer.data.tokenizer_pair import TokenizerPair
from flax_transformer.errors import RunFolderError
from flax_transformer.experiment.programs import CompiledPrograms, Programs
from flax_transformer.experiment.text import PreparedText
from flax_transformer.models.build import vocabulary_info
from flax_transformer.run_folder import RunFolder
from flax_transformer.training.checkpoint import Checkpoints, checksums_of
from flax_transformer.training.state import StateLayout, TrainState, init_state


@dataclass(frozen=True)
class Start:
    """Where a training starts.

    Attributes:
        checkpoints: of the run, open for as long as it is trained.
        state: the first one.
        position: the next batch to take.
        compiled: all programs of the run; None where no step is left to take.
        notes: what the log should tell of the start.
    """

    checkpoints: Checkpoints
    state: TrainState
    position: Position
    compiled: CompiledPrograms | None
    notes: tuple[str, ...] = ()


class NewRun:
    """A run that does not exist yet.

    Args:
        config: the recipe.
        folder: where it will lie.

    Raises:
        RunFolderError: there is a run already, or something else.
    """

    def __init__(self, config: Config, folder: RunFolder):
        self.config = config
        self.folder = folder
        folder.check_unused()

    def tokenizers(self, corpus: Corpus) -> TokenizerPair:
        """Returns the tokenizers of the run.

        Raises:
            InputError: as `tokenizers_of_new_run`.
        """
        return tokenizers_of_new_run(self.config, corpus)

    @contextlib.contextmanager
    def start(self, text: PreparedText, programs: Programs) -> Generator[Start, None, None]:
        """Makes the run's folder and keeps others out of it; yields where the training starts.

        The folder is made once everything that the user can get wrong has been looked at.

        Raises:
            InputError: a run that cannot be started from, or programs that do not fit the memory.
        """
        params = initial_params(self.config, text.tokenizers, programs.layout)
        compiled = programs.compile(text)
        self.folder.create(self.config, text.tokenizers)
        with self.folder.held(), training_checkpoints(self.config, self.folder, text.tokenizers) as checkpoints:
            state = initial_state(self.config, text.tokenizers, programs.layout, params)
            checksums_of(state)  # compiles what every checkpoint will need
            yield Start(checkpoints, state, Position(0, 0), compiled)


def tokenizers_of_new_run(config: Config, corpus: Corpus) -> TokenizerPair:
    """Returns the tokenizers of the run that a new one starts from, or those of the training text.

    Raises:
        InputError: bad text, or a run that cannot be started from.
    """
    if config.init_from is not None:
        return _parent(config.init_from, config).tokenizers()
    return prepare_tokenizers(corpus.train, config.tokenizer)


def training_checkpoints(config: Config, folder: RunFolder, tokenizers: TokenizerPair) -> Checkpoints:
    """Returns the checkpoints of a run, of which as many are kept as its configuration says."""
    keep = config.training.keep_newest, config.training.keep_best
    return Checkpoints(folder.checkpoints, keep, tokenizers.fingerprint)


def initial_params(config: Config, tokenizers: TokenizerPair, layout: StateLayout) -> Any:
    """Returns the best parameters of the run that this one starts from, in the shardings of `layout`, or None.

    Raises:
        RunFolderError: a run that cannot be started from, or with other tokenizers.
    """
    if config.init_from is None:
        return None
    parent = _parent(config.init_from, config)
    with Checkpoints(parent.checkpoints, tokenizers=tokenizers.fingerprint) as checkpoints:
        return checkpoints.restore_params(checkpoints.choose("best"), layout.abstract.params)


def initial_state(config: Config, tokenizers: TokenizerPair, layout: StateLayout, params: Any) -> TrainState:
    """Returns the state before the first step, with `params` unless they are None."""
    state = init_state(config.model, vocabulary_info(tokenizers), layout, config.training.seed)
    return state if params is None else state.starting_from(params)


def _parent(path: str, config: Config) -> RunFolder:
    """Returns the run at `path`, from which the one of `config` starts.

    Raises:
        RunFolderError: it is none, or its tokenizer was made by other settings.
    """
    parent = RunFolder.open(path)
    if parent.read_config().tokenizer != config.tokenizer:
        raise RunFolderError(
            f"--init-from {path}: its tokenizer was learnt with other settings than section 'tokenizer' asks for. Its "
            "parameters mean something only with its own tokenizer, which the new run takes over: copy section "
            f"'tokenizer' from {parent.config_file}."
        )
    return parent
