"""Required phrases: outputs that hold given sequences of tokens, wherever the model finds them least improbable.

A hypothesis is measured by how many tokens of its sentence's phrases it has: all of each phrase that it holds, and the
beginning of one that it ends with. At each step the tokens that take a hypothesis further are candidates beside the
most probable ones, and each measure has a share of the beam; what a measure cannot fill goes to the others, the highest
first. So a beam with more places than the phrases have tokens lets the model choose where they stand, and a smaller one
puts them down at once. An output may end once it holds all phrases; one that is cut before is unfinished.

Legend: N sentences, B slots, K beams, M candidates, V vocabulary, T maximum length, Q phrases, P tokens of a phrase.

References:
    Post and Vilar 2018, "Fast Lexically Constrained Decoding with Dynamic Beam Allocation", section 3. Difference:
    whether a phrase is held is read off the tokens, so that phrases may overlap.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from flax_transformer.decoding.beam_search import Candidates
from flax_transformer.decoding.rules import ANY, Progress, Rule
from flax_transformer.ops.vocabulary import best_of_vocabulary, log_probabilities
from flax_transformer.shapes import MASKED

# Stands before the beginning of an output: equals no token.
NOTHING = ANY - 1


def held_phrases(
    tokens: Int[Array, "B K T"], steps: Int[Array, "B"], phrases: Int[Array, "B Q P"]
) -> Bool[Array, "B K Q"]:
    """Returns which phrases the first `steps` tokens hold; a phrase of no token is always held."""
    length, longest = tokens.shape[2], phrases.shape[2]
    sizes = jnp.sum(phrases != ANY, axis=2)  # [B, Q]
    tokens = jnp.pad(tokens, ((0, 0), (0, 0), (0, longest)), constant_values=NOTHING)
    here = jnp.ones((*tokens.shape[:2], length, phrases.shape[1]), bool)  # [B, K, T, Q]: whether a phrase begins here
    for place in range(longest):
        wanted = phrases[:, None, None, :, place]
        here &= (tokens[:, :, place : place + length, None] == wanted) | (wanted == ANY)
    inside = jnp.arange(length)[None, :, None] + sizes[:, None, :] <= steps[:, None, None]  # [B, T, Q]
    return jnp.any(here & inside[:, None], axis=2) | (sizes == 0)[:, None, :]


def ended_phrases(tail: Int[Array, "B M P"], phrases: Int[Array, "B Q P"]) -> Int[Array, "B M Q"]:
    """Returns how many tokens of the beginning of each phrase stand at the end of `tail`, at most all of them."""
    longest = phrases.shape[2]
    sizes = jnp.sum(phrases != ANY, axis=2)[:, None, :]
    most = jnp.zeros((*tail.shape[:2], phrases.shape[1]), jnp.int32)
    for size in range(1, longest + 1):
        same = jnp.all(tail[:, :, None, longest - size :] == phrases[:, None, :, :size], axis=3)
        most = jnp.where(same & (size <= sizes), size, most)
    return most


def shared_beam(
    scores: Float[Array, "B M"], measures: Int[Array, "B M"], most: Int[Array, "B"], beams: int
) -> Int[Array, "B M"]:
    """Returns the candidates in the order in which they share a beam; those that are MASKED come last.

    Args:
        scores: of the candidates.
        measures: of the candidates, at most `most`.
        most: tokens of all phrases; there are `most` + 1 measures.
        beams: how many places are shared: equally, and what is left over goes to the highest measure.

    Example: scores [-1, -2, -3, -4] with measures [0, 0, 1, 1] and 2 places give [2, 0, 3, 1].
    """
    order = jnp.lexsort((-scores, measures), axis=-1)  # measure by measure, the best first
    ordered = jnp.take_along_axis(measures, order, axis=1)
    number = jnp.arange(scores.shape[1])[None, :]
    first = jnp.pad(ordered[:, 1:] != ordered[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    ranks = number - jax.lax.cummax(jnp.where(first, number, 0), axis=1)  # within the measure
    rank = jnp.zeros_like(ranks).at[jnp.arange(len(order))[:, None], order].set(ranks)
    shares = (most + 1)[:, None]
    share = beams // shares + jnp.where(measures == most[:, None], beams % shares, 0)
    turn = jnp.where(scores > MASKED / 2, jnp.where(rank < share, 0, 1), 2)
    return jnp.lexsort((rank, -measures, turn), axis=-1)


def required_phrases(all_phrases: Int[Array, "N Q P"], end_token: int) -> Candidates:
    """Returns the choice of candidates whose outputs hold each sentence's phrases.

    Args:
        all_phrases: `ANY` after each phrase's end; one of `ANY` alone asks for nothing.
        end_token: what closes a hypothesis.
    """
    longest = all_phrases.shape[2]

    def choose(
        live_scores: Float[Array, "B K"],
        logits: Float[Array, "B K V"],
        num: int,
        progress: Progress,
        rules: Sequence[Rule],
    ) -> tuple[Float[Array, "B M"], Int[Array, "B M"], Int[Array, "B M"], Float[Array, "B M"]]:
        slots, beams, vocab_size = logits.shape
        phrases = jnp.take(all_phrases, progress.sentences, axis=0, mode="clip")
        sizes = jnp.sum(phrases != ANY, axis=2)
        held = held_phrases(progress.tokens, progress.steps, phrases)
        place = progress.steps[:, None] - jnp.arange(longest, 0, -1)[None, :]  # [B, P], the last tokens
        place = jnp.broadcast_to(place[:, None, :], (slots, beams, longest))
        tails = jnp.take_along_axis(progress.tokens, jnp.maximum(place, 0), axis=2)
        tails = jnp.where(place < 0, NOTHING, tails)

        log_probs = log_probabilities(logits)
        for rule in rules:
            log_probs = rule(log_probs, progress)
        may_end = jnp.all(held, axis=2)[:, :, None] | (jnp.arange(vocab_size) != end_token)[None, None, :]
        log_probs = jnp.where(may_end, log_probs, MASKED)

        # --- the most probable tokens of each beam, and those that take a phrase further
        likely_log_probs, likely = best_of_vocabulary(log_probs, min(num, vocab_size))
        begun = ended_phrases(tails, phrases)  # [B, K, Q]
        following = jnp.take_along_axis(
            jnp.broadcast_to(phrases[:, None], (slots, beams, *phrases.shape[1:])),
            jnp.minimum(begun, longest - 1)[..., None],
            axis=3,
        )[..., 0]
        wanted = jnp.where(held | (begun >= sizes[:, None, :]), ANY, following)
        others = jnp.concatenate([likely, wanted], axis=2)  # one that is there already, or further left, is no other
        number = jnp.arange(others.shape[2])
        left = (number[None, :] < number[likely.shape[2] :, None])[None, None]
        again = jnp.any((wanted[..., None] == others[:, :, None, :]) & left, axis=3)
        wanted_log_probs = jnp.take_along_axis(log_probs, jnp.maximum(wanted, 0), axis=2)
        wanted_log_probs = jnp.where(again | (wanted == ANY), MASKED, wanted_log_probs)

        tokens = jnp.maximum(others, 0).reshape(slots, -1)
        token_log_probs = jnp.concatenate([likely_log_probs, wanted_log_probs], axis=2).reshape(slots, -1)
        parents = jnp.repeat(jnp.arange(beams), others.shape[2])
        scores = live_scores[:, parents] + token_log_probs
        scores = jnp.where((token_log_probs > MASKED / 2) & (scores > MASKED / 2), scores, MASKED)

        # --- how far each is, and who shares the beam
        tail = jnp.concatenate([tails[:, parents, 1:], tokens[..., None]], axis=2)
        ended = ended_phrases(tail, phrases)  # [B, M, Q]
        now_held = held[:, parents] | (ended >= sizes[:, None, :])
        measures = jnp.sum(jnp.where(now_held, sizes[:, None, :], 0), axis=2)
        measures = measures + jnp.max(jnp.where(now_held, 0, ended), axis=2)
        order = shared_beam(scores, measures, jnp.sum(sizes, axis=1), beams)[:, :num]

        def chosen(x: Array) -> Array:
            return jnp.take_along_axis(x, order, axis=1)

        parents = jnp.broadcast_to(parents[None, :], tokens.shape)
        return chosen(scores), chosen(parents), chosen(tokens), chosen(token_log_probs)

    return choose
