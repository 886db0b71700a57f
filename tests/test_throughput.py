"""Throughput: what a step's products cost, by the compiler's own count, and what is reported of them."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from flax_transformer.models.recurrent_config import RecurrentConfig
from flax_transformer.ops.cross_entropy import LossSums
from flax_transformer.training.log_window import LogWindow
from flax_transformer.training.metrics import TokenCounts
from flax_transformer.training.state import abstract_model, describe_parameters
from flax_transformer.training.step import StepMetrics
from flax_transformer.training.throughput import FlopFigures, ModelFlops, Throughput, peak_flops
from tests import tiny

ROWS = 24  # of each table: 19 or 21 ids, padded to a multiple of 8


def cost(model_config, num_passes: int = 1) -> ModelFlops:
    return ModelFlops.of(describe_parameters(model_config, tiny.VOCABULARY), num_passes)


@pytest.mark.parametrize("share", ["all", "target_output", "none"])
def test_the_cost_of_products_is_what_the_compiler_counts(share):
    sizes = {"model_dim": 256, "feed_forward_dim": 512, "share_embeddings": share, "max_source_length": 8}
    model_config = tiny.config(**sizes, max_target_length=8)
    graphdef, params = abstract_model(model_config, tiny.VOCABULARY)
    batch = tiny.batch([8] * 16, [4] * 16, source=8, target=4)

    def logits(params):
        model = nnx.merge(graphdef, params)
        return model.output_projection().logits(model(batch))

    analysis: Any = jax.jit(logits).lower(params).cost_analysis()
    counted = analysis["flops"]
    ours = cost(model_config).total(TokenCounts(16 * 8, 16 * 4)) / 3  # forward alone
    assert ours < counted < 1.05 * ours  # the rest: norms, softmax, and attention's products without parameters


@pytest.mark.parametrize("share", ["all", "target_output", "none"])
def test_the_cost_of_a_transformer_is_its_kernels(share):
    """Two encoder layers and three decoder layers, 16 wide; keys and values of the encoder's output count for it."""
    square, feed_forward = 16 * 16, 2 * 16 * 32
    source = 2 * (4 * square + feed_forward) + 3 * 2 * square
    target = 3 * (4 * square + 2 * square + feed_forward) + ROWS * 16
    assert cost(tiny.config(share_embeddings=share)) == ModelFlops(6 * source, 6 * target)


def test_the_cost_of_a_recurrent_model_is_its_kernels():
    """A one-layer LSTM of 8 units: the encoder has 2 directions of 4 units, and there is no attention."""
    small = RecurrentConfig(model_dim=6, hidden_dim=8, attention="none", share_embeddings="target_output")
    encoder = 2 * 4 * (6 * 4 + 4 * 4)
    decoder = 4 * (6 * 8 + 8 * 8) + 8 * 6
    assert cost(small) == ModelFlops(6 * encoder, 6 * (decoder + ROWS * 6))
    assert cost(small, num_passes=2) == ModelFlops(12 * encoder, 12 * (decoder + ROWS * 6))


def test_the_cost_of_recurrent_attention_is_its_kernels():
    """A GRU with Bahdanau's attention: the context has a kernel in the cell, and the bridge is used once a sentence."""
    small = RecurrentConfig(model_dim=6, hidden_dim=8, cell="gru", attention="additive", share_embeddings="none")
    encoder, keys = 2 * 3 * (6 * 4 + 4 * 4), 8 * 8
    decoder = 3 * (6 * 8 + 8 * 8 + 8 * 8) + 8 * 8 + (8 + 8 + 6) * 6
    assert cost(small) == ModelFlops(6 * (encoder + keys), 6 * (decoder + ROWS * 6))


def test_a_progress_line_gives_the_share_of_the_peak_where_it_is_known(one_device):
    speed = Throughput.of(TokenCounts(100, 50, 200), 0.5, FlopFigures(ModelFlops(6, 12), 9600.0))
    assert speed.text == "src 200 tgt 100 tok/s 2.4e-09 TFLOP/s (25% of peak)"
    assert peak_flops(one_device, "bfloat16") is None  # of a CPU
    assert "peak" not in Throughput.of(TokenCounts(100, 50, 200), 0.5, FlopFigures(ModelFlops(6, 12), None)).text


def test_a_progress_line_records_the_operations_of_a_step():
    """The mean over all updates of a window, those of the warm-up and those that were skipped included."""
    one = jnp.float32(1.0)
    made = StepMetrics(LossSums(one, one, one, one), one, one, jnp.asarray(False))
    window = LogWindow(fetched=[made] * 3, skipped=1)
    window.tokens += TokenCounts(30, 20, 60)
    window.end_warm_up()
    window.tokens += TokenCounts(20, 10, 40)
    report = window.report(4, 10, 0.0, FlopFigures(ModelFlops(6, 12), None))
    assert report.record["flops_per_step"] == report.flops_per_step == (6 * 50 + 12 * 30) / 4


def test_the_first_steps_are_not_counted(monkeypatch):
    now = 0.0
    monkeypatch.setattr("flax_transformer.training.log_window.time.monotonic", lambda: now)
    window = LogWindow(started=now)
    window.tokens += TokenCounts(10, 10, 20)
    now = 100.0  # a slow start
    window.end_warm_up()
    window.tokens += TokenCounts(40, 20, 80)
    now = 102.0
    report = window.report(8, 10, 0.0, FlopFigures(ModelFlops(1, 1), None))
    assert (report.throughput.source_tokens, report.throughput.target_tokens) == (20.0, 10.0)
    assert report.seconds == 102.0
    assert report.tokens == TokenCounts(50, 30, 100)
    only_warm_up = LogWindow(tokens=TokenCounts(10, 10, 20), started=100.0)
    only_warm_up.end_warm_up()
    assert only_warm_up.report(5, 10, 0.0, FlopFigures(ModelFlops(1, 1), None)).throughput.source_tokens == 5.0
