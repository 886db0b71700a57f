"""TensorBoard's event file of a run."""

import contextlib
import socket
import struct
import tempfile
import time
from pathlib import Path
from typing import Any

from tensorboardX.proto.event_pb2 import Event, SessionLog  # type: ignore[missing-module-attribute]
from tensorboardX.proto.summary_pb2 import Summary, SummaryMetadata  # type: ignore[missing-module-attribute]
from tensorboardX.proto.tensor_pb2 import TensorProto  # type: ignore[missing-module-attribute]
from tensorboardX.proto.tensor_shape_pb2 import TensorShapeProto  # type: ignore[missing-module-attribute]
from tensorboardX.proto.types_pb2 import DT_STRING  # type: ignore[missing-module-attribute]
from tensorboardX.record_writer import RecordWriter

from flax_transformer.object_storage import AnyPath, on_object_storage
from flax_transformer.small_files import write_atomically

SECONDS_BETWEEN_FLUSHES = 120.0


class EventFile:
    """New event file, which the calling thread writes itself. So an error of the disk is raised where it happens.

    `tensorboardX.SummaryWriter` has a thread behind a bounded queue. If a full disk ends that thread, the training
    waits for room in the queue for ever.

    For a folder on object storage the file grows on the disk of this machine, and is copied there at times.

    Args:
        folder: folder of all event files of the run.
        first_step: step from which TensorBoard leaves out the values of earlier files.

    Raises:
        OSError: the file cannot be written. The methods raise it, too.
    """

    def __init__(self, folder: AnyPath, first_step: int):
        folder.mkdir(exist_ok=True)
        self._path = folder / f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}"
        self._disk = contextlib.ExitStack()
        self._local: Path | None = None
        if on_object_storage(folder):
            self._local = Path(self._disk.enter_context(tempfile.TemporaryDirectory())) / self._path.name
        self._file = RecordWriter(str(self._local or self._path))
        self._flushed = time.monotonic()
        self._write(0, file_version="brain.Event:2")
        self._write(first_step, session_log=SessionLog(status=SessionLog.START))

    def add(self, step: int, values: dict[str, float]) -> None:
        """Adds the values of a step, by their tags."""
        self._add(step, [Summary.Value(tag=t, simple_value=v) for t, v in values.items()])

    def add_text(self, step: int, tag: str, markdown: str) -> None:
        """Adds a text, which TensorBoard shows as Markdown."""
        metadata = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
        shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)])
        tensor = TensorProto(dtype=DT_STRING, string_val=[markdown.encode()], tensor_shape=shape)
        self._add(step, [Summary.Value(tag=tag, metadata=metadata, tensor=tensor)])

    def add_picture(self, step: int, tag: str, png: bytes) -> None:
        """Adds a picture, given as the bytes of a PNG."""
        width, height = struct.unpack(">II", png[16:24])  # PNG specification, section 11.2.1
        image = Summary.Image(height=height, width=width, colorspace=4, encoded_image_string=png)
        self._add(step, [Summary.Value(tag=tag, image=image)])

    def _add(self, step: int, values: list[Any]) -> None:
        self._write(step, summary=Summary(value=values))
        if time.monotonic() - self._flushed >= SECONDS_BETWEEN_FLUSHES:
            self._flushed = time.monotonic()
            self._file.flush()
            self._copy()

    def close(self) -> None:
        """Writes what is left, and closes the file."""
        with self._disk:
            self._file.close()
            self._copy()

    def _copy(self) -> None:
        if self._local is not None:
            write_atomically(self._path, self._local.read_bytes())

    def _write(self, step: int, **content: Any) -> None:
        self._file.write(Event(wall_time=time.time(), step=step, **content).SerializeToString())
