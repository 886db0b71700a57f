"""Checkpoints, by Orbax. They are written in the background and atomically, and are checked when they are read.

Orbax notices a file that is cut short or missing, but not a changed byte. So each array is saved with a checksum. The
array's devices compute it, and it does not depend on the sharding.

A folder that is named after a step is a whole checkpoint, even if the process is killed. A checkpoint gets this name
when it is complete, and loses it before its files are deleted.

Object storage renames nothing at once. There a checkpoint is whole if it has the file commit_success.txt. Files of a
superseded checkpoint are deleted in any order, and a kill leaves the rest to the next start.
"""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np
import orbax.checkpoint as ocp

from flax_transformer.data.batching import Position
from flax_transformer.errors import RunFolderError, check_type
from flax_transformer.object_storage import AnyPath, on_object_storage, resolved, storage_errors
from flax_transformer.parallel import processes
from flax_transformer.parallel.placement import put
from flax_transformer.small_files import remove_folder, write_atomically
from flax_transformer.training.checkpoint_checks import check_shapes, check_sums, check_tokenizers
from flax_transformer.training.checkpoint_errors import DamagedCheckpointError, reading, writing
from flax_transformer.training.checkpoint_meta import CheckpointMeta, History
from flax_transformer.training.checksums import checksums
from flax_transformer.training.retention import KeptSteps
from flax_transformer.training.state import StateLayout, TrainState

Choice = Literal["best", "last"]
Result = TypeVar("Result")

# Sub-folders of a folder of checkpoints: of those that are being deleted, and of those that cannot be read.
REMOVED = "removed"
DAMAGED = "damaged"

# File that makes a folder on object storage a whole checkpoint. Orbax writes it last.
COMMIT_MARK = "commit_success.txt"


@dataclass(frozen=True)
class Restored:
    """Contents of a checkpoint.

    Attributes:
        state: training state, in the shardings of the layout.
        position: next batch to train on.
        data: fingerprint of the text that the position belongs to.
        notes: a line for each newer checkpoint that cannot be read, with the place that it was moved to.
    """

    state: TrainState
    position: Position
    data: str
    notes: tuple[str, ...] = ()


def _trees(state: TrainState) -> dict[str, Any]:
    """Returns the parts of a checkpoint. If there is an average, it is `params`, which translation and others read."""
    trees = {"params": state.eval_params, "optimizer": state.optimizer}
    return trees if state.average is None else trees | {"trained": state.params}


def checksums_of(state: TrainState) -> dict[str, dict[str, str]]:
    """Returns the checksums of each part of a checkpoint. The first call compiles, so make it before training."""
    return {name: checksums(tree) for name, tree in _trees(state).items()}


class Checkpoints:
    """The checkpoints of a run.

    Args:
        folder: folder with a sub-folder for each step.
        keep: numbers of checkpoints to keep, (newest, best). None only reads, and leaves the files of a running
            training alone.
        tokenizers: fingerprint of the run's tokenizers. It is saved with parameters, and must match when parameters are
            restored. None saves no fingerprint and accepts any. A checkpoint without one is always accepted.
    """

    def __init__(self, folder: AnyPath, keep: tuple[int, int] | None = None, tokenizers: str | None = None):
        self.folder = folder
        self.tokenizers = tokenizers
        self._history: History | None = None
        self._policy = None if keep is None else KeptSteps(self.ranked, *keep)
        if self._policy is None:
            options = ocp.CheckpointManagerOptions(
                read_only=True, create=False, save_interval_steps=0, lightweight_initialize=True
            )
        else:
            self._empty_removed()
            options = ocp.CheckpointManagerOptions(
                preservation_policy=self._policy,
                todelete_subdir=REMOVED,
                cleanup_tmp_directories=True,
                lightweight_initialize=True,
            )
        handlers = {
            "params": ocp.StandardCheckpointHandler(),
            "trained": ocp.StandardCheckpointHandler(),
            "optimizer": ocp.StandardCheckpointHandler(),
            "meta": ocp.JsonCheckpointHandler(),
        }
        self._manager = ocp.CheckpointManager(resolved(folder), item_handlers=handlers, options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: Any, *_) -> None:
        # Closing waits for the checkpoint being written. An error that is already raised must not be hidden by another.
        with contextlib.suppress(Exception) if kind is not None else writing(self.folder):
            self._manager.close()
            self._empty_removed()

    def _finish(self) -> None:
        """Waits for the checkpoint that is being written. Then each step can be read, and nothing is being renamed."""
        with writing(self.folder):
            self._manager.wait_until_finished()
        self._empty_removed()

    def _empty_removed(self) -> None:
        """Deletes the checkpoints that Orbax has only renamed. A kill in between leaves the rest to the next call."""
        if self._policy is not None and processes.is_first():
            remove_folder(self.folder / REMOVED)

    def latest_step(self) -> int | None:
        """Returns the step of the newest checkpoint, or None if there is none."""
        return self._manager.latest_step()

    def best_steps(self) -> list[int]:
        """Returns the steps with a known quality, best first. Among equal qualities the later step comes first."""
        self._finish()
        return self.ranked(self._manager.all_steps())

    def ranked(self, steps: Sequence[int]) -> list[int]:
        """Returns those of the steps that have a known quality, in the order of `best_steps`."""
        known = self._known().qualities
        return sorted((s for s in steps if s in known), key=lambda s: (known[s], s), reverse=True)

    def newest_steps(self) -> list[int]:
        """Returns all steps, newest first."""
        return sorted(self._manager.all_steps(), reverse=True)

    @property
    def saved(self) -> list[tuple[int, float | None]] | None:
        """Step and quality of each checkpoint that the run has ever saved, deleted ones included.

        It is None for runs of earlier versions, which did not write it down.
        """
        return self._known().saved

    def _known(self) -> History:
        """Returns what the newest checkpoint knows, which has a checksum of it. It is read once."""
        if self._history is None:
            newest = self.latest_step()
            saved = () if newest is None else self._meta(newest).saved
            steps = self._manager.all_steps() if saved is None else ()
            found = {step: self._quality_by_itself(step) for step in steps} if saved is None else dict(saved)
            qualities = {step: quality for step, quality in found.items() if quality is not None}
            self._history = History(None if saved is None else [*saved], qualities)
        return self._history

    def _quality_by_itself(self, step: int) -> float | None:
        """Returns the quality that a checkpoint of a run from an earlier version says it has; None without one."""
        if (quality := self._meta(step).quality) is not None:
            return quality
        with reading(self._place(step)):
            metrics = self._manager.metrics(step)
            return None if metrics is None else float(metrics["quality"])

    def check_tokenizers(self) -> None:
        """Checks that the newest checkpoint that can be read, if there is one, was saved with the run's tokenizers.

        Raises:
            RunFolderError: it was saved with other tokenizers.
        """
        for step in self.newest_steps():
            with contextlib.suppress(DamagedCheckpointError):
                check_tokenizers(self._place(step), self._meta(step).tokenizers, self.tokenizers)
                return

    def _newest(self) -> int:
        step = self.latest_step()
        if step is None:
            raise RunFolderError(
                f"{self.folder} holds no checkpoint: the run has not saved one yet. Let it train on, or go on with it "
                "by --resume."
            )
        return step

    def save(self, state: TrainState, position: Position, data: str, quality: float | None = None) -> None:
        """Saves `state` under its step, in the background. The state may be donated at once.

        If there is a checkpoint of this step already, only its quality is saved.

        Args:
            state: state to save.
            position: next batch to train on.
            data: fingerprint of the text.
            quality: quality on validation text, where higher is better; None if it was not evaluated.

        Raises:
            RunFolderError: this checkpoint, or the one before it, cannot be written.
        """
        step = int(state.step)
        self._finish()
        if step in self._manager.all_steps():
            if quality is not None:
                self._save_quality(step, quality)
            return
        saved = self._known().noted(step, quality)
        meta = CheckpointMeta(step, checksums_of(state), saved, quality, self.tokenizers, position, data)
        self._save(meta, _trees(state))

    def _save_quality(self, step: int, quality: float) -> None:
        """Adds the quality to the newest checkpoint, which was saved without one. Returns once it is on disk."""
        meta = self._meta(step)
        record = dataclasses.replace(meta, saved=self._known().noted(step, quality), quality=quality).record
        file = self._place(step) / "meta" / "metadata"
        with writing(self.folder):
            processes.from_first(lambda: write_atomically(file, json.dumps(record)))
        self.remove_superseded()

    def remove_superseded(self) -> None:
        """Removes the checkpoints that a save removes at its end. A kill before that end may have left them.

        Raises:
            RunFolderError: they cannot be removed.
        """
        self._finish()
        steps = self._manager.all_steps()
        assert self._policy is not None, "it is for those who write"
        with writing(self.folder):
            for step in set(steps) - self._policy.kept(steps):
                self._manager.delete(step)
        self._empty_removed()

    def check_saved(self) -> None:
        """Checks the newest checkpoint, if it has been written in the meantime. It does not wait for it.

        Raises:
            RunFolderError: the checkpoint could not be written.
        """
        if not self._manager.is_saving_in_progress():
            with writing(self.folder):
                self._manager.wait_until_finished()  # raises the error of the writing thread, which has ended

    def save_params(self, step: int, params: Any) -> None:
        """Saves parameters alone, for translation or as the start of another run. Returns once they are on disk."""
        meta = CheckpointMeta(step, {"params": checksums(params)}, ((step, None),), tokenizers=self.tokenizers)
        self._save(meta, {"params": params})
        self._finish()

    def _save(self, meta: CheckpointMeta, trees: dict[str, Any]) -> None:
        items = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
        with writing(self.folder):
            self._manager.save(meta.step, args=ocp.args.Composite(meta=ocp.args.JsonSave(meta.record), **items))

    def restore(self, layout: StateLayout) -> Restored:
        """Returns the newest checkpoint that can be read, in the shardings of `layout`.

        Newer ones are moved to the folder "damaged". A training that goes on will save their steps again.

        Raises:
            RunFolderError: there is no checkpoint, or all are damaged. Or the newest one was saved with other
                tokenizers, has only parameters, or does not have the shapes of `layout`.
        """
        damaged: dict[int, DamagedCheckpointError] = {}
        for step in self.newest_steps() or [self._newest()]:
            try:
                restored = self._restore(step, layout)
            except DamagedCheckpointError as error:
                if processes.joined():  # others may read their parts, and wait for this process in the middle of it
                    raise RunFolderError(
                        f"{error.what} Resume the training in one process: it sets this checkpoint aside, and goes on "
                        "from the one before. Then stop it, and start all processes again."
                    ) from error
                damaged[step] = error
                continue
            notes = [self._set_aside(number, error) for number, error in damaged.items()]
            return dataclasses.replace(restored, notes=tuple(notes))
        raise RunFolderError(
            f"none of the {len(damaged)} checkpoints of {self.folder.parent} can be read. The newest: "
            f"{damaged[max(damaged)]}"
        ) from damaged[max(damaged)]

    def _set_aside(self, step: int, error: DamagedCheckpointError) -> str:
        """Moves a damaged checkpoint out of the way, and returns a line for the log."""
        place = self.folder / DAMAGED / str(step)
        with storage_errors(place):
            remove_folder(place)  # one that was damaged earlier
            place.parent.mkdir(exist_ok=True)
            if on_object_storage(place):  # Orbax removes a folder there that lacks this file
                write_atomically(place.parent / COMMIT_MARK, "These checkpoints cannot be read.\n")
            (self._place(step)).rename(place)
        self._manager.reload()
        self._history = None
        return f"warning: {error.what} It was moved to {place}, and this run goes on from the checkpoint before it."

    def _restore(self, step: int, layout: StateLayout) -> Restored:
        abstract = layout.abstract
        meta = self._meta(step)
        check_tokenizers(self._place(step), meta.tokenizers, self.tokenizers)
        self._check_shapes(step, abstract.params)
        if "optimizer" not in meta.checksums:
            raise RunFolderError(
                f"{self._place(step)} holds parameters without the state of an optimiser, so there is no "
                "training to go on with. Start a new run from it by --init-from."
            )
        trees = _trees(abstract)
        items = {name: ocp.args.StandardRestore(tree) for name, tree in trees.items()}
        with reading(self._place(step)):
            restored = self._manager.restore(step, args=ocp.args.Composite(**items))
        check_sums(self._place(step), {name: restored[name] for name in trees}, meta.checksums)
        count = put(np.asarray(step, np.int32), abstract.step.sharding)
        average = None if abstract.average is None else restored["params"]
        params = restored["params"] if abstract.average is None else restored["trained"]
        return Restored(TrainState(count, params, restored["optimizer"], average), meta.position, meta.data)

    def choose(self, which: Choice) -> int:
        """Returns the step of the best or the newest checkpoint. Without any known quality the newest is the best.

        Raises:
            RunFolderError: there is no checkpoint.
            ConfigError: no such choice. Or another process does not see the same checkpoints.
        """
        check_type("checkpoint", which, Choice)
        newest = self._newest()
        processes.check_agreement({f"newest checkpoint in {self.folder}": str(newest)})
        best = self.best_steps()
        return best[0] if which == "best" and best else newest

    def digest(self, step: int) -> str:
        """Returns SHA-256 of the checksums of a checkpoint's parameters."""
        sums = self._meta(step).checksums["params"]
        return hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()

    def undisturbed(self, read: Callable[[], Result]) -> Result:
        """Returns the result of a function that chooses and reads checkpoints.

        A training that goes on may remove a checkpoint in the meantime. Then the function is called again. Several
        processes call it once, since one alone must not begin anew.

        Args:
            read: the function. It raises the errors of the methods that it calls.
        """
        while True:
            steps = self.newest_steps()
            try:
                return read()
            except DamagedCheckpointError:
                with storage_errors(self.folder):
                    if processes.joined() or all((self._place(step)).exists() for step in steps):
                        raise
                self._manager.reload()
                self._history = None

    def restore_params(self, step: int, abstract_params: Any) -> Any:
        """Returns only the parameters of a checkpoint, in the shardings of `abstract_params`.

        Raises:
            RunFolderError: they were saved with other tokenizers, their shapes are not those of `abstract_params`, or
                they are damaged.
        """
        self._finish()
        meta = self._meta(step)
        check_tokenizers(self._place(step), meta.tokenizers, self.tokenizers)
        self._check_shapes(step, abstract_params)
        processes.check_agreement({f"checkpoint {self._place(step)}": self.digest(step)})
        items = ocp.args.Composite(params=ocp.args.StandardRestore(abstract_params))
        with reading(self._place(step)):
            params = self._manager.restore(step, args=items)["params"]
        check_sums(self._place(step), {"params": params}, meta.checksums)
        return params

    def _place(self, step: int) -> AnyPath:
        """Returns the folder of a checkpoint."""
        return self.folder / str(step)

    def _check_shapes(self, step: int, params: Any) -> None:
        with reading(self._place(step)):
            saved = self._manager.item_metadata(step)["params"].tree
        check_shapes(self._place(step), saved, params)

    def _meta(self, step: int) -> CheckpointMeta:
        with reading(self._place(step)):
            record = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
            return CheckpointMeta.of_record(record, step)
