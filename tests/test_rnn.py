"""The recurrent models: cells and attention against NumPy, and the properties that every model must have."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flax_transformer import backend
from flax_transformer.config.reading import from_dict
from flax_transformer.config.recipe import Config
from flax_transformer.decoding.beam_search import BeamSearchConfig, beam_search
from flax_transformer.decoding.decoder_functions import DecoderFunctions
from flax_transformer.decoding.length_penalty import LengthPenalty
from flax_transformer.errors import ConfigError
from flax_transformer.inference.prepare import is_quantized, prepared_model, quantized_params
from flax_transformer.models.build import build_model
from flax_transformer.models.recurrent_config import RecurrentConfig
from flax_transformer.models.seq2seq import Seq2Seq, reorder_beams, shift_right
from flax_transformer.nn.recurrent import CELLS, run_over_time
from flax_transformer.nn.recurrent_attention import attend, make_attention
from flax_transformer.ops.int8_product import Int8Weights
from flax_transformer.parallel.sharding_rules import parameter_specs
from flax_transformer.shapes import Batch
from tests import tiny

FLOAT32 = jnp.dtype("float32")
DTYPES = {"param_dtype": FLOAT32, "compute_dtype": FLOAT32}
ONE_OP = {"rtol": 1e-5, "atol": 1e-5}
MODEL = {"rtol": 1e-4, "atol": 1e-4}

OPTIONS: dict[str, dict[str, Any]] = {
    "none": {"attention": "none"},
    "none_two_layers": {"attention": "none", "num_encoder_layers": 2, "num_decoder_layers": 3, "cell": "gru"},
    "one_way": {"attention": "none", "encoder_bidirectional": False, "num_encoder_layers": 2, "num_decoder_layers": 2},
    "bahdanau": {"attention": "additive", "cell": "gru"},
    "luong_dot": {"attention": "dot", "num_decoder_layers": 2},
    "luong_general_feeding": {"attention": "general", "input_feeding": True},
    "luong_concat_to_input": {"attention": "concat", "context_join": "input"},
    "additive_to_output": {"attention": "additive", "context_join": "output", "input_feeding": True, "cell": "gru"},
}
EACH = pytest.mark.parametrize("name", OPTIONS)


def model(name: str, **changes: Any) -> Any:
    values: dict[str, Any] = {
        "model_dim": 8,
        "hidden_dim": 12,
        "max_source_length": 32,
        "max_target_length": 24,
        "share_embeddings": "target_output",
    }
    config = RecurrentConfig(**(values | OPTIONS[name] | changes))
    return tiny.randomised(nnx.eval_shape(lambda: build_model(config, tiny.VOCABULARY, rngs=nnx.Rngs(0))), 0)


@jax.jit
def _hidden(of: Any, batch: Batch) -> jax.Array:
    return of(batch)


def hidden(of: Any, batch: Batch) -> np.ndarray:
    return np.asarray(_hidden(of, batch))


@jax.jit
def started(of: Any, batch: Batch) -> Any:
    """The state of a decoder with two beams before the first of eight steps."""
    memory = of.encode(batch.source_tokens, batch.source_positions, batch.source_segments)
    return of.init_decode_state(memory, 2, 8)


@jax.jit
def decode_step(of: Any, tokens: jax.Array, state: Any) -> Any:
    return of.decode_step(tokens, state)


def float64(x: Any) -> np.ndarray:
    return np.asarray(x, np.float64)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


# --- cells and attention by their equations


def cell_of(kind: str) -> Any:
    return tiny.randomised(nnx.eval_shape(lambda: CELLS[kind](3, 4, **DTYPES, rngs=nnx.Rngs(0))), 1)


def numpy_step(kind: str, cell: Any, state: list[np.ndarray], x: np.ndarray) -> list[np.ndarray]:
    kernel, recurrent = float64(cell.input_kernel[...]), float64(cell.recurrent_kernel[...])
    inputs = np.einsum("bi,igu->gbu", x, kernel) + float64(cell.bias[...])[:, None]
    from_state = np.einsum("bv,vgu->gbu", state[0], recurrent)
    if kind == "lstm":
        i, f, g, o = inputs + from_state
        memory = sigmoid(f) * state[1] + sigmoid(i) * np.tanh(g)
        return [sigmoid(o) * np.tanh(memory), memory]
    reset, update = sigmoid(inputs[0] + from_state[0]), sigmoid(inputs[1] + from_state[1])
    candidate = np.tanh(inputs[2] + reset * (from_state[2] + float64(cell.candidate_bias[...])))
    return [(1 - update) * candidate + update * state[0]]


@pytest.mark.parametrize("kind", ["lstm", "gru"])
@pytest.mark.parametrize("reverse", [False, True])
def test_a_layer_equals_its_equations_and_passes_over_padding(kind, reverse):
    cell = cell_of(kind)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 5, 3)), jnp.float32)
    lengths = [5, 2, 4]
    mask = jnp.arange(5)[None, :] < jnp.asarray(lengths)[:, None]
    run = jax.jit(lambda cell, x, mask: run_over_time(cell, x, mask, reverse=reverse))
    outputs, last = jax.device_get(run(cell, x, mask))
    for row, length in enumerate(lengths):
        state = [np.zeros((1, 4))] * len(last)
        for t in range(length)[:: -1 if reverse else 1]:
            state = numpy_step(kind, cell, state, float64(x)[row : row + 1, t])
            np.testing.assert_allclose(outputs[row, t], state[0][0], **ONE_OP)
        for found, expected in zip(last, state, strict=True):
            np.testing.assert_allclose(found[row], expected[0], **ONE_OP)


@pytest.mark.parametrize("kind", ["additive", "concat", "dot", "general"])
def test_attention_equals_its_equations(kind):
    alignment: Any = tiny.randomised(nnx.eval_shape(lambda: make_attention(kind, 4, **DTYPES, rngs=nnx.Rngs(0))), 2)
    rng = np.random.default_rng(1)
    query, states = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((2, 3, 4), (2, 5, 4)))
    mask = jnp.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], bool)
    attended = jax.jit(lambda alignment: attend(alignment.scores(query, alignment.keys(states)), states, mask))
    context, weights = jax.device_get(attended(alignment))
    q, h = float64(query), float64(states)
    for b, k in itertools.product(range(2), range(3)):
        if kind in ("additive", "concat"):
            mapped = q[b, k] @ float64(alignment.query.kernel[...])
            keys = h[b] @ float64(alignment.key.kernel[...]) + float64(alignment.key.bias[...])
            scores = np.tanh(mapped + keys) @ float64(alignment.vector[...])
        elif kind == "general":
            scores = (h[b] @ float64(alignment.key.kernel[...])) @ q[b, k]
        else:
            scores = h[b] @ q[b, k]
        expected = np.where(np.asarray(mask[b]), np.exp(scores), 0)
        expected /= expected.sum()
        np.testing.assert_allclose(weights[b, k], expected, **ONE_OP)
        np.testing.assert_allclose(context[b, k], expected @ h[b], **ONE_OP)


# --- the whole model


@EACH
def test_it_satisfies_the_interface_and_every_parameter_has_a_place(name):
    of = model(name)
    assert isinstance(of, Seq2Seq)
    parameter_specs(nnx.state(of))


@EACH
def test_stepping_equals_teacher_forcing(name):
    of = model(name)
    batch = tiny.batch([9, 4], [8, 8])
    expected = np.asarray(jax.jit(lambda m, b: m.output_projection().logits(m(b)))(of, batch))
    state = started(of, batch)
    inputs = np.asarray(shift_right(batch.target_tokens, batch.target_positions, 1))
    for t in range(8):
        output, state = decode_step(of, np.stack([inputs[:, t], inputs[:, t]], axis=1), state)
        logits = np.asarray(output.logits)
        for beam in range(2):
            np.testing.assert_allclose(logits[:, beam], expected[:, t], **MODEL)
        if OPTIONS[name]["attention"] == "none":
            assert output.attention is None
        else:
            assert output.attention.shape == (2, 2, 1, 1, 9)
            np.testing.assert_allclose(np.asarray(output.attention).sum(-1), 1.0, rtol=1e-5)
            assert not np.asarray(output.attention)[1, ..., 4:].any()


@EACH
def test_padding_and_batch_mates_cannot_change_a_sentence_nor_the_future_the_past(name):
    of = model(name)
    batch = tiny.batch([5, 9, 3], [4, 8, 6])
    together = hidden(of, batch)
    garbage = tiny.with_padding_tokens(batch, 17)
    after = hidden(of, garbage)
    for row, target in enumerate([4, 8, 6]):
        np.testing.assert_array_equal(after[row, :target], together[row, :target])
    alone = Batch(*(np.asarray(a)[:1, : 5 if i < 3 else 4] for i, a in enumerate(batch)))
    np.testing.assert_allclose(hidden(of, alone)[0], together[0, :4], **MODEL)
    tokens = np.array(batch.target_tokens)
    tokens[1, 4] += 1
    later = hidden(of, batch._replace(target_tokens=tokens))
    np.testing.assert_array_equal(later[1, :5], together[1, :5])
    assert np.abs(later[1, 5:] - together[1, 5:]).max() > 1e-4


def test_reordered_beams_continue_as_their_parents():
    of = model("luong_general_feeding")
    batch = tiny.batch([9], [8])
    _, state = decode_step(of, jnp.array([[4, 9]]), started(of, batch))
    reordered = jax.jit(reorder_beams)(state, jnp.array([[1, 1]]))
    straight, crossed = (np.asarray(decode_step(of, jnp.array([[5, 5]]), s)[0].logits) for s in (state, reordered))
    np.testing.assert_array_equal(crossed[:, 0], straight[:, 1])
    assert np.abs(straight[:, 0] - straight[:, 1]).max() > 1e-4


def test_the_search_over_a_recurrent_model_equals_exhaustive_search():
    start, end, limit, vocab = 1, 2, 3, 5
    config = RecurrentConfig(model_dim=8, hidden_dim=12, attention="additive", vocab_multiple=1)
    sizes = tiny.VocabularyInfo(vocab, vocab, start)
    of = tiny.randomised(nnx.eval_shape(lambda: build_model(config, sizes, rngs=nnx.Rngs(0))), 3)
    source = jnp.array([[3, 4, 2]])
    memory = jax.jit(of.encode)(source, jnp.arange(3)[None], jnp.ones_like(source))

    @jax.jit
    def log_p(tokens):  # [R, T] -> log-probability of each token
        rows = tokens.shape[0]
        many = jax.tree.map(lambda a: jnp.repeat(a, rows, axis=0), memory)
        state, total, previous = of.init_decode_state(many, 1, limit), [], jnp.full((rows, 1), start)
        for t in range(tokens.shape[1]):
            output, state = of.decode_step(previous, state)
            total.append(jnp.take_along_axis(jax.nn.log_softmax(output.logits[:, 0]), tokens[:, t : t + 1], axis=1))
            previous = tokens[:, t : t + 1]
        return jnp.concatenate(total, axis=1)

    others = [t for t in range(vocab) if t != end]
    outputs = [(*body, end) for n in range(limit) for body in itertools.product(others, repeat=n)]
    padded = np.array([o + (end,) * (limit - len(o)) for o in outputs])
    scores = np.asarray(log_p(jnp.asarray(padded)))
    expected = sorted((float(s[: len(o)].sum()), o) for s, o in zip(scores, outputs, strict=True))[::-1]

    beams = 80  # every candidate of the last step: 16 unfinished outputs with 5 extensions each
    search = BeamSearchConfig(beams, 1, limit, start, end, LengthPenalty.parse("none"))

    def step(tokens, state):
        output, state = of.decode_step(tokens, state)
        return output.logits, None, state

    functions = DecoderFunctions(step, reorder_beams, lambda s, *_: s)

    @jax.jit
    def run(memory):
        return beam_search(functions, search, of.init_decode_state(memory, beams, limit), jnp.array([limit]))

    found = jax.device_get(run(memory))
    finished = [i for i in range(beams) if found.finished[0, i]]
    assert len(finished) == len(expected) == 21
    np.testing.assert_allclose(found.scores[0, finished], [s for s, _ in expected], rtol=1e-4)
    best = tuple(found.tokens[0, 0, : found.lengths[0, 0]].tolist())
    assert best == expected[0][1]


@pytest.mark.parametrize(
    "values, message",
    [
        ({"attention": "aditive"}, r"model.attention: expected one of none, additive, .*got 'aditive'"),
        ({"attention": "none", "context_join": "input"}, r"model.context_join is an option of attention, but"),
        ({"attention": "none", "input_feeding": True}, r"model.input_feeding is an option of attention, but"),
        ({"attention": "additive", "input_feeding": True}, r"Set model.context_join: output, or input_feeding: false"),
        ({"decoder_bidirectional": True}, r"unknown key 'model.decoder_bidirectional' .*'encoder_bidirectional'"),
        ({"hidden_dim": 7}, r"model.hidden_dim \(7\) must be even"),
    ],
)
def test_options_that_contradict_are_explained(values, message):
    with pytest.raises(ConfigError, match=message):
        from_dict(Config, {"model": {"kind": "rnn"} | values})


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
def test_what_a_search_reads_makes_the_same_logits(compute_dtype):
    """As with a Transformer: padding rows in a column of the kernel in float32, kernels cast once in bfloat16."""
    config = RecurrentConfig(model_dim=16, hidden_dim=16, attention="dot", compute_dtype=compute_dtype)
    model = tiny.randomised(nnx.eval_shape(lambda: build_model(config, tiny.VOCABULARY, rngs=nnx.Rngs(0))), 0)
    vectors = jnp.asarray(np.random.default_rng(2).normal(size=(2, 3, 16)), compute_dtype)
    logits = jax.jit(lambda model: model.output_projection().logits(vectors))
    expected = logits(model)
    with backend.tracing_for("cpu"):
        prepared = jax.jit(prepared_model)(model)
        found = logits(prepared)
    assert prepared.output_projection().bias_in_kernel == (compute_dtype == "float32")
    assert prepared.decoder.readout.kernel[...].dtype == compute_dtype
    assert prepared.decoder.cells["00"].recurrent_kernel[...].dtype == compute_dtype  # and no step casts it again
    # A bias that is rounded to bfloat16 would differ far more; the order of sums is the compiler's choice.
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_a_quantised_model_keeps_the_gates_of_its_cells_as_floats():
    config = RecurrentConfig(model_dim=16, hidden_dim=16, attention="general")
    graphdef, params = nnx.split(nnx.eval_shape(lambda: build_model(config, tiny.VOCABULARY, rngs=nnx.Rngs(0))))
    params = nnx.to_pure_dict(params)
    quantised = jax.eval_shape(lambda params: quantized_params(graphdef, 1, params), params)
    assert is_quantized(quantised) and not is_quantized(params)
    decoder = quantised["decoder"]
    assert jax.tree.map(jnp.shape, decoder["cells"]) == jax.tree.map(jnp.shape, params["decoder"]["cells"])
    for weights in (decoder["readout"]["kernel"], decoder["alignment"]["key"]["kernel"]):
        assert isinstance(weights, Int8Weights) and weights.scales.shape == (16,)
    assert quantised["target_embedding"]["table"].scales.shape == (24,)
