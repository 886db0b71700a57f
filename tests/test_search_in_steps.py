"""The search as a server drives it: a few steps at a time, by one compiled program, with the state donated."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_transformer.decoding import beam_search as search
from flax_transformer.decoding.beam_search import BeamSearchConfig
from flax_transformer.decoding.beam_state import BeamState
from flax_transformer.decoding.hypotheses import Hypotheses
from flax_transformer.decoding.length_penalty import LengthPenalty
from flax_transformer.decoding.logits_processors import ANY, ForceEos, ForcePrefix, MinLength, SuppressTokens
from flax_transformer.errors import ConfigError
from flax_transformer.inference.results import ResultReader
from flax_transformer.inference.stepped_search import SteppedSearch
from flax_transformer.inference.translator import Translator
from flax_transformer.parallel.mesh import MeshConfig, make_mesh
from tests.chains import END, START, chain_functions, chain_state, outputs
from tests.small_models import ALIKE, DECODING, MODELS, SEEDS, TOKENIZERS, params_that_end

VOCAB, NUM_STEPS = 6, 3
# Seven sentences and a row of padding share two slots.
CHAINS = np.random.default_rng(4).normal(size=(8, VOCAB, VOCAB)) * 2
MAX_LENGTHS = jnp.array([9, 3, 7, 9, 5, 8, 9, 0])
MIN_LENGTHS = jnp.array([4, 0, 6, 0, 5, 3, 0, 0])
CONFIG = BeamSearchConfig(3, 2, 9, START, END, LengthPenalty.parse("gnmt:0.6"))
FUNCTIONS = chain_functions(keep_read=True)
# Which tokens never occur, and what the outputs of each sentence begin with: two requests.
REQUESTS = {
    "first": ([5], [[2, 2], [], [3], [], [4, 3, 2], [], [2], []]),
    "second": ([2, 4], [[], [3], [5, 5], [], [], [3, 3], [5], []]),
}


def start(suppressed: jax.Array, prefixes: jax.Array) -> BeamState:
    others = SuppressTokens(suppressed), MinLength(MIN_LENGTHS, END), ForceEos(MAX_LENGTHS, END)
    return search.start(
        FUNCTIONS, CONFIG, chain_state(CHAINS, CONFIG.num_slots), MAX_LENGTHS, [ForcePrefix(prefixes, others)]
    )


def arrays(request: str) -> tuple[jax.Array, jax.Array]:
    tokens, prefixes = REQUESTS[request]
    padded = np.full((len(prefixes), 3), ANY, np.int32)
    for row, prefix in zip(padded, prefixes, strict=True):
        row[: len(prefix)] = prefix
    return jnp.asarray(np.isin(np.arange(VOCAB), tokens)), jnp.asarray(padded)


class Programs:
    """What a server compiles, each once: a program that was compiled for other shapes or values refuses its input."""

    def __init__(self):
        started = jax.jit(start).lower(*arrays("first"))
        state = started.out_info
        self.start = started.compile()
        advance = jax.jit(functools.partial(search.advance, FUNCTIONS, CONFIG), donate_argnums=0)
        self.advance = advance.lower(state, jnp.int32(NUM_STEPS)).compile()
        self.is_running = jax.jit(search.is_running).lower(state).compile()
        self.finish = jax.jit(functools.partial(search.finish, CONFIG)).lower(state).compile()


@pytest.fixture(scope="module")
def programs() -> Programs:
    return Programs()


@pytest.fixture(scope="module")
def uninterrupted() -> dict[str, Hypotheses]:
    """What `beam_search` finds for each request."""

    @jax.jit
    def run(suppressed, prefixes):
        state = start(suppressed, prefixes)
        request = state.request
        return search.beam_search(FUNCTIONS, CONFIG, state.decoder, MAX_LENGTHS, request.processors)

    return {request: jax.device_get(run(*arrays(request))) for request in REQUESTS}


def test_these_requests_differ_and_keep_their_slots_busy(uninterrupted):
    """Without that the tests below would hold little."""
    for request, (suppressed, prefixes) in REQUESTS.items():
        for sentence, (prefix, least, most) in enumerate(zip(prefixes, MIN_LENGTHS, MAX_LENGTHS, strict=True)):
            hypotheses = outputs(uninterrupted[request], sentence)
            assert bool(hypotheses) == (most > 0)
            for tokens, _, finished in hypotheses:
                assert finished and least <= len(tokens) <= most and list(tokens[: len(prefix)]) == prefix
                assert not set(tokens[len(prefix) :]) & set(suppressed)
    first, second = uninterrupted.values()
    assert all(outputs(first, sentence) != outputs(second, sentence) for sentence in range(7))
    assert len(set(first.lengths[:7, 0].tolist())) >= 4


@pytest.mark.parametrize("max_steps", [1, NUM_STEPS])
@pytest.mark.parametrize("request_name", REQUESTS)
def test_a_few_steps_at_a_time_find_what_one_search_finds(programs, uninterrupted, request_name, max_steps):
    """To the bit; and programs that were compiled for one request serve the other."""
    state, calls = programs.start(*arrays(request_name)), 0
    while programs.is_running(state):
        before, state = state, programs.advance(state, jnp.int32(max_steps))
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before))  # donated
        calls += 1
    assert calls > 2 * 9 // max_steps  # more than two sentences take, one after the other
    jax.tree.map(np.testing.assert_array_equal, programs.finish(state), uninterrupted[request_name])


def test_a_step_changes_no_type_of_the_state():
    """Or a program would be compiled anew for the state that it has made, were it a weak type alone."""
    state = jax.eval_shape(start, *arrays("first"))
    after = jax.eval_shape(functools.partial(search.advance, FUNCTIONS, CONFIG), state, jnp.int32(NUM_STEPS))
    types = [[(leaf.shape, leaf.dtype, leaf.weak_type) for leaf in jax.tree.leaves(tree)] for tree in (state, after)]
    assert jax.tree.structure(state) == jax.tree.structure(after) and types[0] == types[1]


def test_no_call_takes_more_steps_than_it_may(programs):
    state = programs.start(*arrays("first"))
    for _ in range(3):
        before = jax.device_get((state.steps, state.sentences))
        state = programs.advance(state, jnp.int32(2))
        stayed = np.asarray(state.sentences) == before[1]
        steps = np.asarray(state.steps) - np.where(stayed, before[0], 0)
        assert 1 <= steps.max() <= 2


def test_results_are_read_while_others_are_searched(programs, uninterrupted):
    """After each call the sentences of the slots that are not active are done."""
    state, read, beside = programs.start(*arrays("first")), {}, 0
    while programs.is_running(state):
        state = programs.advance(state, jnp.int32(NUM_STEPS))
        active, sentences = jax.device_get((state.active, state.sentences))
        found = jax.device_get(programs.finish(state))
        for sentence in sentences[~active & (sentences < len(CHAINS))].tolist():
            read[sentence] = outputs(found, sentence)
        for sentence in sentences[active].tolist():
            assert outputs(found, sentence) == []
        beside += any(active) and not all(active)
    assert read == {sentence: outputs(uninterrupted["first"], sentence) for sentence in range(7)}
    assert beside >= 3


def test_the_state_carries_the_arrays_of_its_processors(programs):
    """And no other array is needed: the compiled program takes the state and a number alone."""
    suppressed, prefixes = arrays("second")
    state = programs.start(suppressed, prefixes)
    (processor,) = state.request.processors
    np.testing.assert_array_equal(processor.prefixes, prefixes)
    np.testing.assert_array_equal(processor.others[0].suppressed, suppressed)
    leaves = jax.tree.leaves(state)
    assert all(any(array is leaf for leaf in leaves) for array in (processor.prefixes, processor.others[0].suppressed))
    assert len(programs.advance.args_info[0]) == 2


# --- the search of a model


def test_a_model_searches_some_steps_at_a_time_with_the_state_donated(one_device):
    """Four requests take turns in two slots. The inputs outlive the states, and serve the next search."""
    model = MODELS["transformer"]
    decoding = dataclasses.replace(DECODING, batch_size=2, min_length=3)
    of_model = model, TOKENIZERS, params_that_end(model, SEEDS["transformer"]), decoding, one_device
    translator = Translator.from_params(*of_model)
    reader = translator.requests
    requests = [reader.read(sentence) for sentence in ALIKE[:4]]
    stepped = SteppedSearch.of(translator.programs(reader), requests)
    found = []
    for max_steps in (1, 1000):
        state = stepped.start()
        while search.is_running(state):
            before, state = state, stepped.advance(state, max_steps)
            assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before))
        found.append(stepped.finish(state))
    jax.tree.map(np.testing.assert_array_equal, *found)
    results = ResultReader(TOKENIZERS, decoding, 1, translator.parameters)
    answers = [results.read(request, found[0], row) for row, request in enumerate(requests)]
    assert answers == translator.translate(ALIKE[:4])


def test_a_search_in_steps_is_one_loop_over_requests_of_one_shape(one_device):
    model = MODELS["transformer"]
    of_model = model, TOKENIZERS, params_that_end(model, SEEDS["transformer"]), DECODING
    translator, many = (Translator.from_params(*of_model, mesh) for mesh in (one_device, make_mesh(MeshConfig())))
    reader = translator.requests
    short, long = reader.read("one"), reader.read("one " * 40)
    sampling = translator.with_decoding(DECODING.with_method("sampling"))
    for programs, requests, message in (
        (translator.programs(reader), [short, long], "requests of one shape, got "),
        (translator.programs(reader), [], "requests of one shape, got "),
        (translator.programs(reader), [reader.read("")], "1, of which 1 are empty"),
        (translator.programs(reader), [short] * (translator.programs(reader).num_sentences + 1), "takes up to "),
        (sampling.programs(sampling.requests), [short], "got decoding.method: sampling"),
        (many.programs(reader), [short], "8 devices search by themselves"),
    ):
        with pytest.raises(ConfigError, match=message):
            SteppedSearch.of(programs, requests)
