"""Properties of the whole model."""

import functools
import inspect
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flax_transformer import backend
from flax_transformer.errors import ConfigError
from flax_transformer.inference.prepare import prepared_model
from flax_transformer.models import transformer as transformer_module
from flax_transformer.models.build import VocabularyInfo, build_model
from flax_transformer.models.seq2seq import Seq2Seq, reorder_beams, shift_right
from flax_transformer.models.transformer_config import TransformerConfig
from flax_transformer.nn.attention import MultiHeadAttention
from flax_transformer.parallel.memory import needed_bytes
from flax_transformer.shapes import Batch
from tests import tiny

MODEL = {"rtol": 1e-4, "atol": 1e-4}  # a whole model in float32

ORDERS = pytest.mark.parametrize("norm_order", ["post", "pre"])


@jax.jit
def _hidden(model, batch):
    return model(batch)


def hidden(model, batch) -> np.ndarray:
    return np.asarray(_hidden(model, batch))


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def started(model, batch, num_beams: int, max_length: int, reordered: bool = True) -> Any:
    """The state of a decoder before its first step."""
    memory = model.encode(batch.source_tokens, batch.source_positions, batch.source_segments)
    return model.init_decode_state(memory, num_beams, max_length, reordered)


@jax.jit
def decode_step(model, tokens, state) -> Any:
    return model.decode_step(tokens, state)


def test_it_satisfies_the_interface():
    assert isinstance(tiny.transformer(), Seq2Seq)


@ORDERS
def test_future_tokens_cannot_change_the_past(norm_order):
    model = tiny.transformer(norm_order=norm_order)
    batch = tiny.batch([9], [8])
    before = hidden(model, batch)
    for position in range(8):
        changed = np.array(batch.target_tokens)
        changed[0, position] = (changed[0, position] + 1) % 19
        after = hidden(model, batch._replace(target_tokens=changed))
        # The token at `position` is what hidden[position] must predict; it is an input from position + 1 on.
        np.testing.assert_array_equal(after[:, : position + 1], before[:, : position + 1])
        if position < 7:
            assert np.abs(after[:, position + 1] - before[:, position + 1]).max() > 1e-3


def test_every_source_token_reaches_every_target_position():
    model = tiny.transformer()
    batch = tiny.batch([9], [8])
    before = hidden(model, batch)
    for position in range(9):
        changed = np.array(batch.source_tokens)
        changed[0, position] = 3 + (changed[0, position] + 1) % 16
        difference = np.abs(hidden(model, batch._replace(source_tokens=changed)) - before).max(axis=-1)
        assert difference.min() > 1e-5


@ORDERS
def test_padding_and_batch_mates_cannot_change_a_sentence(norm_order):
    model = tiny.transformer(norm_order=norm_order)
    batch = tiny.batch([5, 9, 3], [4, 8, 6])
    together = hidden(model, batch)
    garbage = tiny.with_padding_tokens(batch, 17)
    after = hidden(model, garbage)
    for row, (source, target) in enumerate([(5, 4), (9, 8), (3, 6)]):
        np.testing.assert_array_equal(after[row, :target], together[row, :target])
        alone = Batch(*(np.asarray(a)[row : row + 1, : source if i < 3 else target] for i, a in enumerate(batch)))
        np.testing.assert_allclose(hidden(model, alone)[0], together[row, :target], **MODEL)


def test_packed_pairs_equal_separate_pairs():
    model = tiny.transformer()
    first, second = tiny.batch([4], [3], seed=1, source=4, target=3), tiny.batch([5], [5], seed=2, source=5, target=5)
    packed = []
    for name in Batch._fields:
        a, b = getattr(first, name), getattr(second, name)
        packed.append(np.concatenate([a, 2 * np.asarray(b) if name.endswith("segments") else b], axis=1))
    together = hidden(model, Batch(*packed))[0]
    np.testing.assert_allclose(together[:3], hidden(model, first)[0], **MODEL)
    np.testing.assert_allclose(together[3:], hidden(model, second)[0], **MODEL)


def test_shift_right_starts_each_segment_anew():
    tokens, positions = jnp.array([[5, 6, 2, 7, 2, 0]]), jnp.array([[0, 1, 2, 0, 1, 0]])
    np.testing.assert_array_equal(shift_right(tokens, positions, 1), [[1, 5, 6, 1, 7, 1]])


@ORDERS
@pytest.mark.parametrize("share, reordered", [("target_output", True), ("none", False)])
def test_cached_decoding_equals_teacher_forcing(norm_order, share, reordered):
    model = tiny.transformer(norm_order=norm_order, share_embeddings=share, positions="learned")
    batch = tiny.batch([9, 4], [20, 20], target=20)
    expected = np.asarray(jax.jit(lambda m, b: m.output_projection().logits(m(b)))(model, batch))
    state = started(model, batch, 2, 20, reordered)
    inputs = np.asarray(shift_right(batch.target_tokens, batch.target_positions, 1))
    for t in range(20):
        output, state = decode_step(model, np.stack([inputs[:, t], inputs[:, t]], axis=1), state)
        logits, attention = jax.device_get((output.logits, output.attention))
        for beam in range(2):
            np.testing.assert_allclose(logits[:, beam], expected[:, t], **MODEL)
        assert attention.shape == (2, 2, 3, 4, 9)
        np.testing.assert_allclose(attention.sum(-1), 1.0, rtol=1e-5)
        assert not attention[1, ..., 4:].any()  # the second source has 4 tokens


def test_reordered_beams_continue_as_their_parents():
    model = tiny.transformer()
    batch = tiny.batch([9], [8])
    state = started(model, batch, 2, 8)
    _, state = decode_step(model, jnp.array([[1, 1]]), state)
    _, state = decode_step(model, jnp.array([[4, 9]]), state)
    reordered = jax.jit(reorder_beams)(state, jnp.array([[1, 1]]))
    straight, crossed = (np.asarray(decode_step(model, jnp.array([[5, 5]]), s)[0].logits) for s in (state, reordered))
    # Not to the bit: attention sums over what all beams wrote, in the order of the beams that wrote it.
    np.testing.assert_allclose(crossed[:, 0], straight[:, 1], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(crossed[:, 1], straight[:, 1], rtol=1e-5, atol=1e-5)
    assert not np.allclose(straight[:, 0], straight[:, 1], atol=1e-2)  # the beams do differ


def test_cross_attention_keys_are_kept_once_a_sentence():
    model = tiny.transformer()
    batch = tiny.batch([9, 9], [8, 8])
    narrow, wide = (started(model, batch, beams, 8).per_sentence for beams in (1, 5))
    chex.assert_trees_all_equal_shapes(narrow, wide)


def test_caches_have_the_key_value_heads_of_their_layers(monkeypatch):
    monkeypatch.setattr(
        transformer_module, "MultiHeadAttention", functools.partial(MultiHeadAttention, num_key_value_heads=2)
    )

    def decode() -> tuple[Any, Any]:
        model = build_model(tiny.config(num_heads=4), tiny.VOCABULARY, rngs=nnx.Rngs(0))
        batch = tiny.batch([9, 6], [8, 5])
        encoded = model.encode(batch.source_tokens, batch.source_positions, batch.source_segments)
        state = model.init_decode_state(encoded, num_beams=2, max_length=8)
        return state, model.decode_step(batch.target_tokens[:, :2], state)[1]

    before, after = jax.eval_shape(decode)
    assert {cache.keys[0].shape for cache in before.append_only} == {(2, 2, 4, 2, 8)}
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, before)


@pytest.mark.parametrize("share, tables", [("all", 1), ("target_output", 2), ("none", 3)])
def test_embeddings_are_shared_as_told(share, tables):
    model = tiny.transformer(share_embeddings=share)
    paths = ["/".join(map(str, p)) for p, _ in nnx.to_flat_state(nnx.state(model))]
    assert sum(path.endswith("embedding/table") for path in paths) == tables


@pytest.mark.parametrize("name", ["dropout", "attention_dropout", "activation_dropout"])
def test_each_dropout_rate_acts_in_training_alone(name):
    batch = tiny.batch([9, 4], [8, 5])
    rates: dict[str, Any] = dict.fromkeys(("dropout", "attention_dropout", "activation_dropout"), 0.0)
    model = tiny.transformer(**(rates | {name: 0.5}))
    run = jax.jit(lambda key: model(batch, key))
    first, second = (np.asarray(run(jax.random.key(seed))) for seed in (0, 1))
    evaluated = hidden(model, batch)
    assert min(np.abs(first - second).max(), np.abs(first - evaluated).max()) > 1e-3
    np.testing.assert_allclose(evaluated, hidden(tiny.transformer(**rates), batch), rtol=1e-6)


def test_bfloat16_compute_is_close_to_float32():
    batch = tiny.batch([9, 4], [8, 5])
    exact = hidden(tiny.transformer(), batch)
    model = tiny.transformer(compute_dtype="bfloat16")
    low = np.asarray(_hidden(model, batch).astype(jnp.float32))
    assert model.encoder.layers.feed_forward.up.kernel[...].dtype == jnp.float32
    # bfloat16 keeps 8 bits: 0.4 % a rounding, a few dozen roundings deep, on values of size 1.
    assert 0 < np.abs(low - exact).max() < 0.3


def test_a_seed_gives_the_same_model_and_layers_differ():
    @jax.jit
    def fresh(key):
        return nnx.to_pure_dict(nnx.state(build_model(tiny.config(), tiny.VOCABULARY, rngs=nnx.Rngs(params=key))))

    first, second, other = (fresh(jax.random.key(seed)) for seed in (0, 0, 1))
    chex.assert_trees_all_equal(first, second)
    kernel = first["decoder"]["layers"]["feed_forward"]["up"]["kernel"]
    assert kernel.shape == (3, 16, 32)
    assert np.abs(kernel[0] - kernel[1]).max() > 0.1
    assert np.abs(kernel - other["decoder"]["layers"]["feed_forward"]["up"]["kernel"]).max() > 0.1


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_dim": 512, "num_heads": 5}, r"num_heads \(5\) must divide model.model_dim \(512\); nearest: 4, 8"),
        ({"model_dim": 15, "num_heads": 5}, r"model_dim \(15\) must be even"),
        ({"num_decoder_layers": 0}, "num_decoder_layers must be at least 1, got 0"),
    ],
)
def test_sizes_that_do_not_fit_are_explained(changes, message):
    with pytest.raises(ConfigError, match=message):
        TransformerConfig(**changes)


def test_embeddings_have_a_dropout_of_their_own():
    batch = tiny.batch([9, 5], [8, 3])

    def varies(**changes) -> bool:
        rates: dict[str, Any] = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0} | changes
        model = tiny.transformer(**rates)
        run = jax.jit(lambda key: model(batch, key))
        one, other = (np.asarray(run(jax.random.key(seed))) for seed in (1, 2))
        return not np.array_equal(one, other)

    assert not varies()
    assert varies(embedding_dropout=0.5)
    assert varies(dropout=0.5, embedding_dropout=0.0)


def test_a_zero_start_reads_zeros_and_not_the_table():
    batch = tiny.batch([5, 9], [8, 3])
    outputs = []
    for zero_start, factor in ((True, 1.0), (True, 7.0), (False, 7.0), (False, 0.0)):
        graphdef, params = nnx.split(tiny.transformer(zero_start=zero_start))
        values = nnx.to_pure_dict(params)
        table = np.array(values["target_embedding"]["table"])
        table[tiny.VOCABULARY.start_token] *= factor
        outputs.append(hidden(nnx.merge(graphdef, values | {"target_embedding": {"table": table}}), batch))
    np.testing.assert_array_equal(outputs[0], outputs[1])
    np.testing.assert_allclose(outputs[0], outputs[3], rtol=1e-4, atol=1e-5)  # another program
    assert np.abs(outputs[0] - outputs[2]).max() > 0.01


def test_a_zero_start_is_refused_where_the_same_token_ends_an_output():
    """Its output row is zeros, so the end's logit would be 0 whatever the model has learnt."""
    same, other = (VocabularyInfo(21, 19, start_token=2, end_token=end) for end in (2, 3))

    def build(vocabulary: VocabularyInfo, **changes: Any) -> Any:
        return nnx.eval_shape(lambda: build_model(tiny.config(**changes), vocabulary, rngs=nnx.Rngs(0)))

    with pytest.raises(ConfigError, match=r"token 2 starts and ends an output.* Set model\.zero_start: false"):
        build(same, zero_start=True)
    build(other, zero_start=True)
    build(same)
    build(same, zero_start=True, share_embeddings="none")  # the output has a table of its own


def test_a_configuration_without_a_model_is_refused():
    unknown: Any = object()
    build = inspect.unwrap(build_model)  # without the check of types under pytest, as users call it
    with pytest.raises(TypeError, match="object has no model here. Add one to build_model"):
        build(unknown, tiny.VOCABULARY, rngs=nnx.Rngs(0))


@pytest.mark.slow
def test_loops_and_rematerialisation_change_no_number_and_save_memory():
    batch = tiny.batch([32] * 32, [6] * 32, source=32, target=6)

    def compiled(**changes):
        """A function from parameters to loss and gradient, and the parameters' leaves."""
        depths = {"num_encoder_layers": 3, "num_decoder_layers": 1}
        graphdef, params = nnx.split(
            tiny.transformer(dropout=0.3, attention_dropout=0.0, activation_dropout=0.0, **depths, **changes)
        )

        def loss(params):
            return jnp.mean(nnx.merge(graphdef, params)(batch, jax.random.key(3)) ** 2)

        program = jax.jit(jax.value_and_grad(loss)).lower(params).compile()
        return jax.tree.leaves(program(params)), needed_bytes(program)

    expected, _ = compiled()
    scanned, scanned_bytes = compiled(scan_layers=True)
    rematerialised, _ = compiled(rematerialize=True)
    both, both_bytes = compiled(scan_layers=True, rematerialize=True)
    for found in (scanned, rematerialised, both):
        chex.assert_trees_all_close(found, expected, rtol=2e-5, atol=1e-6)
    assert both_bytes < 0.7 * scanned_bytes


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"output_bias": True},
        {"output_bias": True, "zero_start": True},
        {"output_bias": True, "compute_dtype": "bfloat16"},  # where a column of the kernel would round the bias
        {"share_embeddings": "none", "zero_start": True},
    ],
)
def test_the_form_that_a_search_reads_makes_the_same_logits(changes):
    model = tiny.transformer(**changes)
    vectors = np.random.default_rng(2).normal(size=(2, 3, model.config.model_dim))
    vectors = jnp.asarray(vectors, model.config.compute_dtype)
    expected = jax.jit(lambda model: model.output_projection().logits(vectors))(model)
    with backend.tracing_for("cpu"):
        found = jax.jit(lambda model: prepared_model(model).output_projection().logits(vectors))(model)
    # Both add up bfloat16 products in float32, in an order of the compiler's choice. A bias that is rounded to bfloat16
    # would differ a thousand times as much.
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "platform, changes, stored",
    [
        ("gpu", {}, False),
        ("gpu", {"output_bias": True}, False),
        ("gpu", {"zero_start": True}, True),
        ("gpu", {"compute_dtype": "bfloat16"}, True),
        ("cpu", {}, True),  # a column masks the rows of padding
    ],
)
def test_a_table_that_a_search_reads_as_it_is_is_not_stored_twice(platform, changes, stored):
    model = tiny.transformer(**changes)
    with backend.tracing_for(platform):
        prepared = jax.eval_shape(prepared_model, model)
    assert (prepared.prepared_projection is not None) == stored
