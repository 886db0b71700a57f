"""The tree of a beam search: by hand, and beside what the search itself finds."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from flax_transformer.decoding import beam_search as search
from flax_transformer.decoding.beam_search import BeamSearchConfig
from flax_transformer.decoding.beam_tree import BeamTree, TreeRecorder
from flax_transformer.decoding.hypotheses import Hypotheses
from flax_transformer.decoding.length_penalty import LengthPenalty
from tests.chains import END, START, outputs, table_functions

NONE, GNMT = LengthPenalty.parse("none"), LengthPenalty.parse("gnmt:0.6")


def recorded(chain, config: BeamSearchConfig, max_length: int) -> tuple[BeamTree, Hypotheses]:
    functions, recorder = table_functions(jnp.asarray(chain, jnp.float32)), TreeRecorder()
    state = jax.jit(functools.partial(search.start, functions, config))(None, jnp.array([max_length]))
    advance = jax.jit(lambda state: search.advance(functions, config, state, 1))
    while search.is_running(state):
        state = advance(state)
        recorder.add(state)
    found = jax.jit(functools.partial(search.finish, config))(state)
    return recorder.tree(found, 0), found


def log(*probabilities: float) -> list[float]:
    return np.log(np.maximum(probabilities, 1e-9)).tolist()


def test_a_tree_by_hand():
    """Tokens 2 to 6 beside start and end; a row is what follows a token. The beam has two places.

    Of step 2's best two, 0.54 and 0.24, the second ends. After step 3 [3 6] has no heir: its children have 0.03 each.
    [2 4 end] ends there with 0.0594, and gives its place up to [2 4 5 end] with 0.3888.
    """
    chain = [
        log(0, 0, 0.6, 0.4, 0, 0, 0),
        log(0, 1, 0, 0, 0, 0, 0),
        log(0, 0, 0.1, 0, 0.9, 0, 0),
        log(0, 0.6, 0, 0, 0, 0, 0.4),
        log(0, 0.11, 0, 0, 0.09, 0.8, 0),
        log(0, 0.9, 0, 0, 0, 0.1, 0),
        log(0, *[1 / 6] * 6),
    ]
    tree, _ = recorded(chain, BeamSearchConfig(2, 1, 9, START, END, NONE), 9)
    assert tree.beam_size == 2
    made = [(tree.tokens(n), round(float(np.exp(x.total)), 5), x.fate, x.rank) for n, x in enumerate(tree.nodes)]
    assert made == [
        ([2], 0.6, "extended", None),
        ([3], 0.4, "extended", None),
        ([2, 4], 0.54, "extended", None),
        ([3, 6], 0.16, "pruned", None),
        ([3, END], 0.24, "finished", 1),
        ([2, 4, 5], 0.432, "extended", None),
        ([2, 4, 4], 0.0486, "extended", None),
        ([2, 4, END], 0.0594, "displaced", None),
        ([2, 4, 5, 5], 0.0432, "open", None),
        ([2, 4, 4, 5], 0.03888, "open", None),
        ([2, 4, 5, END], 0.3888, "finished", 0),
    ]
    places = [(node.step, node.place, node.parent) for node in tree.nodes]
    assert places[:5] == [(1, 0, None), (1, 1, None), (2, 0, 0), (2, 1, 1), (2, 0, 1)]
    assert places[5:] == [(3, 0, 2), (3, 1, 2), (3, 0, 2), (4, 0, 5), (4, 1, 6), (4, 0, 5)]
    assert [node.score for node in tree.nodes if node.rank is None and node.fate != "displaced"] == [None] * 8
    scores = np.array([tree.nodes[n].score for n in (4, 7, 10)], float)
    np.testing.assert_allclose(np.exp(scores), [0.24, 0.0594, 0.3888], rtol=1e-5)


def test_a_tree_has_the_results_of_the_search_and_nothing_that_the_beam_did_not_hold():
    chain, beams = np.random.default_rng(1).normal(size=(6, 6)) * 2, 3
    config = BeamSearchConfig(beams, 1, 8, START, END, GNMT)
    tree, found = recorded(chain, config, 8)
    whole = jax.jit(functools.partial(search.beam_search, table_functions(jnp.asarray(chain, jnp.float32)), config))
    jax.tree.map(np.testing.assert_array_equal, found, whole(None, jnp.array([8])))
    results = sorted((node.rank, index) for index, node in enumerate(tree.nodes) if node.rank is not None)
    of_tree = [(tuple(tree.tokens(n)), tree.nodes[n].score, tree.nodes[n].fate == "finished") for _, n in results]
    assert of_tree == outputs(found)

    log_probs = np.asarray(jax.nn.log_softmax(jnp.asarray(chain, jnp.float32)))
    parents = {node.parent for node in tree.nodes}
    last = max(node.step for node in tree.nodes)
    for index, node in enumerate(tree.nodes):
        tokens = [START, *tree.tokens(index)]
        expected = log_probs[tokens[:-1], tokens[1:]]
        np.testing.assert_allclose([node.log_prob, node.total], [expected[-1], expected.sum()], rtol=1e-5)
        ended = node.token == END
        assert node.step == len(tokens) - 1 and ended == (node.fate in ("finished", "displaced"))
        assert (node.fate == "extended") == (index in parents)
        assert (node.fate in ("open", "cut")) == (not ended and node.step == last)
        live = [each for each in tree.nodes if each.step == node.step and each.token != END]
        assert [each.place for each in live] == list(range(len(live))) and len(live) <= beams
        assert [each.total for each in live] == sorted((each.total for each in live), reverse=True)
    assert {"extended", "pruned", "finished"} <= {node.fate for node in tree.nodes}
