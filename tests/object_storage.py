"""A bucket in memory, for tests: `gs://` as TensorStore and etils.epath see it, with nothing that a bucket lacks.

TensorStore's own driver talks to it by HTTP. etils.epath sees it through a file system of fsspec, in place of gcsfs. A
folder exists as long as an object's name begins with it. There is no append, no lock, and no renaming but a copy.
"""

import contextlib
import json
import sys
import threading
import time
import types
from collections.abc import Generator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import fsspec
import pytest
from etils.epath import backend
from fsspec import AbstractFileSystem
from fsspec.spec import AbstractBufferedFile

BUCKET = "bucket"


class Bucket:
    """Objects by their names.

    Attributes:
        objects: content and generation of each object, by "BUCKET/NAME".
        writes: names and contents of all objects that were written, in order.
        refused: part of a name; objects with such a name cannot be written. None refuses nothing.
    """

    def __init__(self) -> None:
        self.objects: dict[str, tuple[bytes, int]] = {}
        self.writes: list[tuple[str, bytes]] = []
        self.refused: str | None = None

    def put(self, name: str, content: bytes) -> int:
        if self.refused is not None and self.refused in name:
            raise StorageError("Forbidden: this account has no permission storage.objects.create")
        self.writes.append((name, content))
        self.objects[name] = content, len(self.writes)
        return len(self.writes)

    def names(self, folder: str = "") -> set[str]:
        """Returns the names of objects below a folder, relative to it."""
        prefix = f"{BUCKET}/{folder}".rstrip("/") + "/"
        return {name.removeprefix(prefix) for name in self.objects if name.startswith(prefix)}

    def content(self, name: str) -> bytes:
        return self.objects[f"{BUCKET}/{name}"][0]


class StorageError(Exception):
    """An error that is no OSError, such as those of gcsfs."""


class Requests(BaseHTTPRequestHandler):
    """The part of Google's JSON API that TensorStore uses."""

    protocol_version = "HTTP/1.1"
    bucket: Bucket

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def parsed(self) -> tuple[str, str, dict[str, str]]:
        url = urlsplit(self.path)
        _, _, path = url.path.partition("/b/")
        bucket, _, rest = path.partition("/o")
        return bucket, unquote(rest.removeprefix("/")), {k: v[0] for k, v in parse_qs(url.query).items()}

    def reply(self, code: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        bucket, name, query = self.parsed()
        if not name:
            first, end = f"{bucket}/{query.get('startOffset', '')}", query.get("endOffset")
            found = [n for n in sorted(self.bucket.objects) if n >= first and (end is None or n < f"{bucket}/{end}")]
            items = [{"name": n.removeprefix(f"{bucket}/"), "size": str(len(self.bucket.objects[n][0]))} for n in found]
            return self.reply(200, json.dumps({"items": items}).encode())
        content, generation = self.bucket.objects.get(f"{bucket}/{name}", (b"", 0))
        if not generation:
            return self.reply(404)
        if query.get("ifGenerationNotMatch") == str(generation):
            return self.reply(304)
        if wanted := self.headers.get("Range"):
            start, _, last = wanted.removeprefix("bytes=").partition("-")
            part = content[int(start) : int(last) + 1 if last else None]
            place = f"bytes {start}-{int(start) + len(part) - 1}/{len(content)}"
            return self.reply(206, part, Content_Range=place, x_goog_generation=str(generation))
        return self.reply(200, content, x_goog_generation=str(generation))

    def do_POST(self) -> None:
        bucket, _, query = self.parsed()
        content = self.rfile.read(int(self.headers["Content-Length"]))
        name = f"{bucket}/{query['name']}"
        known = self.bucket.objects.get(name, (b"", 0))[1]
        if query.get("ifGenerationMatch", str(known)) != str(known):
            return self.reply(412)
        try:
            generation = self.bucket.put(name, content)
        except StorageError as error:
            return self.reply(403, str(error).encode())
        return self.reply(200, json.dumps({"name": query["name"], "generation": str(generation)}).encode())

    def do_DELETE(self) -> None:
        bucket, name, _ = self.parsed()
        self.reply(404 if self.bucket.objects.pop(f"{bucket}/{name}", None) is None else 204)


class BucketFile(AbstractBufferedFile):
    """An object that is being read, or written as a whole when it is closed."""

    def _initiate_upload(self) -> None:
        self._content = b""

    def _upload_chunk(self, final: bool = False) -> Any:
        self.buffer.seek(0)
        self._content += self.buffer.read()
        if final:
            self.fs.bucket.put(self.path, self._content)
        return True

    def _fetch_range(self, start: int, end: int) -> bytes:
        return self.fs.bucket.objects[self.path][0][start:end]


class BucketFileSystem(AbstractFileSystem):
    """What gcsfs is for a real bucket. It caches lists of names, which know nothing of TensorStore's objects."""

    protocol = ("gcs", "gs")
    cachable = False
    bucket: Bucket

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        path = str(self._strip_protocol(path)).rstrip("/")
        if path not in self.dircache:
            self.dircache[path] = self._listed(path)
        found = self.dircache[path] if path in self.dircache else self._listed(path)
        return found if detail else [each["name"] for each in found]

    def _listed(self, path: str) -> list[dict[str, Any]]:
        objects = self.bucket.objects
        if path in objects:
            return [{"name": path, "size": len(objects[path][0]), "type": "file"}]
        below = {name.removeprefix(f"{path}/") for name in [*objects] if name.startswith(f"{path}/")}
        if not below and path != BUCKET:
            raise FileNotFoundError(path)
        folders = {name.partition("/")[0] for name in below if "/" in name}
        files = [
            {"name": f"{path}/{n}", "size": len(objects[f"{path}/{n}"][0]), "type": "file"}
            for n in below
            if "/" not in n
        ]
        return files + [{"name": f"{path}/{n}", "size": 0, "type": "directory"} for n in sorted(folders)]

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        path = str(self._strip_protocol(path)).rstrip("/")
        found = self.ls(path)
        return (
            found[0] if [each["name"] for each in found] == [path] else {"name": path, "size": 0, "type": "directory"}
        )

    def _open(self, path: str, mode: str = "rb", *_: Any, **options: Any) -> Any:
        assert mode in ("rb", "wb"), f"a bucket has no mode {mode}"
        size = self.info(path)["size"] if mode == "rb" else None
        return BucketFile(self, path, mode, cache_type="all", size=size)

    def mkdir(self, path: str, create_parents: bool = True, **_: Any) -> None:
        pass  # a bucket has no folders

    def exists(self, path: str, **_: Any) -> bool:
        try:
            self.info(path)
        except FileNotFoundError:
            return False
        return True

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        pass

    def rmdir(self, path: str) -> None:
        pass

    def cp_file(self, path1: str, path2: str, **_: Any) -> None:
        source, target = str(self._strip_protocol(path1)), str(self._strip_protocol(path2))
        if source in self.bucket.objects:
            self.bucket.put(target, self.bucket.objects[source][0])

    def rm(self, path: str, recursive: bool = False, maxdepth: int | None = None) -> None:
        path = str(self._strip_protocol(path))
        found = [n for n in [*self.bucket.objects] if n == path or recursive and n.startswith(f"{path}/")]
        if not found:
            raise FileNotFoundError(path)
        for name in found:
            self.bucket.objects.pop(name, None)
        self.dircache.clear()

    def modified(self, path: str) -> float:
        return time.time()


@contextlib.contextmanager
def bucket_in_memory() -> Generator[Bucket, None, None]:
    """Puts a bucket in the place of all storage behind `gs://` inside a `with` block."""
    bucket = Bucket()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Requests,), {"bucket": bucket}))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    # Orbax asks Google's client whether a bucket has folders.
    cloud: Any = types.ModuleType("google.cloud")
    cloud.storage = types.SimpleNamespace(Client=lambda: types.SimpleNamespace(get_bucket=lambda _: object()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", f"http://127.0.0.1:{server.server_port}")
        patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "none")
        patch.setitem(sys.modules, "google.cloud", cloud)
        patch.setitem(sys.modules, "gcsfs", types.ModuleType("gcsfs"))
        patch.setattr(BucketFileSystem, "bucket", bucket, raising=False)
        for name in BucketFileSystem.protocol:
            fsspec.register_implementation(name, BucketFileSystem, clobber=True)
        backend.fsspec_backend._get_filesystem.cache_clear()
        yield bucket
    backend.fsspec_backend._get_filesystem.cache_clear()
    server.shutdown()
    server.server_close()
    thread.join()
