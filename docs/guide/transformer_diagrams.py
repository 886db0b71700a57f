"""Pictures of the Transformer: the data flow of its encoder and decoder, and of one attention."""

from diagrams import Box, Diagram, code_line
from palette import ATTENTION, GREY, SOURCE, TARGET

from flax_transformer.models.encoder_decoder import EncoderDecoder
from flax_transformer.models.seq2seq import shift_right
from flax_transformer.models.transformer import DecoderLayer, EncoderLayer
from flax_transformer.nn.attention import MultiHeadAttention
from flax_transformer.nn.embedding import InputEmbedding
from flax_transformer.ops.attention import attention_weights, masked_softmax, reference_attention

LEFT, WIDTH, RIGHT = 110, 290, 425  # the column of boxes, and where its notes begin


def encoder() -> Diagram:
    """Returns the data flow of the encoder. It is long, since each part of the picture is a call."""
    d = Diagram(720, 640, "Data flow of the Transformer's encoder, from token ids to one vector for each token.")
    d.frame(60, 214, 645, 330, "L layers, each with its own parameters")
    ids = d.box(LEFT, 10, "token ids", kind="data", width=WIDTH)
    table = _step(d, 72, "token vectors", "embedding(tokens)", InputEmbedding.__call__, "embedding(tokens)")
    positions = _step(
        d, 147, "add positions", "vectors + self.positions(...)", InputEmbedding.__call__, "self.positions(positions)"
    )
    attention = _step(
        d,
        244,
        "self-attention",
        "attend(self_attention, inner)",
        EncoderLayer.__call__,
        "attend(self.self_attention, inner",
        kind="attention",
    )
    first = _step(
        d,
        319,
        "add and norm",
        "self_attention_residual.leave(x, update)",
        EncoderLayer.__call__,
        "self.self_attention_residual.leave",
    )
    feed = _step(
        d,
        404,
        "feed-forward",
        "feed_forward.hidden(inner)",
        EncoderLayer.__call__,
        "self.feed_forward.hidden(inner",
        kind="source",
    )
    second = _step(
        d,
        479,
        "add and norm",
        "feed_forward_residual.leave(x, update)",
        EncoderLayer.__call__,
        "self.feed_forward_residual.leave",
    )
    output = d.box(LEFT, 580, "encoder output", kind="source", width=WIDTH)
    _flow(d, [ids, table, positions, attention, first, feed, second, output], SOURCE)
    for start, end, shape in (
        (ids, table, "[B, S]"),
        (table, positions, "[B, S, D]"),
        (positions, attention, "[B, S, D]"),
        (first, feed, "[B, S, D]"),
        (second, output, "[B, S, D]"),
    ):
        _shape(d, start, end, shape)
    _skip(d, positions, first, 34)
    _skip(d, first, second)
    _note(d, table, "a row of a table, for each id")
    _note(d, positions, "sines and cosines say where a token is")
    _note(d, attention, "each token collects from all tokens")
    _note(d, first, "x + update, then mean 0 and variance 1")
    _note(d, feed, "[B, S, F]: each token by itself")
    _note(d, second, "the output of one layer, input of the next")
    return d


def decoder() -> Diagram:
    """Returns the data flow of the decoder. It is long, since each part of the picture is a call."""
    d = Diagram(720, 860, "Data flow of the Transformer's decoder, from target ids and encoder output to logits.")
    d.frame(60, 209, 645, 475, "L layers, each with its own parameters")
    ids = d.box(LEFT, 10, "target ids", kind="data", width=WIDTH)
    shifted = _step(d, 72, "shift right", "shift_right(target_tokens, ...)", shift_right, "jnp.pad(tokens[:, :-1]")
    inputs = _step(
        d,
        142,
        "token vectors, add positions",
        "self.input(embedding, inputs)",
        InputEmbedding.__call__,
        "embedding(tokens)",
    )
    layer = DecoderLayer.__call__
    own = _step(
        d,
        240,
        "masked self-attention",
        "attend_self(self_attention, inner)",
        layer,
        "attend_self(self.self_attention, inner",
        kind="attention",
    )
    first = _step(
        d, 310, "add and norm", "self_attention_residual.leave(...)", layer, "self.self_attention_residual.leave"
    )
    cross = _step(
        d,
        395,
        "cross-attention",
        "attend_source(cross_attention, inner)",
        layer,
        "attend_source(self.cross_attention, inner",
        kind="attention",
    )
    second = _step(
        d, 465, "add and norm", "cross_attention_residual.leave(...)", layer, "self.cross_attention_residual.leave"
    )
    feed = _step(
        d, 550, "feed-forward", "feed_forward.hidden(inner)", layer, "self.feed_forward.hidden(inner", kind="target"
    )
    third = _step(d, 620, "add and norm", "feed_forward_residual.leave(...)", layer, "self.feed_forward_residual.leave")
    projection = _step(
        d,
        725,
        "output projection",
        "model.output_projection().logits(hidden)",
        EncoderDecoder.output_projection,
        "return OutputProjection(",
    )
    logits = d.box(LEFT, 812, "logits: a score for each token", kind="target", width=WIDTH)
    _flow(d, [ids, shifted, inputs, own, first, cross, second, feed, third, projection, logits], TARGET)
    for start, end, shape in (
        (ids, shifted, "[B, T]"),
        (shifted, inputs, "[B, T]"),
        (inputs, own, "[B, T, D]"),
        (first, cross, "[B, T, D]"),
        (second, feed, "[B, T, D]"),
        (third, projection, "[B, T, D]"),
        (projection, logits, "[B, T, V]"),
    ):
        _shape(d, start, end, shape)
    _skip(d, inputs, first, 38)
    _skip(d, first, second)
    _skip(d, second, third)
    encoded = d.box(RIGHT + 85, 388, "encoder output", kind="source", width=140)
    y = cross.at("right")[1]
    d.arrow((RIGHT + 85, y), (LEFT + WIDTH, y), "[B, S, D]", colour=SOURCE, width=2.4, beside=(0, -9), anchor="middle")
    d.text(RIGHT + 155, encoded.y + 50, "its keys and values", colour=SOURCE)
    _note(d, shifted, "a position reads the token before it")
    _note(d, inputs, "as in the encoder")
    _note(d, own, "a token sees itself and earlier ones")
    _note(d, first, "x + update, then the norm")
    _note(d, second, "queries come from the target")
    _note(d, feed, "each token by itself")
    _note(d, projection, "inner product with each token's vector")
    return d


def attention() -> Diagram:
    """Returns the data flow inside one multi-head attention. It is long, since each part of the picture is a call."""
    d = Diagram(720, 500, "Inside an attention: queries, keys and values, scores, mask, softmax, sum, output.")
    x = d.box(40, 10, "x: who asks", kind="target", width=170)
    d.box(330, 10, "encoded: who is asked", kind="source", width=250)
    attend = MultiHeadAttention.attend
    query = d.box(
        40, 85, "query", kind="target", code="self.query", link=code_line(attend, "projection(self.query)"), width=170
    )
    key = d.box(
        285, 85, "key", kind="source", code="self.key", link=code_line(attend, "projection(self.key)"), width=140
    )
    value = d.box(
        480, 85, "value", kind="source", code="self.value", link=code_line(attend, "projection(self.value)"), width=140
    )
    d.arrow(x.at("bottom"), query.at("top"), "[B, T, D]", colour=TARGET)
    for box in (key, value):
        top = (box.at("top")[0], 41)
        d.arrow(top, box.at("top"), "[B, S, D]", colour=SOURCE)
    scores = d.box(
        110,
        185,
        "scores: inner products / √H",
        kind="attention",
        code='einsum("btnh,bsnh->bnts", ...)',
        link=code_line(attention_weights, "btnh,bsnh->bnts"),
        width=260,
    )
    d.arrow(query.at("bottom"), (125, 185), "[B, T, N, H]", colour=TARGET)
    d.arrow(key.at("bottom"), (355, 185), "[B, S, N, H]", colour=SOURCE)
    masked = d.box(
        110,
        270,
        "mask, then softmax",
        kind="attention",
        code="masked_softmax(scores, mask)",
        link=code_line(masked_softmax, "jnp.where(mask, scores"),
        width=260,
    )
    d.arrow(scores.at("bottom"), masked.at("top"), "[B, N, T, S]", colour=ATTENTION)
    total = d.box(
        240,
        355,
        "weighted sum of the values",
        kind="attention",
        code='einsum("bnts,bsnh->btnh", ...)',
        link=code_line(reference_attention, "bnts,bsnh->btnh"),
        width=260,
    )
    d.arrow(
        (300, masked.y + masked.height),
        (300, 355),
        "weights [B, N, T, S]",
        colour=ATTENTION,
        beside=(-8, 4),
        anchor="end",
    )
    d.arrow((550, value.y + value.height), (460, 355), "[B, S, N, H]", via=((550, 325), (460, 325)), colour=SOURCE)
    output = d.box(
        240,
        440,
        "output projection",
        code="self.output(...)",
        link=code_line(MultiHeadAttention.__call__, "self.output("),
        width=260,
    )
    d.arrow(total.at("bottom"), output.at("top"), "[B, T, N, H]", colour=ATTENTION)
    d.arrow(output.at("right"), (620, output.at("right")[1]), "[B, T, D]", colour=TARGET, beside=(-10, -9))
    return d


def _step(d: Diagram, y: float, text: str, code: str, function, line: str, kind: str = "plain") -> Box:
    return d.box(LEFT, y, text, kind=kind, code=code, link=code_line(function, line), width=WIDTH)


def _flow(d: Diagram, boxes: list[Box], colour: str) -> None:
    for start, end in zip(boxes, boxes[1:], strict=False):
        d.line(start.at("bottom"), end.at("top"), colour=colour)


def _shape(d: Diagram, start: Box, end: Box, shape: str) -> None:
    y = (start.y + start.height + end.y) / 2 + 4
    d.text(LEFT + WIDTH / 2 + 10, y, shape, anchor="start", colour=GREY)


def _skip(d: Diagram, start: Box, end: Box, gap: float = 10) -> None:
    """Adds the residual connection around a sub-layer: from below a box to another box, on the left."""
    middle, below = LEFT + WIDTH / 2, start.y + start.height + gap
    y = end.at("left")[1]
    d.line((middle, below), (LEFT - 28, below), (LEFT - 28, y), (LEFT, y), colour=GREY, width=1.4)


def _note(d: Diagram, box: Box, text: str) -> None:
    d.text(RIGHT, box.at("right")[1] + 4, text, anchor="start", colour=GREY)
