"""Beams near the vocabulary's size."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_transformer.decoding.candidates import best_candidates
from flax_transformer.decoding.lexical_constraints import LexicalConstraints
from flax_transformer.decoding.logits_processors import Progress
from flax_transformer.inference.translator import Translator
from flax_transformer.parallel.mesh import MeshConfig, make_mesh
from flax_transformer.shapes import MASKED
from tests.small_models import ALIKE, DECODING, MODELS, TOKENIZERS, params_of

END = 4


def plain_candidates(live: np.ndarray, log_probs: np.ndarray, excluded: list[int]) -> list[tuple[int, int]]:
    """All candidates (beam, token) of one slot, best first."""
    scores = live[:, None] + log_probs
    scores[:, excluded] = -np.inf
    beams, tokens = np.unravel_index(np.argsort(-scores, axis=None, kind="stable"), scores.shape)
    return list(zip(beams.tolist(), tokens.tolist(), strict=True))[: scores.size - len(excluded) * len(live)]


@pytest.mark.parametrize("beams", [1, 3, 7])
@pytest.mark.parametrize("excluded", [(), (0, 3)])
def test_all_candidates_that_count_are_found_if_the_model_finds_excluded_tokens_the_most_probable(beams, excluded):
    """Those that may finish are among the first K; those that live on are the first K without an end token."""
    rng = np.random.default_rng(beams)
    for _ in range(20):
        live = rng.normal(size=beams).astype(np.float32)
        logits = rng.normal(size=(beams, 9)).astype(np.float32) * 3
        logits[:, [0, 3]] += 4.0
        none = Progress(jnp.zeros((1, beams, 2), jnp.int32), jnp.ones(1, jnp.int32), jnp.zeros(1, jnp.int32))
        found = best_candidates(jnp.asarray(live)[None], jnp.asarray(logits)[None], 2 * beams, none, (), excluded)
        possible = np.asarray(found.scores[0]) > MASKED / 2
        parents, tokens = (np.asarray(x[0])[possible].tolist() for x in (found.parents, found.tokens))
        candidates = list(zip(parents, tokens, strict=True))
        expected = plain_candidates(live, np.array(jax.nn.log_softmax(logits)), list(excluded))
        assert candidates[:beams] == expected[:beams]
        going_on = [[c for c in each if c[1] != END][:beams] for each in (candidates, expected)]
        assert going_on[0] == going_on[1]


def test_required_phrases_bring_no_excluded_token():
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(1, 5, 9)), jnp.float32).at[..., jnp.array([0, 3])].add(9.0)
    none = Progress(jnp.zeros((1, 5, 4), jnp.int32), jnp.ones(1, jnp.int32), jnp.zeros(1, jnp.int32))
    phrases = jnp.array([[[5, 6]]], jnp.int32)
    live = jnp.zeros((1, 5), jnp.float32)
    found = jax.jit(lambda: LexicalConstraints(phrases, END)(live, logits, 10, none, (), (0, 3)))()
    tokens = set(np.asarray(found.tokens)[np.asarray(found.scores) > MASKED / 2].tolist())
    assert 5 in tokens and not tokens & {0, 3}


def test_no_beam_outputs_padding_or_start():
    mesh, model = make_mesh(MeshConfig(), jax.devices()[:1]), MODELS["transformer"]
    decoding = dataclasses.replace(DECODING, max_length_factor=0.0, max_length_offset=4)
    translator = Translator.from_params(model, TOKENIZERS, params_of(model, 1), decoding, mesh)
    beams = TOKENIZERS.target.vocab_size - 2
    found = translator.translate(ALIKE[:2], beam_size=beams, num_hypotheses=beams)
    tokens = {token for answer in found for hypothesis in answer.hypotheses for token in hypothesis.tokens}
    assert len(tokens) > 9 and not tokens & {"<s>", "<pad>", "</s>"}
