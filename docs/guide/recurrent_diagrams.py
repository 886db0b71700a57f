"""Pictures of the recurrent model: without attention, and with it."""

from diagrams import Diagram, code_line
from palette import ATTENTION, SOURCE, TARGET

from flax_transformer.models.recurrent import Bridge, RecurrentEncoder
from flax_transformer.models.recurrent_decoder import RecurrentDecoder
from flax_transformer.nn.recurrent_attention import attend

SOURCE_TOKENS, TARGET_TOKENS = ["four", "hundred", "two", "</s>"], ["<s>", "vier", "hundert", "zwei"]
OUTPUTS = ["vier", "hundert", "zwei", "</s>"]


def one_vector() -> Diagram:
    """Returns the picture of a model whose encoder hands on its last state alone."""
    d = Diagram(720, 190, "A recurrent encoder reads four words; its last state alone starts the decoder.")
    cells, decoder = _encoder(d, y=80), _decoder(d, y=80)
    link = code_line(Bridge.__call__, "encoder_states[min(")
    bridge = d.box(326, 78, "one vector", kind="attention", code="Bridge", link=link, width=92)
    d.line(cells[-1].at("right"), bridge.at("left"), colour=ATTENTION, width=2.4)
    d.line(bridge.at("right"), decoder[0].at("left"), colour=ATTENTION, width=2.4)
    d.text(372, 66, "[B, U]", colour=ATTENTION)
    d.text(150, 42, "encoder: h' = cell(h, word)", colour=SOURCE)
    return d


def with_attention() -> Diagram:
    """Returns the picture of one decoder step with attention."""
    d = Diagram(720, 370, "The decoder's state is scored against each encoder state; softmax weights sum them.")
    cells = _encoder(d, y=250)
    scores = d.box(
        40,
        130,
        "scores, softmax: weights [B, 1, S]",
        kind="attention",
        code="masked_softmax(scores, mask)",
        link=code_line(attend, "masked_softmax"),
        width=270,
    )
    total = d.box(
        40,
        10,
        "weighted sum: context [B, 1, U]",
        kind="attention",
        code="weighted_sums(weights, states)",
        link=code_line(attend, "weighted_sums"),
        width=270,
    )
    for cell, weight in zip(cells, (0.06, 0.08, 0.80, 0.06), strict=True):
        x = cell.at("top")[0]
        d.line(cell.at("top"), (x, scores.at("bottom")[1]), colour=SOURCE)
        d.line((x, scores.y), (x, total.y + total.height), colour=ATTENTION, width=1 + 4 * weight)
        d.text(x, 92, f"{weight:.2f}", colour=ATTENTION)
    d.text(168, 218, "states [B, S, U]", colour=SOURCE)
    state = d.box(420, 130, "decoder state s  [B, 1, U]", kind="target", width=190)
    y = state.at("left")[1]
    d.arrow((420, y), (310, y), "query", colour=TARGET, beside=(0, -8), anchor="middle")
    cell = d.box(
        420,
        250,
        "cell reads [token; context]",
        kind="target",
        code="step(state, gates)",
        link=code_line(RecurrentDecoder.run_layers, "step(states[0], gates)"),
        width=190,
    )
    y = cell.at("right")[1]
    d.line(total.at("right"), (670, total.at("right")[1]), (670, y), cell.at("right"), colour=ATTENTION, width=2.4)
    d.text(480, 24, "joined to the decoder's input", colour=ATTENTION)
    d.line(cell.at("top"), state.at("bottom"), colour=TARGET)
    d.text(523, 218, "the next s", anchor="start", colour=TARGET)
    token = d.box(455, 328, "hundert", kind="data", width=120, height=30)
    d.arrow(token.at("top"), cell.at("bottom"), colour=TARGET)
    return d


def _encoder(d: Diagram, y: float) -> list:
    cells = []
    for number, token in enumerate(SOURCE_TOKENS):
        x = 16 + 76 * number
        cell = d.box(
            x,
            y,
            f"h{number + 1}",
            kind="source",
            link=code_line(RecurrentEncoder.__call__, "run_over_time("),
            width=54,
            height=44,
        )
        word = d.box(x - 8, y + 78, token, kind="data", width=70, height=30)
        d.arrow(word.at("top"), cell.at("bottom"), "[B, D]" if number == 0 else "", colour=SOURCE)
        if cells:
            d.line(cells[-1].at("right"), cell.at("left"), colour=SOURCE)
        cells.append(cell)
    return cells


def _decoder(d: Diagram, y: float) -> list:
    cells = []
    for number, (token, output) in enumerate(zip(TARGET_TOKENS, OUTPUTS, strict=True)):
        x = 444 + 70 * number
        cell = d.box(
            x,
            y,
            f"s{number + 1}",
            kind="target",
            link=code_line(RecurrentDecoder.run_layers, "step(states[0], gates)"),
            width=54,
            height=44,
        )
        word = d.box(x - 6, y + 78, token, kind="data", width=66, height=30)
        d.line(word.at("top"), cell.at("bottom"), colour=TARGET)
        made = d.box(x - 6, y - 70, output, kind="data", width=66, height=30)
        d.line(cell.at("top"), made.at("bottom"), colour=TARGET)
        if cells:
            d.line(cells[-1].at("right"), cell.at("left"), colour=TARGET)
        cells.append(cell)
    return cells
