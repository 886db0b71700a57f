"""A beam search as a tree: advanced one step at a time, and drawn."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from figures import pyplot
from palette import GOOD, GREY, INK, LIGHT, SOURCE

from flax_transformer import BeamSearchConfig, DecoderFunctions
from flax_transformer.decoding import beam_search as search

IMPOSSIBLE = -20.0  # log-probability below which a candidate is none
LONGEST_WORD = 8  # letters of a word that fit into the tree
Prefix = tuple[int, ...]
STYLES = {"live": (SOURCE, "lives on"), "finished": (GOOD, "finished"), "pruned": (GREY, "pruned")}


@dataclasses.dataclass(frozen=True)
class Node:
    """A hypothesis that was a candidate.

    Attributes:
        log_prob: its log-probability.
        fate: key of `STYLES`.
    """

    log_prob: float
    fate: str


def search_tree(functions: DecoderFunctions, config: BeamSearchConfig, decoder: Any) -> dict[Prefix, Node]:
    """Returns all candidates of a search for one sentence, by their tokens.

    The tree is read from the state of the search between its steps.

    Args:
        functions, config: the search.
        decoder: state of the decoder, with one slot.
    """
    nodes: dict[Prefix, Node] = {}
    state = search.start(functions, config, decoder, jnp.array([config.max_length]))
    advance = jax.jit(lambda state: search.advance(functions, config, state, 1))
    read = jax.jit(lambda tokens, decoder: functions.step(tokens, decoder)[0])
    while search.is_running(state):
        before, state = state, advance(state)
        step, scores = int(before.steps[0]), np.asarray(before.live.scores[0])
        buffer = np.asarray(before.live.buffer.tokens[0])
        last = buffer[:, step - 1] if step else np.full(config.beam_size, config.start_token)
        log_probs = jax.nn.log_softmax(read(jnp.asarray(last)[None], before.decoder)[0])  # [K, V]
        totals = np.where(scores[:, None] > -1e20, scores[:, None] + np.asarray(log_probs), -np.inf)
        live = {tuple(row[: step + 1]) for row in np.asarray(state.live.buffer.tokens[0]).tolist()}
        for number, place in enumerate(np.argsort(-totals, axis=None)[: 2 * config.beam_size]):
            beam, token = np.unravel_index(place, totals.shape)
            if totals[beam, token] < IMPOSSIBLE:
                continue
            prefix = (*buffer[beam, :step].tolist(), int(token))
            if token == config.end_token:
                fate = "finished" if number < config.beam_size else "pruned"
            else:
                fate = "live" if prefix in live else "pruned"
            nodes[prefix] = Node(float(totals[beam, token]), fate)
    return nodes


def draw_tree(
    nodes: dict[Prefix, Node], words: Sequence[str], best: Sequence[int], title: str, least: float = 0.0
) -> None:
    """Draws a tree of hypotheses.

    Args:
        nodes: candidates, from `search_tree`.
        words: the word of each token; entry 0 is written at the root.
        best: tokens of the search's result, which is drawn bold.
        title: above the picture.
        least: probability below which pruned candidates are left out.
    """
    nodes = {p: n for p, n in nodes.items() if n.fate != "pruned" or np.exp(n.log_prob) >= least}
    children: dict[Prefix, list[Prefix]] = {}
    for prefix in sorted(nodes, key=lambda prefix: -nodes[prefix].log_prob):
        children.setdefault(prefix[:-1], []).append(prefix)
    heights: dict[Prefix, float] = {}
    leaves = iter(range(len(nodes)))

    def place(prefix: Prefix) -> float:
        below = [place(child) for child in children.get(prefix, [])]
        heights[prefix] = float(np.mean(below)) if below else -float(next(leaves))
        return heights[prefix]

    place(())
    depth = max(map(len, nodes))
    count = sum(prefix not in children for prefix in nodes)
    _, axes = pyplot.subplots(figsize=(min(9.6, 1.6 + 1.5 * depth), 1.3 + 0.5 * count))
    axes.set_axis_off()
    axes.set(xlim=(-0.3, depth + 0.55), ylim=(-count - 0.3, 0.6))
    axes.set_title(title)
    best_prefixes = {tuple(best[:length]) for length in range(1, len(best) + 1)}
    for prefix, node in nodes.items():
        parent, x, y = prefix[:-1], len(prefix), heights[prefix]
        colour = STYLES[node.fate][0]
        bold = prefix in best_prefixes
        line = {"color": INK if bold else LIGHT, "linewidth": 2.4 if bold else 1.2, "zorder": 1}
        start, end = len(parent) + 0.24, x - 0.24
        axes.plot([start, (start + end) / 2, end], [heights[parent], y, y], **line)
        branch = node.log_prob - (nodes[parent].log_prob if parent else 0.0)
        axes.text(end - 0.02, y + 0.08, f"{np.exp(branch):.2f}", ha="right", va="bottom", fontsize=8, color=GREY)
        word = words[prefix[-1]]
        word = word if len(word) <= LONGEST_WORD else word[: LONGEST_WORD - 1] + "…"
        axes.text(
            x, y, word, ha="center", va="center", color=colour, weight="bold" if bold else "normal",
            bbox={"boxstyle": "round,pad=0.3", "facecolor": "white", "edgecolor": colour}, zorder=2,
        )  # fmt: skip
        axes.text(x, y - 0.42, f"{node.log_prob:.2f}", ha="center", va="center", fontsize=8, color=colour)
    box = {"boxstyle": "round,pad=0.3", "facecolor": "white"}
    axes.text(0, heights[()], words[0], ha="center", va="center", color=INK, bbox=box)
    handles = [
        pyplot.Line2D([], [], marker="s", linestyle="", color=colour, label=name) for colour, name in STYLES.values()
    ]
    axes.legend(handles=handles, loc="lower left", ncols=3, bbox_to_anchor=(0, -0.02))
