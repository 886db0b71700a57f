"""Chunks of work: the sentences that one call of a search takes, and the device that runs it."""

import math
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import jax

Found = TypeVar("Found")

# A chunk has this share of the remaining sentences of one worker. A smaller share shortens the wait for a slow worker.
# A larger share makes fewer chunks, and slots are empty near the end of each.
SHARE = 0.75
# Fewest sentences of a chunk for each slot. The size of the group, the number of workers and `most` may lower it.
LEAST_SENTENCES_A_SLOT = 4


class Shape(NamedTuple):
    """The padded lengths that decide which program searches a sentence.

    Attributes:
        source: padded length of the source.
        prefix: padded length of the prefix of the outputs, 0 without one.
        phrases: padded number of required phrases, 0 without any.
        phrase: padded length of each required phrase.
    """

    source: int
    prefix: int
    phrases: int
    phrase: int


def length_bucket(length: int, longest: int) -> int:
    """Returns the padded length for a sentence: 16, 32, 48, 64, 96, 128, ... but at most `longest`.

    It depends on the sentence alone, so the rest of a batch does not change the program. Each padded length adds a
    program to compile, and slots are empty near the end of its calls. More padded lengths would cost more than they
    save (docs/lab_book.md, "Length buckets of sources").
    """
    bucket = 16 if length <= 16 else 32
    while bucket < length:
        bucket = bucket * 3 // 2 if bucket & (bucket - 1) == 0 else bucket * 4 // 3
    return min(bucket, longest)


@dataclass(frozen=True)
class Chunk:
    """The sentences of one call.

    Attributes:
        shape: shape of each sentence.
        members: indices of the sentences.
    """

    shape: Shape
    members: list[int]


def cut_into_chunks(groups: dict[Shape, list[int]], workers: int, slots: int, most: int) -> list[Chunk]:
    """Returns all sentences in chunks, in the order in which free workers take them.

    Long sentences come first, and chunks get smaller towards the end (guided self-scheduling). So all workers end at
    about the same time, even if their speeds differ. One worker gets the smallest possible number of chunks.

    Args:
        groups: indices of sentences by shape; chunks keep their order.
        workers: number of workers.
        slots: sentences that a worker searches at the same time.
        most: most sentences of a chunk.

    References:
        Polychronopoulos and Kuck 1987, "Guided Self-Scheduling".
    """
    chunks = []
    left = sum(map(len, groups.values()))
    least = max(slots, min(LEAST_SENTENCES_A_SLOT * slots, -(-left // workers)))
    for shape, members in sorted(groups.items(), reverse=True):
        while members:
            share = left if workers == 1 else math.ceil(SHARE * left / workers)
            size = min(most, max(share, least))
            size = -(-len(members) // -(-len(members) // size))  # chunks of a group have nearly equal sizes
            chunks.append(Chunk(shape, members[:size]))
            members, left = members[size:], left - size
    return chunks


def largest_shapes(shapes: Iterable[Shape]) -> list[Shape]:
    """Returns the shapes that no other shape exceeds or equals in every length. No other shape needs more memory.

    Example: of (64, 0, 0, 0), (32, 8, 0, 0) and (32, 0, 0, 0) these are the first two.
    """
    distinct = sorted(set(shapes), reverse=True)
    return [
        shape
        for shape in distinct
        if not any(other != shape and all(map(operator.ge, other, shape)) for other in distinct)
    ]


def run_on_workers(
    chunks: Sequence[Chunk], workers: int, launch: Callable[[int, Chunk], Found]
) -> Iterator[tuple[Chunk, Found]]:
    """Yields each chunk with its values as soon as they are available.

    A worker gets its next chunk before the values of the last one are yielded. A worker that ends while the caller is
    busy waits for the caller.

    Args:
        chunks: chunks in the order in which workers take them.
        workers: number of workers. A single worker has two chunks, one running and one waiting. Several workers have
            one chunk each. So no chunk waits for a slow worker while a fast one is free.
        launch: takes the number of a worker and a chunk, and returns a tree of arrays that are still being computed. It
            runs in the caller's thread, so JAX's thread-local settings apply, and a worker's programs run in turn.
            Other threads only wait for values.

    Raises:
        Exception: the error of a chunk's computation, raised before any other chunk is launched.
    """
    left = iter(chunks)
    running: dict[Future[Found], tuple[int, Chunk]] = {}
    chunks_each = 2 if workers == 1 else 1
    pool = ThreadPoolExecutor(workers * chunks_each)

    def give(worker: int) -> None:
        if (chunk := next(left, None)) is not None:
            running[pool.submit(jax.device_get, launch(worker, chunk))] = worker, chunk

    try:
        for worker in [*range(workers)] * chunks_each:
            give(worker)
        while running:
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            found = [(*running.pop(future), future.result()) for future in done]  # raises the error of a chunk
            for worker, _, _ in found:
                give(worker)
            yield from ((chunk, values) for _, chunk, values in found)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
