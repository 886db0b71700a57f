"""What layers and models say of their parameters."""

import pytest
from flax import nnx

from flax_transformer.models.parameters import ParameterInfo, parameter_info
from flax_transformer.models.recurrent_config import RecurrentConfig
from flax_transformer.models.seq2seq import ParameterRoles
from flax_transformer.models.transformer import Transformer
from flax_transformer.training.state import describe_parameters
from tests import tiny


def test_the_info_of_a_parameter_is_what_its_layer_and_its_model_say():
    transformer = describe_parameters(tiny.config(share_embeddings="none"), tiny.VOCABULARY)
    attention = transformer["decoder"]["layers"]["cross_attention"]
    axes = ("layers", "embed", "heads", "head_dim")
    assert attention["query"]["kernel"] == ParameterInfo((3, 16, 4, 4), axes, 1, "target_token")
    assert attention["key"]["kernel"] == ParameterInfo((3, 16, 4, 4), axes, 1, "source_token")
    assert attention["key"]["bias"] == ParameterInfo((3, 4, 4), ("layers", "heads", "head_dim"))
    assert transformer["target_embedding"]["table"] == ParameterInfo((24, 16), ("vocab", "embed"))
    assert transformer["output_embedding"]["table"].multiplied_with == "target_token"
    recurrent = describe_parameters(RecurrentConfig(model_dim=6, hidden_dim=8), tiny.VOCABULARY)
    assert recurrent["bridge"]["maps"]["00_0"]["kernel"] == ParameterInfo(
        (8, 8), ("recurrent", "recurrent"), 1, "sentence"
    )
    assert recurrent["decoder"]["alignment"]["key"]["kernel"].multiplied_with == "source_token"


def test_a_model_that_forgets_a_kernel_is_told():
    class Forgetful(Transformer):
        def parameter_roles(self) -> ParameterRoles:
            return ParameterRoles((self.encoder,), (self.decoder.layers.feed_forward,), self.target_embedding.table)

    model = Forgetful(tiny.config(), source_vocab_size=21, target_vocab_size=19, start_token=1, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="Forgetful.parameter_roles must say .* decoder/layers/cross_attention/key/k"):
        parameter_info(model)
