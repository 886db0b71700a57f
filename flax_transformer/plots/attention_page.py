"""Views of translations as one HTML page, which needs no network and no other file."""

import base64
import html
import json
import math
import string
import unicodedata
from collections.abc import Sequence
from importlib import resources
from typing import Any

import numpy as np

from flax_transformer.decoding.beam_tree import BeamTree
from flax_transformer.inference.attention_view import AttentionView
from flax_transformer.inference.translation import Hypothesis
from flax_transformer.plots.picture import literal

# Narrow letters of a text that the page shows; longer ones are cut.
MOST_COLUMNS = 4_000


def attention_page(views: Sequence[AttentionView], run: str, model: str, note: str) -> str:
    """Returns the page.

    Texts are data of the page, and its script puts them in as text. So no text can become markup.

    Args:
        views: one or more sentences.
        run: name of the run.
        model: the model in a few words.
        note: sentence about the pictures that the page has.
    """
    files = resources.files("flax_transformer.plots").joinpath("page")
    parts = {name: files.joinpath(f"attention.{name}").read_text(encoding="utf-8") for name in ("html", "css", "js")}
    data = {"run": _shown(run), "model": model, "note": note, "sentences": [_sentence(view) for view in views]}
    return string.Template(parts["html"]).substitute(
        title=html.escape(f"Attention: {_shown(run)}"),
        style=parts["css"],
        script=parts["js"],
        data=as_json(data),
    )


def as_json(data: Any) -> str:
    r"""Returns JSON for the inside of an element `script`: "<" and "&" are escaped, so that nothing ends it.

    Example:
        >>> as_json("</script>")
        '"\\u003c/script>"'
    """
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return (
        text.replace("<", "\\u003c").replace("&", "\\u0026").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    )


def text_direction(text: str) -> str:
    """Returns "rtl" if the first strong letter of a text is of a script that is written from right to left.

    References:
        Unicode Standard Annex 9, rules P2 and P3.
    """
    for letter in text:
        kind = unicodedata.bidirectional(letter)
        if kind in ("L", "R", "AL"):
            return "ltr" if kind == "L" else "rtl"
    return "ltr"


def _shown(text: str) -> str:
    return literal(text, MOST_COLUMNS)


def _sentence(view: AttentionView) -> dict[str, Any]:
    translation, weights = view.translation, view.weights
    best = translation.hypotheses[0]
    kinds = {"encoder": weights.encoder, "decoder": weights.decoder, "cross": weights.cross}
    return {
        "text": _shown(view.sentence),
        "direction": text_direction(view.sentence),
        "targetDirection": text_direction(best.text),
        "source": [_shown(piece) for piece in view.source],
        "target": [_shown(piece) for piece in view.target],
        "start": _shown(view.start),
        "end": _shown(view.end),
        "kinds": {name: _array(found) for name, found in kinds.items() if found is not None},
        "sourceWords": _words(view.sentence),
        "targetWords": _words(best.text),
        "alignment": view.alignment,
        "hypotheses": [_hypothesis(each) for each in translation.hypotheses],
        "tree": _tree(view.tree, view.tree_pieces),
    }


def _words(text: str) -> list[str]:
    return [_shown(word) for word in text.split(" ") if word]


def _array(values: np.ndarray) -> dict[str, Any]:
    """Returns an array as its shape, and its numbers of 32 bits in base64."""
    content = np.ascontiguousarray(values, dtype="<f4").tobytes()
    return {"shape": list(values.shape), "values": base64.b64encode(content).decode()}


def _hypothesis(hypothesis: Hypothesis) -> dict[str, Any]:
    return {
        "text": _shown(hypothesis.text),
        "score": hypothesis.score,
        "finished": hypothesis.finished,
        "tokens": [_shown(piece) for piece in hypothesis.tokens],
        "probabilities": [math.exp(log_prob) for log_prob in hypothesis.token_scores],
    }


def _tree(tree: BeamTree, pieces: list[str]) -> dict[str, Any]:
    nodes = [
        {
            "step": node.step,
            "place": node.place,
            "parent": node.parent,
            "token": _shown(piece),
            "logProb": node.log_prob,
            "total": node.total,
            "fate": node.fate,
            "score": node.score,
            "rank": node.rank,
        }
        for node, piece in zip(tree.nodes, pieces, strict=True)
    ]
    return {"beamSize": tree.beam_size, "nodes": nodes}
