"""Pieces of work: which sentences one call of a search takes, and in which order calls are made."""

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

Found = TypeVar("Found")

# A piece has this share of what is left for each of several queues. So a queue that is half as fast as another does not
# hold up the end, and pieces are few: at the end of each slots fall empty.
SHARE = 0.75
# Sentences that a piece has for each slot at least, where there are enough for all queues.
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
class Piece:
    """The sentences of one call.

    Attributes:
        shape: of each of them.
        members: their indices.
    """

    shape: Shape
    members: list[int]


def cut_into_pieces(groups: dict[Shape, list[int]], queues: int, slots: int, most: int) -> list[Piece]:
    """Returns all sentences in pieces, to be taken in this order by whichever queue is free.

    Long sentences come first, and pieces get smaller towards the end, so that all queues end at about the same time
    though one may be slower than another (guided self-scheduling). For one queue they are as large as they may be.

    Args:
        groups: indices of sentences by shape; a piece has them in the order in which they stand there.
        queues: how many there are.
        slots: sentences that a queue works on at the same time.
        most: sentences that a piece may have.

    References:
        Polychronopoulos and Kuck 1987, "Guided Self-Scheduling".
    """
    pieces = []
    left = sum(map(len, groups.values()))
    least = max(slots, min(LEAST_SENTENCES_A_SLOT * slots, -(-left // queues)))
    for shape, members in sorted(groups.items(), reverse=True):
        while members:
            share = left if queues == 1 else math.ceil(SHARE * left / queues)
            size = min(most, max(share, least))
            size = -(-len(members) // -(-len(members) // size))  # nearly the same for all that the group would need
            pieces.append(Piece(shape, members[:size]))
            members, left = members[size:], left - size
    return pieces


def taken_by_queues(
    pieces: Sequence[Piece], queues: int, search: Callable[[int, Piece], Found]
) -> Iterator[tuple[Piece, Found]]:
    """Yields each piece with what was found for it, as they are done: each queue takes the next one when it is free.

    The next one is sent before what was found is handed out, so that no queue waits for whoever reads it.

    Args:
        pieces: in the order in which they are taken.
        queues: how many there are.
        search: of the number of a queue and a piece, called in a thread; one queue has two calls at a time, of which
            one prepares while the other waits for its device.

    Raises:
        Exception: what a search raised, once those that are under way have ended.
    """
    in_flight = 2 if queues == 1 else 1
    left = iter(pieces)
    running: dict[Future[Found], tuple[int, Piece]] = {}
    with ThreadPoolExecutor(queues * in_flight) as pool:

        def send(number: int) -> None:
            if (piece := next(left, None)) is not None:
                running[pool.submit(search, number, piece)] = number, piece

        for number in [*range(queues)] * in_flight:
            send(number)
        while running:
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                number, piece = running.pop(future)
                found = future.result()  # before more is sent, which an error would have to wait for
                send(number)
                yield piece, found
