"""TensorBoard's event file of a run."""

import socket
import time
from pathlib import Path
from typing import Any

from tensorboardX.proto.event_pb2 import Event, SessionLog  # type: ignore[missing-module-attribute]
from tensorboardX.proto.summary_pb2 import Summary  # type: ignore[missing-module-attribute]
from tensorboardX.record_writer import RecordWriter

SECONDS_BETWEEN_FLUSHES = 120.0


class EventFile:
    """New event file, which the calling thread writes itself. So an error of the disk is raised where it happens.

    `tensorboardX.SummaryWriter` has a thread behind a bounded queue. If a full disk ends that thread, the training
    waits for room in the queue for ever.

    Args:
        folder: folder of all event files of the run.
        first_step: step from which TensorBoard leaves out the values of earlier files.

    Raises:
        OSError: the file cannot be written. The methods raise it, too.
    """

    def __init__(self, folder: Path, first_step: int):
        folder.mkdir(exist_ok=True)
        self._file = RecordWriter(str(folder / f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}"))
        self._flushed = time.monotonic()
        self._write(0, file_version="brain.Event:2")
        self._write(first_step, session_log=SessionLog(status=SessionLog.START))

    def add(self, step: int, values: dict[str, float]) -> None:
        """Adds the values of a step, by their tags."""
        self._write(step, summary=Summary(value=[Summary.Value(tag=t, simple_value=v) for t, v in values.items()]))
        if time.monotonic() - self._flushed >= SECONDS_BETWEEN_FLUSHES:
            self._flushed = time.monotonic()
            self._file.flush()

    def close(self) -> None:
        """Writes what is left, and closes the file."""
        self._file.close()

    def _write(self, step: int, **content: Any) -> None:
        self._file.write(Event(wall_time=time.time(), step=step, **content).SerializeToString())
