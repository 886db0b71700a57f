"""Small models with random parameters, of each kind, and their tokenizers and runs: for tests of decoding."""

import io
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from flax_transformer.cli import main as cli
from flax_transformer.config.recipe import Config, DecodingConfig
from flax_transformer.data.synthetic import english_number_words, german_number_words
from flax_transformer.data.tokenizer import TokenizerConfig
from flax_transformer.data.tokenizer_pair import TokenizerPair
from flax_transformer.models.build import vocabulary_info
from flax_transformer.models.recurrent_config import RecurrentConfig
from flax_transformer.models.transformer_config import TransformerConfig
from flax_transformer.run_folder import RunFolder
from flax_transformer.training.checkpoint import Checkpoints
from flax_transformer.training.state import abstract_model
from tests.tiny import randomised

NUMBERS = np.random.default_rng(0).integers(0, 100_000, 240).tolist()
SOURCES = [english_number_words(n) for n in NUMBERS]
TARGETS = [german_number_words(n) for n in NUMBERS]
TOKENIZERS = TokenizerPair.train(SOURCES, TARGETS, TokenizerConfig(vocab_size=60))
# Sentences that one program translates, so that little is compiled where length does not matter.
ALIKE = [s for s, ids in zip(SOURCES, TOKENIZERS.source.encode(SOURCES), strict=True) if 17 <= len(ids) + 1 <= 24]
SMALL: dict[str, Any] = {
    "model_dim": 16,
    "max_source_length": 48,
    "max_target_length": 48,
    "share_embeddings": "target_output",
}
MODELS = {
    "transformer": TransformerConfig(
        num_heads=2, feed_forward_dim=32, num_encoder_layers=1, num_decoder_layers=1, **SMALL
    ),
    "recurrent": RecurrentConfig(hidden_dim=16, attention="dot", input_feeding=True, **SMALL),
}
DECODING = DecodingConfig(beam_size=3, batch_size=4, max_length_factor=0.5, max_length_offset=5)
SEEDS = {"transformer": 2, "recurrent": 35}  # with which outputs have many lengths, and some of them are cut


def params_of(model, seed: int, tokenizers: TokenizerPair = TOKENIZERS):
    graphdef, abstract = abstract_model(model, vocabulary_info(tokenizers))
    return nnx.to_pure_dict(nnx.state(randomised(nnx.merge(graphdef, abstract), seed)))


def params_that_end(model, seed: int) -> Any:
    """Random parameters whose probabilities are far apart, that of the end above all: outputs end where it is likely.

    With those of `params_of` hardly any output ends before its limit.
    """

    def larger(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return leaf * 3.0 if name.endswith("kernel") or name == "target_embedding/table" else leaf

    params = jax.tree_util.tree_map_with_path(larger, params_of(model, seed))
    table = params["target_embedding"]["table"]
    return params | {"target_embedding": {"table": table.at[TOKENIZERS.target.special.end].multiply(-2.0)}}


def make_run(path: Path, model, seed: int, factor: float = 1.0) -> Path:
    """A run folder with random parameters, each times a factor."""
    folder = RunFolder(path)
    tokenizer = TokenizerConfig(vocab_size=60)
    folder.create(Config(run=str(path), model=model, decoding=DECODING, tokenizer=tokenizer), TOKENIZERS)
    with Checkpoints(folder.checkpoints, (1, 1)) as checkpoints:
        checkpoints.save_params(1, jax.tree.map(lambda leaf: leaf * factor, params_that_end(model, seed)))
    return path


def holds(tokens: list[str], text: str) -> bool:
    """Whether tokens hold those that a text is cut into, one after the other."""
    pieces = TOKENIZERS.target.pieces(TOKENIZERS.target.encode([text])[0])
    return any(tokens[n : n + len(pieces)] == pieces for n in range(len(tokens)))


class Stdin(io.TextIOWrapper):
    def isatty(self):
        return False


def command(monkeypatch, capsys, arguments: list[str], data: bytes = b"", stdin: Any = Stdin):
    """Runs `flax-transformer` in this process on so much input; returns its exit code, its output and its errors."""
    monkeypatch.setattr(sys, "stdin", stdin(io.BytesIO(data)))
    monkeypatch.setattr(sys, "argv", ["flax-transformer", *arguments])
    try:
        code = cli.main()
    except SystemExit as ended:
        code = int(ended.code or 0)
    output = capsys.readouterr()
    return code, output.out, output.err
