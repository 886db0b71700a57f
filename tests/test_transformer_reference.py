"""The whole model against PyTorch: parameters, logits, loss and gradients, from a file that PyTorch wrote.

`reference/make_transformer_reference.py` writes the file. PyTorch worked in float64 there, so the differences below are
the rounding of this project's float32. `test_torch_parity.py` does the same with a live PyTorch, over more options.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, traverse_util

from flax_transformer.models.transformer import Transformer
from flax_transformer.models.transformer_config import TransformerConfig
from flax_transformer.ops.cross_entropy import LossSums
from flax_transformer.shapes import Batch
from flax_transformer.training.step import Objective, batch_loss

REFERENCE_PATH = Path(__file__).parent / "reference" / "transformer_reference.npz"

# A few times the largest differences seen, here and in `test_torch_parity.py`: 1.3e-6 in logits up to 4, 2.4e-7 of a
# loss, and 4e-6 in gradients up to 10. Those are roundings of float32, whose neighbours are 1e-7 of a value apart. A
# norm epsilon of 1e-6 in the place of 1e-5 fails by them.
LOGITS_TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
LOSS_TOLERANCE = {"rtol": 1e-6, "atol": 0.0}
GRADIENTS_TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}

CONFIG_FIELDS = (
    "norm_order", "model_dim", "num_heads", "feed_forward_dim", "num_encoder_layers", "num_decoder_layers",
    "vocab_multiple", "norm_epsilon", "share_embeddings", "activation",
)  # fmt: skip


class Outcome(NamedTuple):
    """What this project's model makes of a reference's parameters and inputs, and the nested reference values."""

    case: dict[str, Any]
    batch: Batch
    expected_shapes: Any
    given_shapes: Any
    logits: jax.Array
    sums: LossSums
    gradients: Any
    reference_gradients: Any


def nested(reference: Mapping[str, np.ndarray], prefix: str) -> dict[str, Any]:
    """Returns the arrays whose names start with `prefix`, nested as the model nests its parameters."""
    flat = {name.removeprefix(prefix): array for name, array in reference.items() if name.startswith(prefix)}
    return traverse_util.unflatten_dict(flat, sep="/")


def shapes_of(tree: Any) -> Any:
    """Returns the tree with a string of type and shape in the place of each array."""
    return jax.tree.map(lambda array: f"{array.dtype}{list(array.shape)}", tree)


def run_reference(reference: Mapping[str, np.ndarray]) -> Outcome:
    """Builds the model of a reference from its parameters, and computes what PyTorch computed."""
    case = json.loads(str(reference["case"]))
    config = TransformerConfig(**{name: case[name] for name in CONFIG_FIELDS})

    def build() -> Transformer:
        return Transformer(
            config,
            source_vocab_size=case["source_vocab_size"],
            target_vocab_size=case["target_vocab_size"],
            start_token=case["start_token"],
            rngs=nnx.Rngs(params=0),
        )

    graphdef, abstract = nnx.split(nnx.eval_shape(build))
    parameters = jax.tree.map(jnp.asarray, nested(reference, "parameters/"))

    def positions_and_segments(tokens: np.ndarray, lengths: np.ndarray) -> tuple[jax.Array, jax.Array]:
        positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
        return jnp.asarray(positions), jnp.asarray((positions < lengths[:, None]).astype(np.int32))

    source, target = reference["source_tokens"], reference["target_tokens"]
    batch = Batch(
        jnp.asarray(source),
        *positions_and_segments(source, reference["source_lengths"]),
        jnp.asarray(target),
        *positions_and_segments(target, reference["target_lengths"]),
    )

    @jax.jit
    def compute(parameters: Any, batch: Batch) -> tuple[jax.Array, LossSums, Any]:
        def loss(parameters: Any) -> tuple[jax.Array, LossSums]:
            sums = batch_loss(nnx.merge(graphdef, parameters), batch, Objective(case["label_smoothing"]), None)
            return sums.loss, sums

        gradients, sums = jax.grad(loss, has_aux=True)(parameters)
        model = nnx.merge(graphdef, parameters)
        return model.output_projection().logits(model(batch)), sums, gradients

    expected_shapes, given_shapes = shapes_of(nnx.to_pure_dict(abstract)), shapes_of(parameters)
    reference_gradients = nested(reference, "gradients/")
    logits, sums, gradients = compute(parameters, batch)
    return Outcome(case, batch, expected_shapes, given_shapes, logits, sums, gradients, reference_gradients)


def check_parameters(outcome: Outcome) -> None:
    """Every parameter of the model is given by the reference, in its shape, and nothing else is."""
    # `nnx.merge` takes parameters of any shape, and broadcasting could then hide a wrong layout.
    assert outcome.given_shapes == outcome.expected_shapes


def check_logits(outcome: Outcome, reference: Mapping[str, np.ndarray]) -> None:
    """Logits of real vocabulary rows agree at target tokens; what stands at padding positions is nobody's concern."""
    is_token = np.asarray(outcome.batch.target_segments) > 0
    ours = np.asarray(outcome.logits)[is_token, : outcome.case["target_vocab_size"]]
    np.testing.assert_allclose(ours, reference["logits"][is_token], **LOGITS_TOLERANCE)


def check_padding_rows(outcome: Outcome) -> None:
    """Vocabulary rows past the real ones get no probability, and no embedding row past its own vocabulary moves."""
    num_real = outcome.case["target_vocab_size"]
    probabilities = jax.nn.softmax(outcome.logits, axis=-1)
    assert probabilities.shape[-1] > num_real, "the case has no padding rows"
    assert not np.any(np.asarray(probabilities)[..., num_real:])
    for name, vocabulary in (("target", "target"), ("source", "source"), ("output", "target")):
        if f"{name}_embedding" in outcome.gradients:
            table = np.asarray(outcome.gradients[f"{name}_embedding"]["table"])
            assert not np.any(table[outcome.case[f"{vocabulary}_vocab_size"] :]), name


def check_loss(outcome: Outcome, reference: Mapping[str, np.ndarray]) -> None:
    """The summed loss agrees, with label smoothing and without."""
    np.testing.assert_allclose(outcome.sums.loss, reference["loss"], **LOSS_TOLERANCE)
    np.testing.assert_allclose(
        outcome.sums.negative_log_likelihood, reference["negative_log_likelihood"], **LOSS_TOLERANCE
    )
    assert int(outcome.sums.count) == int(reference["target_lengths"].sum())


def check_gradients(outcome: Outcome) -> None:
    """The gradient of every parameter agrees, and is large enough for the tolerance to mean something."""
    chex.assert_trees_all_close(outcome.gradients, outcome.reference_gradients, **GRADIENTS_TOLERANCE)
    for path, gradient in traverse_util.flatten_dict(outcome.reference_gradients, sep="/").items():
        # A key's bias adds the same to all scores of a query, and softmax does not see that.
        if not path.endswith("key/bias"):
            assert np.max(np.abs(np.asarray(gradient))) > 1000 * GRADIENTS_TOLERANCE["atol"], path


@pytest.fixture(scope="module", params=["post", "pre"])
def reference(request) -> dict[str, np.ndarray]:
    """The arrays of one norm order."""
    prefix = f"{request.param}/"
    with np.load(REFERENCE_PATH) as arrays:
        return {name.removeprefix(prefix): arrays[name] for name in arrays.files if name.startswith(prefix)}


@pytest.fixture(scope="module")
def outcome(reference) -> Outcome:
    """The model's answer to the reference."""
    return run_reference(reference)


def test_parameter_names_and_shapes(outcome):
    check_parameters(outcome)


def test_logits(outcome, reference):
    check_logits(outcome, reference)


def test_padding_rows_of_the_vocabulary(outcome):
    check_padding_rows(outcome)


def test_loss(outcome, reference):
    check_loss(outcome, reference)


def test_gradients(outcome):
    check_gradients(outcome)
