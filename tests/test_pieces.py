"""Pieces of work, and the queues that take them."""

import threading

import jax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flax_transformer.inference.pieces import Piece, Shape, cut_into_pieces, taken_by_queues
from flax_transformer.inference.translator import Translator
from flax_transformer.parallel.mesh import MeshConfig, make_mesh, search_meshes
from tests.small_models import ALIKE, DECODING, MODELS, SEEDS, TOKENIZERS, params_that_end


def shape_of(length: int) -> Shape:
    return Shape(length, 0, 0, 0)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 700), max_size=5), st.integers(1, 9), st.integers(1, 40), st.integers(1, 8))
def test_pieces_hold_every_sentence_once_in_its_shape(sizes, queues, slots, calls):
    groups, first = {}, 0
    for number, size in enumerate(sizes):
        groups[shape_of(16 * (number + 1))] = list(range(first, first + size))
        first += size
    pieces = cut_into_pieces(groups, queues, slots, most=calls * slots)
    assert sorted(index for piece in pieces for index in piece.members) == list(range(first))
    assert all(1 <= len(piece.members) <= calls * slots for piece in pieces)
    assert [piece.shape for piece in pieces] == sorted((piece.shape for piece in pieces), reverse=True)
    for shape, members in groups.items():
        assert [index for piece in pieces if piece.shape == shape for index in piece.members] == members


def test_one_queue_has_as_few_calls_as_there_can_be():
    pieces = cut_into_pieces({shape_of(16): list(range(2_500)), shape_of(32): list(range(2_500, 2_600))}, 1, 32, 1_024)
    assert [len(piece.members) for piece in pieces] == [100, 834, 833, 833]


def ends_of(pieces, speeds) -> list[float]:
    """Returns when each queue ends, if each takes the next piece when it is free."""
    ends = [0.0] * len(speeds)
    for piece in pieces:
        free = min(range(len(speeds)), key=lambda queue: ends[queue])
        ends[free] += len(piece.members) / speeds[free]
    return ends


@pytest.mark.parametrize("speeds", [(1.0, 1.0), (1.0, 0.6), (1.0, 0.4), (1.0, 1.0, 1.0, 0.5), (1.0, 1.0, 0.4, 0.4)])
def test_fast_and_slow_queues_end_together(speeds):
    groups = {shape_of(16): list(range(2_900)), shape_of(32): list(range(2_900, 4_000))}
    pieces = cut_into_pieces(groups, len(speeds), 16, 1_024)
    assert max(ends_of(pieces, speeds)) < 1.06 * 4_000 / sum(speeds)
    assert len(pieces) < 7 * len(speeds)  # at the end of each slots fall empty
    equal_shares = 4_000 / len(speeds) / min(speeds)
    assert min(speeds) == 1 or max(ends_of(pieces, speeds)) < 0.85 * equal_shares


def test_few_sentences_are_left_to_few_queues():
    """A queue that gets nothing need not have its program compiled."""
    for count, expected in ((1, [1]), (16, [16]), (20, [10, 10]), (40, [20, 20]), (64, [32, 32])):
        pieces = cut_into_pieces({shape_of(16): list(range(count))}, 2, 16, 1_024)
        assert [len(piece.members) for piece in pieces] == expected
    assert cut_into_pieces({}, 2, 16, 1_024) == []


def test_one_queue_prepares_a_piece_while_another_is_searched():
    """Each call waits for a second one; and no third is there."""
    pieces = cut_into_pieces({shape_of(16): list(range(12))}, 1, 3, 3)
    two, running, most = threading.Barrier(2), [], 0

    def search(queue, piece):
        nonlocal most
        assert queue == 0
        running.append(piece)
        most = max(most, len(running))
        two.wait(60)
        running.remove(piece)
        return sum(piece.members)

    found = list(taken_by_queues(pieces, 1, search))
    assert len(found) == 4 and most == 2
    assert all(total == sum(piece.members) for piece, total in found)
    assert sorted(index for piece, _ in found for index in piece.members) == list(range(12))


def test_nothing_more_is_sent_once_a_search_has_failed():
    pieces = cut_into_pieces({shape_of(16): list(range(12))}, 2, 3, 3)
    begun = []

    def search(queue, piece):
        begun.append(piece)
        raise MemoryError("no room")

    with pytest.raises(MemoryError, match="no room"):
        list(taken_by_queues(pieces, 2, search))
    assert len(begun) == 2 < len(pieces)


@pytest.fixture(scope="module")
def translator() -> Translator:
    mesh = make_mesh(MeshConfig(), jax.devices()[:2])
    model = MODELS["transformer"]
    params = params_that_end(model, SEEDS["transformer"])
    return Translator(model, TOKENIZERS, params, DECODING, mesh, side_by_side=True)


def test_few_cores_search_one_by_one_and_many_together(translator):
    assert [m.devices.flatten().tolist() for m in translator.search_meshes] == [[d] for d in jax.devices()[:2]]
    everything = make_mesh(MeshConfig())
    assert everything.size == 8 and search_meshes(everything) == [everything]


def test_cores_read_the_same_weights(translator):
    """What each reads in every step is in the cache that they share once, not once for each."""
    first, second = ([leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(params) if leaf.nbytes >= 1_024]
                     for _, params in translator._search_form())  # fmt: skip
    assert first == second and len(first) > 10


def test_a_device_that_hangs_holds_up_no_other(translator, monkeypatch):
    """The first device gives nothing back until the second has done all the rest; and no result changes."""
    text = [source for source in ALIKE if source]
    monkeypatch.setattr("flax_transformer.inference.translator.SENTENCES_A_ROW", 2)
    expected = translator.translate(text, num_hypotheses=3)
    cut: list[Piece] = []

    def recorded(*arguments):
        cut.extend(cut_into_pieces(*arguments))
        return cut

    monkeypatch.setattr("flax_transformer.inference.translator.cut_into_pieces", recorded)
    device_get, others_are_done, counts = jax.device_get, threading.Event(), {device: 0 for device in jax.devices()[:2]}

    def slow(found):
        (device,) = found.tokens.devices()
        counts[device] += 1
        if device == jax.devices()[0]:
            assert others_are_done.wait(60)
        elif counts[device] == len(cut) - 1:
            others_are_done.set()
        return device_get(found)

    monkeypatch.setattr(jax, "device_get", slow)
    assert translator.translate(text, num_hypotheses=3) == expected
    assert list(counts.values()) == [1, len(cut) - 1] and len(cut) >= 4


def test_an_error_in_one_queue_is_raised(translator, monkeypatch):
    def broken(found):
        raise MemoryError("device 1") if found.tokens.devices() == {jax.devices()[1]} else KeyError("device 0")

    monkeypatch.setattr(jax, "device_get", broken)
    with pytest.raises((MemoryError, KeyError), match="device"):
        translator.translate(list(ALIKE))
