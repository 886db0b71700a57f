"""Lexical constraints: a search for outputs that contain given phrases.

Candidates. The candidates of a step are the most probable tokens of each beam, and the tokens that continue a phrase.

Banks. The bank of a hypothesis is the number of phrase tokens that it has. It counts all tokens of each contained
phrase. It also counts the first tokens of another phrase, if the hypothesis ends with them. The banks share the beam
equally. Places that a bank cannot fill go to the other banks, the highest first.

Places of phrases. If the beam is larger than the number of phrase tokens, the model chooses where phrases stand. In a
smaller beam, phrases come as soon as possible.

End. An output may end only if it contains all phrases. An output that reaches its maximum length before is unfinished.

Legend: N sentences, B slots, K beams, M candidates, V vocabulary, T maximum length, Q phrases, P tokens of a phrase.

References:
    Post and Vilar 2018, "Fast Lexically Constrained Decoding with Dynamic Beam Allocation", section 3. One thing
    differs: each step searches the tokens for the phrases, so phrases may overlap.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from flax_transformer.decoding.candidates import Candidates
from flax_transformer.decoding.logits_processors import ANY, LogitsProcessor, Progress
from flax_transformer.ops.vocabulary import best_of_vocabulary, log_probabilities
from flax_transformer.shapes import MASKED, array_tree, is_possible, static_field

# Marks positions before the beginning of an output. No token has this id.
NOTHING = ANY - 1


def contained_phrases(
    tokens: Int[Array, "B K T"], steps: Int[Array, "B"], phrases: Int[Array, "B Q P"]
) -> Bool[Array, "B K Q"]:
    """Returns which phrases the first `steps` tokens contain. They always contain an empty phrase."""
    length, longest = tokens.shape[2], phrases.shape[2]
    sizes = jnp.sum(phrases != ANY, axis=2)  # [B, Q]
    tokens = jnp.pad(tokens, ((0, 0), (0, 0), (0, longest)), constant_values=NOTHING)
    here = jnp.ones((*tokens.shape[:2], length, phrases.shape[1]), bool)  # [B, K, T, Q]: whether a phrase begins here
    for place in range(longest):
        wanted = phrases[:, None, None, :, place]
        here &= (tokens[:, :, place : place + length, None] == wanted) | (wanted == ANY)
    inside = jnp.arange(length)[None, :, None] + sizes[:, None, :] <= steps[:, None, None]  # [B, T, Q]
    return jnp.any(here & inside[:, None], axis=2) | (sizes == 0)[:, None, :]


def begun_phrases(tail: Int[Array, "B M P"], phrases: Int[Array, "B Q P"]) -> Int[Array, "B M Q"]:
    """Returns how many first tokens of each phrase stand at the end of `tail`: the largest such number, or 0."""
    longest = phrases.shape[2]
    sizes = jnp.sum(phrases != ANY, axis=2)[:, None, :]
    most = jnp.zeros((*tail.shape[:2], phrases.shape[1]), jnp.int32)
    for size in range(1, longest + 1):
        same = jnp.all(tail[:, :, None, longest - size :] == phrases[:, None, :, :size], axis=3)
        most = jnp.where(same & (size <= sizes), size, most)
    return most


def allocate_beam(
    scores: Float[Array, "B M"], banks: Int[Array, "B M"], most: Int[Array, "B"], beams: int
) -> Int[Array, "B M"]:
    """Returns the candidates in the order in which they take places of a beam; MASKED ones come last.

    Args:
        scores: scores of the candidates.
        banks: banks of the candidates, from 0 to `most`.
        most: number of tokens of all phrases.
        beams: number of places. Banks share them equally; the highest bank gets the remainder.

    Example: scores [-1, -2, -3, -4] in banks [0, 0, 1, 1] and 2 places give [2, 0, 3, 1].
    """
    order = jnp.lexsort((-scores, banks), axis=-1)  # bank by bank, the best first
    ordered = jnp.take_along_axis(banks, order, axis=1)
    number = jnp.arange(scores.shape[1])[None, :]
    first = jnp.pad(ordered[:, 1:] != ordered[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    ranks = number - jax.lax.cummax(jnp.where(first, number, 0), axis=1)  # within the bank
    rank = jnp.zeros_like(ranks).at[jnp.arange(len(order))[:, None], order].set(ranks)
    shares = (most + 1)[:, None]
    share = beams // shares + jnp.where(banks == most[:, None], beams % shares, 0)
    turn = jnp.where(is_possible(scores), jnp.where(rank < share, 0, 1), 2)
    return jnp.lexsort((rank, -banks, turn), axis=-1)


@array_tree
@dataclasses.dataclass(frozen=True)
class LexicalConstraints:
    """Selects candidates so that finished outputs contain the phrases of their sentence (a `CandidateSelector`).

    Attributes:
        phrases: [N, Q, P], `ANY` after each phrase's end; a phrase of `ANY` alone is empty.
        end_token: token that ends a hypothesis.
    """

    phrases: Int[Array, "N Q P"]
    end_token: int = static_field()

    def __call__(
        self,
        live_scores: Float[Array, "B K"],
        logits: Float[Array, "B K V"],
        num: int,
        progress: Progress,
        processors: Sequence[LogitsProcessor],
        excluded: tuple[int, ...] = (),
    ) -> Candidates:
        """Returns the first `num` candidates in the order of `allocate_beam`."""
        slots, beams, vocab_size = logits.shape
        phrases = jnp.take(self.phrases, progress.sentences, axis=0, mode="clip")  # [B, Q, P]
        sizes = jnp.sum(phrases != ANY, axis=2)  # [B, Q]
        contained = contained_phrases(progress.tokens, progress.steps, phrases)
        tails = _last_tokens(progress, phrases.shape[2])

        log_probs = log_probabilities(logits)
        for processor in processors:
            log_probs = processor(log_probs, progress)
        token = jnp.arange(vocab_size)
        may_end = jnp.all(contained, axis=2)[:, :, None] | (token != self.end_token)[None, None, :]
        allowed = jnp.isin(token, jnp.array(excluded, jnp.int32), invert=True)[None, None, :]
        log_probs = jnp.where(may_end & allowed, log_probs, MASKED)

        # --- the most probable tokens of each beam, and those that continue a phrase
        likely_log_probs, likely = best_of_vocabulary(log_probs, min(num, vocab_size))
        wanted = _wanted_tokens(tails, phrases, sizes, contained)
        tokens = jnp.concatenate([likely, wanted], axis=2)
        token_log_probs = jnp.concatenate([likely_log_probs, _wanted_log_probs(log_probs, likely, wanted)], axis=2)
        parents = jnp.repeat(jnp.arange(beams), tokens.shape[2])
        tokens, token_log_probs = (
            jnp.maximum(tokens, 0).reshape(slots, -1),
            token_log_probs.reshape(slots, -1),
        )  # [B, M]
        scores = live_scores[:, parents] + token_log_probs
        scores = jnp.where(is_possible(token_log_probs) & is_possible(scores), scores, MASKED)

        # --- the bank of each candidate, and the allocation of the beam
        tail = jnp.concatenate([tails[:, parents, 1:], tokens[..., None]], axis=2)
        begun = begun_phrases(tail, phrases)  # [B, M, Q]
        now_contained = contained[:, parents] | (begun >= sizes[:, None, :])
        banks = jnp.sum(jnp.where(now_contained, sizes[:, None, :], 0), axis=2)
        banks = banks + jnp.max(jnp.where(now_contained, 0, begun), axis=2)
        order = allocate_beam(scores, banks, jnp.sum(sizes, axis=1), beams)[:, :num]

        def chosen(x: Array) -> Array:
            return jnp.take_along_axis(x, order, axis=1)

        parents = jnp.broadcast_to(parents[None, :], tokens.shape)
        return Candidates(chosen(scores), chosen(parents), chosen(tokens), chosen(token_log_probs))


def _last_tokens(progress: Progress, num: int) -> Int[Array, "B K P"]:
    """Returns the last `num` tokens of each hypothesis, `NOTHING` before its beginning."""
    slots, beams, _ = progress.tokens.shape
    place = progress.steps[:, None] - jnp.arange(num, 0, -1)[None, :]  # [B, P]
    place = jnp.broadcast_to(place[:, None, :], (slots, beams, num))
    tails = jnp.take_along_axis(progress.tokens, jnp.maximum(place, 0), axis=2)
    return jnp.where(place < 0, NOTHING, tails)


def _wanted_tokens(
    tails: Int[Array, "B K P"],
    phrases: Int[Array, "B Q P"],
    sizes: Int[Array, "B Q"],
    contained: Bool[Array, "B K Q"],
) -> Int[Array, "B K Q"]:
    """Returns the token that continues each phrase of `sizes` tokens; `ANY` for a phrase that is contained."""
    slots, beams, longest = tails.shape
    begun = begun_phrases(tails, phrases)  # [B, K, Q]
    following = jnp.take_along_axis(
        jnp.broadcast_to(phrases[:, None], (slots, beams, *phrases.shape[1:])),
        jnp.minimum(begun, longest - 1)[..., None],
        axis=3,
    )[..., 0]
    return jnp.where(contained | (begun >= sizes[:, None, :]), ANY, following)


def _wanted_log_probs(
    log_probs: Float[Array, "B K V"], likely: Int[Array, "B K M"], wanted: Int[Array, "B K Q"]
) -> Float[Array, "B K Q"]:
    """Returns log-probabilities of the wanted tokens, MASKED for those that `likely` or `wanted` has before."""
    others = jnp.concatenate([likely, wanted], axis=2)
    number = jnp.arange(others.shape[2])
    left = (number[None, :] < number[likely.shape[2] :, None])[None, None]
    again = jnp.any((wanted[..., None] == others[:, :, None, :]) & left, axis=3)
    wanted_log_probs = jnp.take_along_axis(log_probs, jnp.maximum(wanted, 0), axis=2)
    return jnp.where(again | (wanted == ANY), MASKED, wanted_log_probs)
