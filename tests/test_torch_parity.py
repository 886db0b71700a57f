"""The whole model against a live PyTorch, over the options that change its arithmetic.

Deselected by default through its marker. PyTorch is imported inside the tests, so that collection does without it and a
run that asks for these tests fails, rather than skips, where it is missing.
"""

import numpy as np
import pytest

from tests.test_transformer_reference import (
    REFERENCE_PATH,
    check_gradients,
    check_logits,
    check_loss,
    check_padding_rows,
    check_parameters,
    run_reference,
)

pytestmark = pytest.mark.parity

CASES = {
    "one layer, one head": {"num_encoder_layers": 1, "num_decoder_layers": 1, "num_heads": 1},
    "deep encoder": {"num_encoder_layers": 3, "num_decoder_layers": 1},
    "deep decoder, four heads": {"num_encoder_layers": 1, "num_decoder_layers": 3, "num_heads": 4},
    "as many heads as channels": {"num_heads": 16},
    "gelu": {"activation": "gelu"},
    "swish": {"activation": "swish"},
    "source table apart": {"share_embeddings": "target_output", "source_vocab_size": 29},
    "three tables": {"share_embeddings": "none", "source_vocab_size": 29},
    "three tables, gelu, eight heads": {"share_embeddings": "none", "activation": "gelu", "num_heads": 8},
    # At 1e-5 it matters little where the epsilon stands, inside the square root or beside it; here it does.
    "large norm epsilon": {"norm_epsilon": 0.1},
    "no label smoothing": {"label_smoothing": 0.0},
}


@pytest.mark.parametrize("norm_order", ["post", "pre"])
@pytest.mark.parametrize("options", CASES.values(), ids=CASES.keys())
def test_model_agrees_with_torch(norm_order, options):
    from tests.reference.torch_transformer import ReferenceCase, compute_reference

    reference = compute_reference(ReferenceCase(norm_order=norm_order, **options), seed=2)
    outcome = run_reference(reference)
    check_parameters(outcome)
    check_logits(outcome, reference)
    check_padding_rows(outcome)
    check_loss(outcome, reference)
    check_gradients(outcome)


def test_reference_file_is_what_torch_computes():
    from tests.reference.make_transformer_reference import make_reference

    made = make_reference()
    with np.load(REFERENCE_PATH) as written:
        assert sorted(written.files) == sorted(made)
        for name, array in made.items():
            if array.dtype.kind == "f":
                # Both come from float64; another processor may round the last bit of float32 the other way. The
                # gradients of key biases are zero but for float64 rounding.
                np.testing.assert_allclose(written[name], array, rtol=1e-6, atol=1e-9, err_msg=name)
            else:
                np.testing.assert_array_equal(written[name], array, err_msg=name)
