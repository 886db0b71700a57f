"""Progress of long work on standard error: a bar on a terminal, and plain lines elsewhere.

Work of unknown size shows its count and its rate. Short work leaves no line.
"""

import contextlib
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")

# Without a terminal a line follows after this time, and then after each such time.
SECONDS_BETWEEN_LINES = 15.0

# A terminal is updated after so many items at the earliest.
ITEMS_AT_ONCE = 1_000

Advance = Callable[[int], None]


@contextlib.contextmanager
def progress(
    what: str, total: int | None = None, unit: str = "lines", only_on_terminals: bool = False
) -> Generator[Advance, None, None]:
    """Shows the progress of work, and gives a function that is told how many more items are done.

    Args:
        what: the work in a few words, such as "reading train.en".
        total: number of items, or None if it is not known.
        unit: name of the items.
        only_on_terminals: whether other outputs get no line.
    """
    if on_terminal():
        with _bar(what, total, unit) as advance:
            yield advance
    elif only_on_terminals:
        yield no_progress
    else:
        yield _lines(what, total, unit)


def no_progress(items: int) -> None:
    """Shows nothing."""


def on_terminal() -> bool:
    """Returns whether standard error is a terminal."""
    stream = sys.stderr
    return stream is not None and not stream.closed and stream.isatty()


def tracked(
    items: Iterable[T], what: str, total: int | None = None, unit: str = "lines", only_on_terminals: bool = False
) -> Iterator[T]:
    """Yields the items, and shows how many have been taken. The arguments are those of `progress`."""
    at_once = 1 if total is not None and total <= ITEMS_AT_ONCE else ITEMS_AT_ONCE
    with progress(what, total, unit, only_on_terminals) as advance:
        done = 0
        for done, item in enumerate(items, start=1):
            yield item
            if done % at_once == 0:
                advance(at_once)
        advance(done % at_once)


def rate_text(done: int, seconds: float, total: int | None, unit: str) -> str:
    """Returns the count, the rate, and the time that is left if the total is known."""
    rate = done / max(seconds, 1e-9)
    text = f"{done:,}{'' if total is None else f' of {total:,}'} {unit}"
    if rate >= 1:
        text += f", {rate:,.0f} a second"
    if total is None or not done:
        return text
    minutes, left = divmod(round(max(total - done, 0) / rate), 60)
    return f"{text}, left {minutes}:{left:02d}"


@contextlib.contextmanager
def _bar(what: str, total: int | None, unit: str) -> Generator[Advance, None, None]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    started, count = time.monotonic(), 0
    bar = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20),
        TextColumn("{task.fields[text]}", markup=False),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    task = bar.add_task(what, total=total, text="")

    def advance(items: int) -> None:
        nonlocal count
        count += items
        bar.update(task, completed=count, text=rate_text(count, time.monotonic() - started, total, unit))

    with bar:
        yield advance


def _lines(what: str, total: int | None, unit: str) -> Advance:
    started, shown, count = time.monotonic(), time.monotonic(), 0

    def advance(items: int) -> None:
        nonlocal shown, count
        count += items
        if time.monotonic() - shown >= SECONDS_BETWEEN_LINES:
            shown = time.monotonic()
            print(f"{what}: {rate_text(count, shown - started, total, unit)}", file=sys.stderr, flush=True)

    return advance
