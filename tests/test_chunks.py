"""Chunks of work, and the workers that take them."""

import dataclasses
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flax_transformer.errors import ConfigError
from flax_transformer.inference import chunks as chunks_module
from flax_transformer.inference import programs as programs_module
from flax_transformer.inference.chunks import Shape, cut_into_chunks, largest_shapes, run_on_workers
from flax_transformer.inference.programs import ProgramOptions
from flax_transformer.inference.translator import Translator
from flax_transformer.parallel.mesh import MeshConfig, make_mesh, search_meshes
from tests.small_models import ALIKE, DECODING, MODELS, SEEDS, TOKENIZERS, params_that_end


def shape_of(length: int) -> Shape:
    return Shape(length, 0, 0, 0)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 700), max_size=5), st.integers(1, 9), st.integers(1, 40), st.integers(1, 8))
def test_chunks_hold_every_sentence_once_in_its_shape(sizes, workers, slots, calls):
    groups, first = {}, 0
    for number, size in enumerate(sizes):
        groups[shape_of(16 * (number + 1))] = list(range(first, first + size))
        first += size
    chunks = cut_into_chunks(groups, workers, slots, most=calls * slots)
    assert sorted(index for chunk in chunks for index in chunk.members) == list(range(first))
    assert all(1 <= len(chunk.members) <= calls * slots for chunk in chunks)
    assert [chunk.shape for chunk in chunks] == sorted((chunk.shape for chunk in chunks), reverse=True)
    for shape, members in groups.items():
        assert [index for chunk in chunks if chunk.shape == shape for index in chunk.members] == members


def test_one_worker_has_as_few_calls_as_there_can_be():
    chunks = cut_into_chunks({shape_of(16): list(range(2_500)), shape_of(32): list(range(2_500, 2_600))}, 1, 32, 1_024)
    assert [len(chunk.members) for chunk in chunks] == [100, 834, 833, 833]


def ends_of(chunks, speeds) -> list[float]:
    """Returns when each worker ends, if each takes the next chunk when it is free."""
    ends = [0.0] * len(speeds)
    for chunk in chunks:
        free = min(range(len(speeds)), key=lambda worker: ends[worker])
        ends[free] += len(chunk.members) / speeds[free]
    return ends


@pytest.mark.parametrize("speeds", [(1.0, 1.0), (1.0, 0.6), (1.0, 0.4), (1.0, 1.0, 1.0, 0.5), (1.0, 1.0, 0.4, 0.4)])
def test_fast_and_slow_workers_end_together(speeds):
    groups = {shape_of(16): list(range(2_900)), shape_of(32): list(range(2_900, 4_000))}
    chunks = cut_into_chunks(groups, len(speeds), 16, 1_024)
    assert max(ends_of(chunks, speeds)) < 1.06 * 4_000 / sum(speeds)
    assert len(chunks) < 7 * len(speeds)  # at the end of each slots fall empty
    equal_shares = 4_000 / len(speeds) / min(speeds)
    assert min(speeds) == 1 or max(ends_of(chunks, speeds)) < 0.85 * equal_shares


def test_few_sentences_are_left_to_few_workers():
    """A worker that gets nothing need not have its program compiled."""
    for count, expected in ((1, [1]), (16, [16]), (20, [10, 10]), (40, [20, 20]), (64, [32, 32])):
        chunks = cut_into_chunks({shape_of(16): list(range(count))}, 2, 16, 1_024)
        assert [len(chunk.members) for chunk in chunks] == expected
    assert cut_into_chunks({}, 2, 16, 1_024) == []


@pytest.mark.parametrize("workers, chunks_each", [(1, 2), (2, 1), (3, 1)])
def test_as_many_chunks_are_under_way_as_is_said(workers, chunks_each, monkeypatch):
    chunks = cut_into_chunks({shape_of(16): list(range(60))}, workers, 3, 3)
    given, most, counting = [0] * workers, 0, threading.Lock()

    def launch(worker, chunk):
        nonlocal most
        with counting:
            given[worker] += 1
            most = max(most, given[worker])
        return worker, sum(chunk.members)

    def device_get(found):
        time.sleep(0.001)
        with counting:
            given[found[0]] -= 1
        return found

    monkeypatch.setattr(jax, "device_get", device_get)
    found = list(run_on_workers(chunks, workers, launch))
    assert most == chunks_each and given == [0] * workers
    assert all(total == sum(chunk.members) for chunk, (_, total) in found)
    assert sorted(index for chunk, _ in found for index in chunk.members) == list(range(60))


def test_programs_are_traced_where_the_caller_is():
    """So that settings of its thread hold."""
    chunks = cut_into_chunks({shape_of(16): list(range(12))}, 2, 3, 3)

    def launch(worker, chunk):
        return [str(jax.make_jaxpr(jnp.dot)(jnp.ones(2), jnp.ones(2)))]

    with jax.default_matmul_precision("highest"):
        found = [program for _, (program,) in run_on_workers(chunks, 2, launch)]
    assert len(found) == len(chunks) > 2
    assert all("HIGHEST" in program for program in found)


@pytest.mark.parametrize("failing", [0, 1])
def test_nothing_more_is_launched_once_one_has_failed(failing, monkeypatch):
    """Though another worker has ended at the same time."""
    chunks = cut_into_chunks({shape_of(16): list(range(12))}, 2, 3, 3)
    launched = []

    def device_get(worker):
        if worker == failing:
            raise MemoryError("no room")

    monkeypatch.setattr(jax, "device_get", device_get)
    monkeypatch.setattr(chunks_module, "wait", lambda running, return_when: wait(running))
    with pytest.raises(MemoryError, match="no room"):
        list(run_on_workers(chunks, 2, lambda worker, chunk: launched.append(chunk) or worker))
    assert len(launched) == 2 < len(chunks)


def test_an_error_does_not_wait_for_the_others(monkeypatch):
    chunks = cut_into_chunks({shape_of(16): list(range(12))}, 2, 3, 3)
    may_end, ended = threading.Event(), threading.Event()

    def device_get(worker):
        if worker == 1:
            raise MemoryError("no room")
        may_end.wait(30)
        ended.set()

    monkeypatch.setattr(jax, "device_get", device_get)
    with pytest.raises(MemoryError, match="no room"):
        list(run_on_workers(chunks, 2, lambda worker, chunk: worker))
    assert not ended.is_set()
    may_end.set()


@pytest.fixture(scope="module")
def translator() -> Translator:
    mesh = make_mesh(MeshConfig(), jax.devices()[:2])
    model = MODELS["transformer"]
    params = params_that_end(model, SEEDS["transformer"])
    return Translator.from_params(model, TOKENIZERS, params, DECODING, mesh, side_by_side=True)


def test_few_cores_search_one_by_one_and_many_together(translator):
    meshes = translator.parameters.search_meshes
    assert [m.devices.flatten().tolist() for m in meshes] == [[d] for d in jax.devices()[:2]]
    everything = make_mesh(MeshConfig())
    assert everything.size == 8 and search_meshes(everything) == [everything]


def test_cores_read_the_same_weights(translator):
    """What each reads in every step is in the cache that they share once, not once for each."""
    first, second = ([leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(params) if leaf.nbytes >= 1_024]
                     for _, params in translator.parameters.prepared())  # fmt: skip
    assert first == second and len(first) > 10


def test_a_device_that_hangs_holds_up_no_other(translator, monkeypatch):
    """The first device gives nothing back until the second has done all the rest; and no result changes."""
    text = [source for source in ALIKE if source]
    translator = dataclasses.replace(translator, options=ProgramOptions(sentences_per_row=2))
    expected = translator.translate(text, num_hypotheses=3)
    reader = translator.requests
    cut = translator.programs(reader).chunks({n: reader.read(sentence) for n, sentence in enumerate(text)})
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


@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_on_one_device_is_raised(translator, monkeypatch, failing):
    device_get = jax.device_get

    def broken(found):
        if found.tokens.devices() == {jax.devices()[failing]}:
            raise MemoryError("no room")
        return device_get(found)

    monkeypatch.setattr(jax, "device_get", broken)
    with pytest.raises(MemoryError, match="no room"):
        translator.translate([source for source in ALIKE if source])


def test_threads_may_share_a_translator_before_its_first_search(translator):
    text, num_threads = [source for source in ALIKE if source], 4
    expected = translator.translate(text)
    for _ in range(5):
        fresh = translator.with_params(translator.params)  # nothing is prepared; programs are shared
        together = threading.Barrier(num_threads)

        def found(_, fresh=fresh, together=together):
            together.wait(60)
            return fresh.translate(text)

        with ThreadPoolExecutor(num_threads) as pool:
            assert all(made == expected for made in pool.map(found, range(num_threads)))
        assert len(fresh.parameters.prepared()) == len(fresh.parameters.search_meshes)


def test_the_largest_shapes_are_those_that_no_other_covers():
    shapes = [Shape(32, 0, 0, 0), Shape(64, 0, 0, 0), Shape(32, 8, 0, 0), Shape(16, 8, 0, 0), Shape(16, 0, 2, 8)]
    assert largest_shapes([*shapes, *shapes]) == [shapes[1], shapes[2], shapes[4]]
    assert largest_shapes(shapes[:2]) == [shapes[1]] and largest_shapes([]) == []


def test_a_lack_of_memory_is_found_before_anything_is_searched(translator, monkeypatch):
    """Otherwise the answers that were found before it would be lost."""

    def searched(params, inputs):
        raise AssertionError("a search has begun")

    def compiled(lowered, *more, **named):
        if lowered.prefixes.shape[1]:
            raise ConfigError("it does not fit.")
        return searched

    def traced(graphdef, spec, mesh, params, inputs, sharded):
        return SimpleNamespace(lower=lambda: inputs)

    monkeypatch.setattr(programs_module, "compile_checked", compiled)
    monkeypatch.setattr(programs_module, "traced_search", traced)
    fresh = Translator.from_params(translator.model, TOKENIZERS, translator.params, DECODING, translator.mesh)
    with pytest.raises(ConfigError, match="it does not fit"):
        fresh.translate(["one " * 40, "two"], prefixes=["", "zwei"])  # the longest comes first


def test_after_compile_no_device_has_anything_to_compile(translator):
    fresh = translator.with_decoding(dataclasses.replace(translator.decoding, beam_size=2))
    text = [source for source in ALIKE if source]
    fresh.compile(text)
    compiled = set(fresh.parameters.programs)
    fresh.translate(text[:1])
    fresh.translate(text)
    assert set(fresh.parameters.programs) == compiled
