"""Export of a run to a MarianMT folder, which Hugging Face's `MarianMTModel` and `MarianTokenizer` load.

`marian_reader.py` imports such a folder. Both directions use one table. Each entry pairs a MarianMT parameter with a
parameter of this project and converts the layout. A parameter without a partner is an error.

Vocabulary. The export writes the tokens in MarianMT's order: `</s>`, `<unk>`, the pieces, `<unused>`, `<pad>`. The
token `<unused>` is this project's padding. The token `<pad>` is this project's start token, because MarianMT's decoder
starts with padding. The import accepts any order. It puts this project's four special tokens first, and keeps the order
of the others.

Tokens that a model has not learnt. If a vocabulary has no `<unused>`, the import adds a row for it. The output bias of
this row leaves the token practically no probability. The export leaves the row out again. Marian trains without `<pad>`
as an output. If the settings of `generate` exclude `<pad>`, the import gives the start token the same bias. The export
writes this bias, so the outputs stay the same without the settings.

Rows that nothing reads. Rows that pad the vocabulary to a multiple are not exported. The start token's row is exported
as zeros if it was imported as zeros (`zero_start`).
"""

import dataclasses
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from flax_transformer.data.sentencepiece_tokenizer import WORD_START, SentencePieceTokenizer
from flax_transformer.data.tokenizer import Tokenizer
from flax_transformer.data.tokenizer_pair import TokenizerPair
from flax_transformer.errors import ConfigError, InputError
from flax_transformer.inference.prepare import is_quantized
from flax_transformer.inference.translator import Translator
from flax_transformer.interop.marian_generation import export_generation
from flax_transformer.models.build import ModelConfig
from flax_transformer.models.transformer_config import TransformerConfig

Flat = dict[str, np.ndarray]

# Name of this project's padding token in a MarianMT vocabulary. No output contains it.
UNUSED = "<unused>"
# Output bias of a token that the model has not learnt. It leaves the token practically no probability. It is small in a
# mean over the vocabulary.
NEVER = np.float32(-100.0)

# Names within a layer: this project's -> MarianMT's.
ATTENTION = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "output": "out_proj"}
LAYER = {
    "self_attention": "self_attn",
    "self_attention_residual/norm": "self_attn_layer_norm",
    "cross_attention": "encoder_attn",
    "cross_attention_residual/norm": "encoder_attn_layer_norm",
    "feed_forward/up": "fc1",
    "feed_forward/down": "fc2",
    "feed_forward_residual/norm": "final_layer_norm",
}


@dataclasses.dataclass(frozen=True)
class Entry:
    """One entry of the table.

    Attributes:
        theirs: name of the parameter in the MarianMT file.
        ours: path of the parameter in this project.
        layer: layer in a stack; None for a parameter that is not stacked.
        export: converts this project's array (of that layer) to MarianMT's.
        load: converts MarianMT's array to this project's, given the shape of the result.
    """

    theirs: str
    ours: str
    layer: int | None
    export: Callable[[np.ndarray], np.ndarray]
    load: Callable[[np.ndarray, tuple[int, ...]], np.ndarray]


def flat(x: np.ndarray) -> np.ndarray:
    """Returns the array with one axis."""
    return x.reshape(-1)


def reshaped(x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Returns the array in another shape."""
    return x.reshape(shape)


def linear_table(theirs: str, ours: str, layer: int, inputs: int) -> list[Entry]:
    """Returns the entries of a linear layer.

    A kernel of this project has `inputs` leading input axes. MarianMT's weight is [out, in].
    """

    def kernel(x: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(x.reshape(int(np.prod(x.shape[:inputs])), -1).T)

    def load(x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        return x.T.reshape(shape)

    return [
        Entry(f"{theirs}.weight", f"{ours}/kernel", layer, kernel, load),
        Entry(f"{theirs}.bias", f"{ours}/bias", layer, flat, reshaped),
    ]


def layer_table(stack: str, layer: int) -> list[Entry]:
    """Returns the entries of one layer of the encoder or the decoder."""
    table = []
    for ours, theirs in LAYER.items():
        if ours.startswith("cross") and stack == "encoder":
            continue
        to, of = f"model.{stack}.layers.{layer}.{theirs}", f"{stack}/layers/{ours}"
        if ours.endswith("norm"):
            table += [
                Entry(f"{to}.{theirs_name}", f"{of}/{name}", layer, flat, reshaped)
                for theirs_name, name in (("weight", "scale"), ("bias", "bias"))
            ]
        elif ours.endswith("attention"):
            for part, name in ATTENTION.items():
                table += linear_table(f"{to}.{name}", f"{of}/{part}", layer, 2 if part == "output" else 1)
        else:
            table += linear_table(to, of, layer, 1)
    return table


def vocabulary_table(config: TransformerConfig, order: dict[str, np.ndarray]) -> list[Entry]:
    """Returns the entries with one row for each token.

    Args:
        config: options of the model.
        order: for each side ("source" and "target"), this project's ids in MarianMT's order.
    """

    def entry(theirs: str, ours: str, side: str) -> Entry:
        def export(rows: np.ndarray) -> np.ndarray:
            return np.ascontiguousarray(rows[order[side]])

        def load(theirs_rows: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
            rows = np.zeros(shape, theirs_rows.dtype)
            rows[order[side]] = theirs_rows
            return rows

        return Entry(theirs, ours, None, export, load)

    if config.share_embeddings == "all":
        table = [entry("model.shared.weight", "target_embedding/table", "target")]
    else:
        table = [
            entry("model.encoder.embed_tokens.weight", "source_embedding/table", "source"),
            entry("model.decoder.embed_tokens.weight", "target_embedding/table", "target"),
        ]
    if config.share_embeddings == "none":
        table.append(entry("lm_head.weight", "output_embedding/table", "target"))
    if config.output_bias:
        table.append(entry("final_logits_bias", "output_bias", "target"))
    return table


def parameter_table(config: TransformerConfig, order: dict[str, np.ndarray]) -> list[Entry]:
    """Returns the whole table; see `vocabulary_table` for `order`."""
    table = vocabulary_table(config, order)
    for stack, depth in (("encoder", config.num_encoder_layers), ("decoder", config.num_decoder_layers)):
        for layer in range(depth):
            table += layer_table(stack, layer)
    return table


def check_expressible(config: ModelConfig) -> TransformerConfig:
    """Returns the configuration if MarianMT has all of its options.

    Raises:
        ConfigError: MarianMT lacks an option.
    """
    if not isinstance(config, TransformerConfig):
        raise ConfigError(f"model.kind: {config.kind} cannot be written as a MarianMT model, which is a Transformer.")
    for name, value in (("norm_order", "post"), ("positions", "sinusoidal"), ("norm_epsilon", 1e-5)):
        if getattr(config, name) != value:
            raise ConfigError(
                f"model.{name}: {getattr(config, name)} cannot be written as a MarianMT model, which has {value}. "
                f"Train with model.{name}: {value}."
            )
    return config


def options_left_out(config: TransformerConfig) -> list[str]:
    """Returns the options that a MarianMT folder cannot store.

    None of them changes the meaning of the parameters.
    """
    left_out = []
    if config.embedding_dropout not in (None, config.dropout):
        left_out.append(
            f"embedding_dropout: {config.embedding_dropout} (a training from that folder uses {config.dropout})"
        )
    if config.compute_dtype != "float32":
        left_out.append(f"compute_dtype: {config.compute_dtype} (the written model computes in float32)")
    return left_out


def marian_order(tokenizer: Tokenizer, with_unused: bool = True) -> np.ndarray:
    """Returns this project's ids in MarianMT's order.

    Args:
        tokenizer: tokenizer of one side.
        with_unused: whether this project's padding id is among them.
    """
    special = tokenizer.special
    pieces = [i for i in range(tokenizer.vocab_size) if i not in special.ids]
    return np.array([special.end, special.unknown, *pieces, *([special.pad] if with_unused else []), special.start])


def vocabulary(tokenizer: Tokenizer, with_unused: bool = True) -> dict[str, int]:
    """Returns the MarianMT vocabulary: the name and the id of each token."""
    special = tokenizer.special
    named = {special.end: "</s>", special.unknown: "<unk>", special.pad: UNUSED, special.start: "<pad>"}
    order = marian_order(tokenizer, with_unused).tolist()
    names = [named.get(i, name) for i, name in zip(order, tokenizer.pieces(order), strict=True)]
    return {code_of(name) or name: number for number, name in enumerate(names)}


def code_of(piece: str) -> str | None:
    """Returns the language token that a piece of this project contains, such as ">>deu<<", or None."""
    found = re.fullmatch(f"{WORD_START}(>>.+<<)", piece)
    return found[1] if found else None


def knows_unused(config: TransformerConfig, target: Tokenizer, params: Any) -> bool:
    """Returns whether the padding token's row is part of the model; False if the import has added it."""
    # Training an imported model may change the bias of the added row a little.
    return not config.output_bias or bool(np.asarray(params["output_bias"])[target.special.pad] > NEVER / 2)


def export_weights(config: TransformerConfig, tokenizers: TokenizerPair, params: Any) -> Flat:
    """Returns MarianMT's parameters by name, in float32.

    Raises:
        InputError: MarianMT has no place for a parameter.
    """
    unused = knows_unused(config, tokenizers.target, params)
    order = {side: marian_order(getattr(tokenizers, side), unused) for side in ("source", "target")}
    table = parameter_table(config, order)
    ours = {path: np.asarray(value) for path, value in flatten_dict(params, sep="/").items()}
    if config.zero_start:
        name = "target_embedding/table"
        is_start = np.arange(len(ours[name]))[:, None] == tokenizers.target.special.start
        ours[name] = np.where(is_start, 0, ours[name])
    if homeless := sorted(set(ours) - {entry.ours for entry in table}):
        raise InputError(f"these parameters have no place in a MarianMT model: {', '.join(homeless)}.")
    weights = {}
    for entry in table:
        value = ours[entry.ours] if entry.layer is None else ours[entry.ours][entry.layer]
        weights[entry.theirs] = np.asarray(entry.export(value), np.float32)
    bias = weights.get("final_logits_bias", np.zeros(len(order["target"]), np.float32))
    return weights | {"final_logits_bias": bias[None]}


def export_config(config: TransformerConfig, tokenizers: TokenizerPair, with_unused: bool) -> dict[str, Any]:
    """Returns the contents of MarianMT's config.json."""
    source_size, target_size = (
        len(marian_order(tokenizer, with_unused)) for tokenizer in (tokenizers.source, tokenizers.target)
    )
    return {
        "architectures": ["MarianMTModel"],
        "model_type": "marian",
        "is_encoder_decoder": True,
        "vocab_size": source_size,
        "decoder_vocab_size": target_size,
        "share_encoder_decoder_embeddings": config.share_embeddings == "all",
        "tie_word_embeddings": config.share_embeddings != "none",
        "d_model": config.model_dim,
        "encoder_layers": config.num_encoder_layers,
        "decoder_layers": config.num_decoder_layers,
        "encoder_attention_heads": config.num_heads,
        "decoder_attention_heads": config.num_heads,
        "encoder_ffn_dim": config.feed_forward_dim,
        "decoder_ffn_dim": config.feed_forward_dim,
        "activation_function": config.activation,
        "scale_embedding": True,
        "static_position_embeddings": True,
        "normalize_before": False,
        "normalize_embedding": False,
        "add_final_layer_norm": False,
        "max_position_embeddings": max(config.max_source_length, config.max_target_length),
        "dropout": config.dropout,
        "attention_dropout": config.attention_dropout,
        "activation_dropout": config.activation_dropout,
        "eos_token_id": 0,
        "forced_eos_token_id": None,
        "bos_token_id": None,
        "pad_token_id": target_size - 1,
        "decoder_start_token_id": target_size - 1,
        "use_cache": True,
    }


def check_tokenizers(tokenizers: TokenizerPair) -> None:
    """Raises a `ConfigError` if a MarianMT model cannot have these tokenizers."""
    if not all(isinstance(each, SentencePieceTokenizer) for each in (tokenizers.source, tokenizers.target)):
        raise ConfigError(
            "a MarianMT model has SentencePiece tokenizers, and this run has others. Train with section 'tokenizer'."
        )
    for each in (tokenizers.source, tokenizers.target):
        if len(each.special.ids) < 4:
            raise ConfigError(
                f"a MarianMT model needs four ids, for start, end, padding and unknown; this run has {each.special}."
            )
    sizes = tokenizers.source.vocab_size, tokenizers.target.vocab_size
    if sizes[0] != sizes[1]:
        raise ConfigError(
            f"vocabularies of different sizes ({sizes[0]} and {sizes[1]}) cannot be written as a MarianMT model: "
            "both sides have the same padding id there. Train with tokenizers of the same size."
        )


def write_marian(translator: Translator, model: ModelConfig, output: Path) -> list[str]:
    """Writes a folder that `MarianMTModel.from_pretrained` and `MarianTokenizer.from_pretrained` read.

    Returns:
        The settings of section `decoding` that Hugging Face's `generate` lacks. Its outputs may differ without them.

    Raises:
        ConfigError: MarianMT lacks an option, weights are integers, tokenizers are not SentencePiece's, or the package
            safetensors is missing.
        InputError: the output folder exists already.
    """
    config = check_expressible(model)
    if is_quantized(translator.params):
        raise ConfigError("8-bit weights cannot be written as a MarianMT model; load the run without quantize.")
    if output.exists():
        raise InputError(f"{output} is there already. Choose another folder.")
    try:
        from safetensors.numpy import save_file
    except ImportError as error:
        raise ConfigError("writing a MarianMT model needs the package safetensors: pip install safetensors.") from error
    tokenizers = translator.tokenizers
    check_tokenizers(tokenizers)
    weights = export_weights(config, tokenizers, translator.params)
    unused = knows_unused(config, tokenizers.target, translator.params)
    generation, lost = export_generation(
        translator.decoding, marian_order(tokenizers.target, unused), tokenizers.target, config.max_target_length
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f"{output.name}.partial-", dir=output.parent))
    try:
        save_file(weights, partial / "model.safetensors", metadata={"format": "pt"})
        (partial / "source.spm").write_bytes(tokenizers.source.model)
        (partial / "target.spm").write_bytes(tokenizers.target.model)
        files: dict[str, Any] = {
            "config.json": export_config(config, tokenizers, unused),
            "generation_config.json": generation,
            "vocab.json": vocabulary(tokenizers.source, unused),
            "tokenizer_config.json": {
                "tokenizer_class": "MarianTokenizer",
                "model_max_length": config.max_source_length,
                "separate_vocabs": config.share_embeddings != "all",
            },
        }
        if config.share_embeddings != "all":
            files["target_vocab.json"] = vocabulary(tokenizers.target, unused)
        for name, contents in files.items():
            text = json.dumps(contents, ensure_ascii=False, indent=2)
            (partial / name).write_text(f"{text}\n", encoding="utf-8")
        partial.chmod(0o755)
        os.rename(partial, output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return lost
