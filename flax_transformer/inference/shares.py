"""The shares of a search: each process searches some of the sentences, and all processes get all results."""

import io
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import jax
import numpy as np

from flax_transformer.decoding.hypotheses import Hypotheses
from flax_transformer.inference.requests import Request
from flax_transformer.parallel import processes


class Found(NamedTuple):
    """The results of one request, by their place among those of a call.

    Attributes:
        index: number of the request.
        hypotheses: results of the whole call.
        row: row of the request in them.
    """

    index: int
    hypotheses: Hypotheses
    row: int


def own_share(requests: Mapping[int, Request]) -> dict[int, Request]:
    """Returns the requests that this process searches. Each process gets as many long ones as the others."""
    order = sorted(requests, key=lambda index: (requests[index].shape, requests[index].num_tokens, index))
    return {index: requests[index] for index in order[processes.process_id() :: processes.num_processes()]}


def exchange_results(found: Iterable[Found]) -> Iterator[Found]:
    """Yields the results of all processes. Each process gives its own."""
    for message in processes.exchange_bytes(_packed(found)):
        yield from _unpacked(message)


def _packed(found: Iterable[Found]) -> bytes:
    """Returns results as bytes: an array archive with a part for each call of a search."""
    calls: dict[int, tuple[Hypotheses, list[Found]]] = {}
    for each in found:
        calls.setdefault(id(each.hypotheses), (each.hypotheses, []))[1].append(each)
    arrays, index_lists = {}, []
    for number, (hypotheses, members) in enumerate(calls.values()):
        rows = [each.row for each in members]
        index_lists.append([each.index for each in members])
        leaves = jax.tree_util.tree_leaves_with_path(hypotheses)
        for path, leaf in leaves:
            arrays[f"{number}/{jax.tree_util.keystr(path, simple=True, separator='/')}"] = np.asarray(leaf)[rows]
    file = io.BytesIO()
    np.savez(file, allow_pickle=False, calls=np.frombuffer(json.dumps(index_lists).encode(), np.uint8), **arrays)
    return file.getvalue()


def _unpacked(message: bytes) -> Iterator[Found]:
    """Yields the results of one process."""
    arrays = np.load(io.BytesIO(message), allow_pickle=False)
    for number, indices in enumerate(json.loads(arrays["calls"].tobytes())):
        prefix = f"{number}/auxiliary/"
        auxiliary = {name.removeprefix(prefix): arrays[name] for name in arrays.files if name.startswith(prefix)}
        plain = {name: arrays[f"{number}/{name}"] for name in ("tokens", "lengths", "scores", "finished", "log_probs")}
        hypotheses = Hypotheses(**plain, auxiliary=auxiliary or None)
        for row, index in enumerate(indices):
            yield Found(index, hypotheses, row)
