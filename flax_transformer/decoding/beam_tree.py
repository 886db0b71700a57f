"""The tree of a beam search: every hypothesis that lived or ended, and what became of it.

The tree is read from the states between the steps of a search (see `beam_search`). It changes nothing in the search.
A state has the hypotheses that were chosen, and not the candidates that lost. So the tree ends where the beam ended.

Legend: K beams, T maximum length.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

import jax
import numpy as np

from flax_transformer.decoding.beam_state import BeamState
from flax_transformer.decoding.hypotheses import Hypotheses
from flax_transformer.shapes import is_possible

# What became of a hypothesis. An "extended" one has children, and a "pruned" one has none, since better ones filled the
# beam. A "finished" one is a result that ended. Better ones "displaced" another that had ended. A "cut" one is a result
# that reached the maximum length. An "open" one was unfinished when the search ended, and is no result.
Fate = Literal["extended", "pruned", "open", "cut", "finished", "displaced"]


@dataclass(frozen=True)
class BeamNode:
    """A hypothesis, at the step that added its last token.

    Attributes:
        step: number of its tokens, at least 1.
        place: its place in the beam after this step, best first; among the finished ones of this step if it ended.
        parent: index of the node that it extends; None if it has one token.
        token: id of its last token.
        log_prob: log-probability of this token, in nats.
        total: log-probability of all its tokens, in nats.
        fate: what became of it.
        score: score of a result, as in `Hypotheses`; also of a displaced hypothesis. None for others.
        rank: place among the results of the search, 0 for the best; None if it is no result.
    """

    step: int
    place: int
    parent: int | None
    token: int
    log_prob: float
    total: float
    fate: Fate = "pruned"
    score: float | None = None
    rank: int | None = None


@dataclass(frozen=True)
class BeamTree:
    """The tree of a search for one sentence.

    Attributes:
        beam_size: number of live hypotheses at each step, K.
        nodes: hypotheses in the order of their steps, so parents come first.
    """

    beam_size: int
    nodes: list[BeamNode]

    def tokens(self, index: int) -> list[int]:
        """Returns all tokens of a node's hypothesis."""
        found, at = [], index
        while at is not None:
            found.append(self.nodes[at].token)
            at = self.nodes[at].parent
        return found[::-1]


@dataclass
class TreeRecorder:
    """Records the tree of a search that advances one step at a time.

    Attributes:
        slot: slot of the sentence. It must not change while the sentence is searched.

    Example:
        >>> from flax_transformer.decoding.beam_search import BeamSearchConfig, advance, finish, is_running, start
        >>> from flax_transformer import DecoderFunctions, LengthPenalty
        >>> chain = jnp.array([[-9.0, -9.0, 3.0], [0.0, 0.0, 0.0], [-9.0, 3.0, 2.0]])
        >>> functions = DecoderFunctions(lambda tokens, _: (chain[tokens], None, None), lambda s, _: s, lambda s, *_: s)
        >>> config = BeamSearchConfig(2, 1, 4, start_token=0, end_token=1, length_penalty=LengthPenalty.parse("none"))
        >>> state, recorder = start(functions, config, None, jnp.array([4])), TreeRecorder()
        >>> while is_running(state):
        ...     state = advance(functions, config, state, 1)
        ...     recorder.add(state)
        >>> tree = recorder.tree(finish(config, state), 0)
    """

    slot: int = 0
    _nodes: list[BeamNode] = field(default_factory=list, init=False)
    _beam_size: int = field(default=0, init=False)
    _live: dict[tuple[int, ...], int] = field(default_factory=dict, init=False)
    _ended: dict[tuple[int, ...], int] = field(default_factory=dict, init=False)

    def add(self, state: BeamState) -> None:
        """Records the state after a step of the sentence in the slot."""
        of_slot = jax.device_get(jax.tree.map(lambda x: x[self.slot], (state.steps, state.live, state.finished)))
        step, live, finished = int(of_slot[0]), of_slot[1], of_slot[2]
        before, self._live, self._beam_size = self._live, {}, len(live.scores)
        for beam in np.flatnonzero(is_possible(live.scores)):
            tokens = tuple(live.buffer.tokens[beam, :step].tolist())
            log_prob, total = float(live.buffer.log_probs[beam, step - 1]), float(live.scores[beam])
            self._live[tokens] = len(self._nodes)
            self._nodes.append(BeamNode(step, int(beam), before.get(tokens[:-1]), tokens[-1], log_prob, total))
        place = 0
        for beam in np.flatnonzero(finished.lengths == step):
            tokens = tuple(finished.buffer.tokens[beam, :step].tolist())
            log_probs, score = finished.buffer.log_probs[beam, :step], float(finished.scores[beam])
            self._ended[tokens] = len(self._nodes)
            total = float(log_probs.sum(dtype=np.float32))
            node = BeamNode(step, place, before.get(tokens[:-1]), tokens[-1], float(log_probs[-1]), total)
            self._nodes.append(dataclasses.replace(node, fate="displaced", score=score))
            place += 1

    def tree(self, found: Hypotheses, row: int, num_hypotheses: int | None = None) -> BeamTree:
        """Returns the tree.

        Args:
            found: results of the search, after the last recorded step.
            row: row of the sentence.
            num_hypotheses: number of results that get a rank; None ranks all.
        """
        nodes = list(self._nodes)
        for parent in {node.parent for node in nodes if node.parent is not None}:
            nodes[parent] = dataclasses.replace(nodes[parent], fate="extended")
        for index in self._live.values():
            nodes[index] = dataclasses.replace(nodes[index], fate="open")
        lengths, scores, tokens, finished = jax.device_get(
            (found.lengths[row], found.scores[row], found.tokens[row], found.finished[row])
        )
        for rank in np.flatnonzero(lengths > 0)[:num_hypotheses].tolist():
            of = self._ended if finished[rank] else self._live
            index = of[tuple(tokens[rank, : lengths[rank]].tolist())]
            fate: Fate = "finished" if finished[rank] else "cut"
            nodes[index] = dataclasses.replace(nodes[index], fate=fate, score=float(scores[rank]), rank=rank)
        return BeamTree(self._beam_size, nodes)
