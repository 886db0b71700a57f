"""Chunks of work: which sentences one call of a search takes, and which device makes it."""

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import jax

Found = TypeVar("Found")

# A chunk has this share of what is left for each of several workers. So one that is half as fast as another does not
# hold up the end, and chunks are few: at the end of each slots fall empty.
SHARE = 0.75
# Sentences for each slot that a chunk should have at least; it has fewer where its group, all workers or `most` allow
# no more.
LEAST_SENTENCES_A_SLOT = 4


class Shape(NamedTuple):
    """What the shapes that a sentence meets depend on.

    Attributes:
        source: tokens that it is padded to.
        prefix: tokens that the prefix of its outputs is padded to, 0 without one.
        phrases: room for required phrases, 0 for none.
        phrase: tokens that each of them is padded to.
    """

    source: int
    prefix: int
    phrases: int
    phrase: int


def length_bucket(length: int, longest: int) -> int:
    """Returns the padded length for a sentence: 16, 32, 48, 64, 96, 128, ... but at most `longest`.

    It depends on the sentence alone, so that its batch-mates do not change the program that translates it. Each length
    is a program to compile, and an end at which slots fall empty: more of them cost more than the padding that they
    save (docs/lab_book.md, 2026-11-26).
    """
    bucket = 16 if length <= 16 else 32
    while bucket < length:
        bucket = bucket * 3 // 2 if bucket & (bucket - 1) == 0 else bucket * 4 // 3
    return min(bucket, longest)


@dataclass(frozen=True)
class Chunk:
    """The sentences of one call.

    Attributes:
        shape: of each of them.
        members: their indices.
    """

    shape: Shape
    members: list[int]


def cut_into_chunks(groups: dict[Shape, list[int]], workers: int, slots: int, most: int) -> list[Chunk]:
    """Returns all sentences in chunks, to be taken in this order by whichever worker is free.

    Long sentences come first, and chunks get smaller towards the end, so that all workers end at about the same time
    though one may be slower than another (guided self-scheduling). For one worker they are as few as they can be.

    Args:
        groups: indices of sentences by shape; a chunk has them in the order in which they stand there.
        workers: how many there are.
        slots: sentences that a worker searches at the same time.
        most: sentences that a chunk may have.

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
            size = -(-len(members) // -(-len(members) // size))  # nearly the same for all that the group would need
            chunks.append(Chunk(shape, members[:size]))
            members, left = members[size:], left - size
    return chunks


def run_on_workers(
    chunks: Sequence[Chunk], workers: int, launch: Callable[[int, Chunk], Found]
) -> Iterator[tuple[Chunk, Found]]:
    """Yields each chunk with the values that were found for it, as they are there.

    A worker whose values are there is given its next chunk before they are handed out. One that ends while the caller
    is busy with another's values waits for the caller.

    Args:
        chunks: in the order in which they are taken.
        workers: how many there are. A single one has two chunks, of which one waits for the other; several have one
            each, since the chunk that waits for a slow worker could be with a fast one.
        launch: given the number of a worker and a chunk, returns a tree of arrays that are still being computed. It is
            called where the caller is, so that JAX's settings of a thread hold in it and a worker's programs run in
            turn; the values alone are waited for in threads.

    Raises:
        Exception: what computing a chunk's values raised, at once and before any more is launched.
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
            found = [(*running.pop(future), future.result()) for future in done]  # an error of any is raised here
            for worker, _, _ in found:
                give(worker)
            yield from ((chunk, values) for _, chunk, values in found)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
