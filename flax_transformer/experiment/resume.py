"""Resuming a run: checks of its recipe, and the place at which its training goes on."""

import contextlib
from collections.abc import Generator
from typing import Any

from flax_transformer.config.recipe import Config
from flax_transformer.data.batching import DataFingerprint, Position
from flax_transformer.data.parallel_text import Corpus, ParallelTextConfig
from flax_transformer.data.tokenizer_pair import TokenizerPair
from flax_transformer.errors import RunFolderError
from flax_transformer.experiment.new_run import Start, initial_params, initial_state, training_checkpoints
from flax_transformer.experiment.programs import RunPrograms
from flax_transformer.experiment.text import PreparedText
from flax_transformer.parallel import processes
from flax_transformer.run_folder import RunFolder
from flax_transformer.training.checkpoint import Checkpoints, Restored, checksums_of
from flax_transformer.training.loop import CompiledSteps, TrainingStart, evaluation_is_due
from flax_transformer.training.metrics_file import read_metrics

# Settings that a resumed run must keep: whole sections, and fields of section training.
SECTIONS_KEPT = (
    "init_from", "data", "filters", "tokenizer", "subword_sampling", "model", "batching", "optimizer", "decoding",
    "evaluation",
)  # fmt: skip
TRAINING_FIELDS_KEPT = ("seed", "label_smoothing", "r_drop", "ema_decay", "best_metric", "evaluate_sentences")


# --- the run and its start


class ResumedRun:
    """A run that is resumed from its newest checkpoint, or from the start if it has none.

    Args:
        config: the recipe.
        folder: the run's folder.

    Raises:
        RunFolderError: there is no run, it was made by another recipe, or its log is damaged.
    """

    def __init__(self, config: Config, folder: RunFolder):
        self.config = config
        self.folder = folder
        _check_same_recipe(folder, config)
        if folder.metrics_file.exists():
            read_metrics(folder.metrics_file)  # a damaged log is told before anything is done

    def tokenizers(self, _: Corpus) -> TokenizerPair:
        """Returns the tokenizers of the run.

        Raises:
            RunFolderError: they are missing, or the newest checkpoint was saved with others.
        """
        tokenizers = self.folder.tokenizers()
        with Checkpoints(self.folder.checkpoints, tokenizers=tokenizers.fingerprint) as checkpoints:
            checkpoints.check_tokenizers()
        return tokenizers

    def _remove_card(self) -> None:
        """Removes the run card, which describes the shorter training."""
        with self.folder.writing():
            self.folder.card_file.unlink(missing_ok=True)

    @contextlib.contextmanager
    def start(self, text: PreparedText, programs: RunPrograms) -> Generator[Start, None, None]:
        """Keeps the lock of the run's folder, and yields the place at which the training goes on.

        The new configuration is written last. So a mistake in the input changes nothing in the folder.

        Raises:
            InputError: another process trains the run, a checkpoint is damaged or belongs to other text, or programs do
                not fit the memory.
        """
        self.folder.check_shared()
        with (
            self.folder.locked() as lock_notes,
            training_checkpoints(self.config, self.folder, text.tokenizers) as checkpoints,
        ):
            position, redrawn, notes = Position(0, 0), False, [*lock_notes]
            if checkpoints.latest_step() is None:  # stopped before its first checkpoint
                params = initial_params(self.config, text.tokenizers, programs.layout)
                state = initial_state(self.config, text.tokenizers, programs.layout, params)
            else:
                restored = checkpoints.restore(programs.layout)
                state, notes = restored.state, [*lock_notes, *restored.notes]
                position, redrawn = _position(self.folder, restored, text)
            step = int(state.step)
            checksums_of(state)  # compiles the checksums that every checkpoint needs
            owes_evaluation = evaluation_is_due(step, self.config.training) and step not in checkpoints.best_steps()
            notes.append(f"resumed at step {step}, epoch {position.epoch}, batch {position.batch}")
            if redrawn:
                notes.append(
                    "the random segmentations of this run are no longer in the cache and were drawn anew: this epoch "
                    "has other batches than before"
                )
            if owes_evaluation:
                notes.append(f"the evaluation of step {step} was stopped before its end: it comes first")
            steps = CompiledSteps({}, programs.mesh)
            if step < self.config.training.steps:
                compiled = programs.compile(text)
                steps = compiled.steps
                notes.append(compiled.text)
                processes.from_first(self._remove_card)
            elif owes_evaluation:
                programs.validation.compile()
            processes.from_first(lambda: self.folder.update_config(self.config))
            checkpoints.remove_superseded()
            yield Start(checkpoints, TrainingStart(state, position, owes_evaluation), steps, tuple(notes))


# --- the place in the text


def _position(folder: RunFolder, restored: Restored, text: PreparedText) -> tuple[Position, bool]:
    """Returns the position of a checkpoint in the present text, and whether random segmentations were drawn anew.

    Raises:
        RunFolderError: the run was trained or evaluated on other text.
    """
    before, now = DataFingerprint.parse(restored.data), DataFingerprint.parse(text.fingerprint)
    if before.train != now.train:
        raise RunFolderError(
            f"{folder.path} was trained on other text than its configuration now finds: the training files of section "
            "'data' have changed, so its position in them means nothing. Put them back, or start a new run."
        )
    if before.held_out and before.held_out != now.held_out:
        raise RunFolderError(
            f"{folder.path} was evaluated on other text than its configuration now finds: the validation or the test "
            "files of section 'data' have changed, so its scores cannot be compared. Put them back, or start a new run."
        )
    position = restored.position
    if before.draws == now.draws:
        return position, False
    # An epoch of other segmentations may have fewer batches.
    last = len(text.plan.epoch(position.epoch)) - 1
    return position._replace(batch=min(position.batch, last)), True


# --- checks of the recipe


def _check_same_recipe(folder: RunFolder, config: Config) -> None:
    """Raises a `RunFolderError` unless there is a run in `folder` and it was made by the same recipe."""
    before = RunFolder.open(folder.path).read_config()
    for section in SECTIONS_KEPT:
        _check_same(folder, section, *(_kept(section, getattr(each, section)) for each in (before, config)))
    for name in TRAINING_FIELDS_KEPT:
        _check_same(folder, f"training.{name}", getattr(before.training, name), getattr(config.training, name))


def _kept(name: str, section: Any) -> Any:
    """Returns what a resumed run must keep of a section.

    Text files may be moved, since their content has a fingerprint. So may the run of `init_from`, which is read only
    before the first checkpoint, and whose tokenizers must be those of this run.
    """
    if name == "init_from":
        return section is not None
    return section.without_places() if isinstance(section, ParallelTextConfig) else section


def _check_same(folder: RunFolder, name: str, before: Any, now: Any) -> None:
    if before != now:
        raise RunFolderError(
            f"{folder.path} was made with other settings in '{name}'; a resumed run must keep them. Use --config "
            f"{folder.config_file} --resume, or start a new run by --run FOLDER."
        )
