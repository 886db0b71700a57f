"""Import of a MarianMT folder of Hugging Face as a run folder.

All commands take the run folder, and a training can start from it.
"""

from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from flax_transformer.config.recipe import Config
from flax_transformer.data.parallel_text import ParallelTextConfig
from flax_transformer.data.tokenizer import TokenizerConfig
from flax_transformer.data.tokenizer_pair import TokenizerPair
from flax_transformer.errors import ConfigError, InputError, shown
from flax_transformer.interop.marian import NEVER, parameter_table
from flax_transformer.interop.marian_files import read_json, read_weights
from flax_transformer.interop.marian_generation import Generation, read_generation
from flax_transformer.interop.marian_vocabulary import Vocabularies, read_vocabularies
from flax_transformer.models.build import build_model, vocabulary_info
from flax_transformer.models.transformer_config import TransformerConfig
from flax_transformer.nn.feed_forward import Activation
from flax_transformer.object_storage import AnyPath
from flax_transformer.run_folder import RunFolder
from flax_transformer.training.checkpoint import Checkpoints

# Hugging Face's names of activations -> this project's.
ACTIVATIONS: dict[str, Activation] = {"relu": "relu", "gelu": "gelu", "swish": "swish", "silu": "swish"}

# Options that this project's Transformer supports with one value only.
REQUIRED = {
    "scale_embedding": True,
    "normalize_before": False,
    "normalize_embedding": False,
    "add_final_layer_norm": False,
}

# Keys that config.json must have.
NEEDED = (
    "model_type", "d_model", "encoder_layers", "decoder_layers", "encoder_attention_heads", "decoder_attention_heads",
    "encoder_ffn_dim", "decoder_ffn_dim", "activation_function", "max_position_embeddings", "pad_token_id",
    "eos_token_id", "decoder_start_token_id", "scale_embedding",
)  # fmt: skip


def read_model_config(theirs: dict[str, Any]) -> TransformerConfig:
    """Returns this project's configuration of a MarianMT model.

    Args:
        theirs: contents of MarianMT's config.json.

    Raises:
        ConfigError: a key is missing, or this project's Transformer lacks an option.
    """
    if missing := [name for name in NEEDED if name not in theirs]:
        raise ConfigError(f"config.json lacks {', '.join(missing)}.")
    for name in NEEDED:
        wanted = str if name in ("model_type", "activation_function") else int
        if not isinstance(theirs[name], wanted):
            raise ConfigError(f"config.json: {name} must be of type {wanted.__name__}, got {shown(theirs[name])}.")
    if theirs.get("model_type") != "marian":
        raise ConfigError(f"config.json has model_type {shown(theirs.get('model_type'))}; only marian can be imported.")
    for name, value in REQUIRED.items():
        if theirs.get(name, value) != value:
            raise ConfigError(f"config.json: {name}: {theirs[name]} cannot be imported; {value} can.")
    for name in ("attention_heads", "ffn_dim"):
        if theirs[f"encoder_{name}"] != theirs[f"decoder_{name}"]:
            raise ConfigError(
                f"config.json: encoder_{name} and decoder_{name} differ. Only models with equal values can be imported."
            )
    activation = ACTIVATIONS.get(theirs["activation_function"])
    if activation is None:
        raise ConfigError(
            f"config.json: activation_function {shown(theirs['activation_function'])} cannot be imported; "
            f"{', '.join(ACTIVATIONS)} can."
        )
    shared = theirs.get("share_encoder_decoder_embeddings", True)
    tied = theirs.get("tie_word_embeddings", True)
    if shared and not tied:
        raise ConfigError(
            "config.json: both languages share a table, but the output does not. This cannot be imported."
        )
    return TransformerConfig(
        model_dim=theirs["d_model"],
        num_heads=theirs["encoder_attention_heads"],
        feed_forward_dim=theirs["encoder_ffn_dim"],
        num_encoder_layers=theirs["encoder_layers"],
        num_decoder_layers=theirs["decoder_layers"],
        max_source_length=theirs["max_position_embeddings"],
        max_target_length=theirs["max_position_embeddings"],
        activation=activation,
        share_embeddings="all" if shared else "target_output" if tied else "none",
        dropout=theirs.get("dropout", 0.1),
        attention_dropout=theirs.get("attention_dropout", 0.0),
        activation_dropout=theirs.get("activation_dropout", 0.0),
    )


def read_settings(folder: Path, theirs: dict[str, Any], vocabularies: Vocabularies, longest: int) -> Generation:
    """Returns the settings of `generate` in a MarianMT folder. Older folders keep them in config.json.

    Args:
        folder: MarianMT folder.
        theirs: contents of MarianMT's config.json.
        vocabularies: vocabularies of both sides.
        longest: most tokens of an output of the model, end token included.

    Raises:
        InputError: a setting has an unexpected type.
    """
    settings = theirs
    if (folder / "generation_config.json").is_file():
        settings = read_json(folder, "generation_config.json")
    try:
        return read_generation(settings, vocabularies.orders["target"], vocabularies.tokenizers.target, longest)
    except (TypeError, AttributeError) as error:
        raise InputError(
            f"a setting of generate in {folder} is of another type than expected ({error}). Mend it, or take it out."
        ) from error


def read_marian(folder: Path, output: AnyPath) -> tuple[RunFolder, list[str]]:
    """Makes a run folder from a MarianMT folder.

    Returns:
        The run folder, and the settings of Hugging Face's `generate` that this project lacks.

    Raises:
        ConfigError: this project's Transformer lacks an option, or a package is missing.
        InputError: a file is missing, or files contradict each other.
        RunFolderError: the output folder exists already.
    """
    run = RunFolder(output)
    run.check_unused("--output")
    theirs = read_json(folder, "config.json")
    if not isinstance(theirs, dict):
        raise InputError(f"{folder / 'config.json'} holds no settings. Is {folder} a MarianMT model's folder?")
    for name in ("pad_token_id", "eos_token_id", "decoder_start_token_id"):
        if isinstance(theirs.get(name), list) and len(theirs[name]) == 1:
            (theirs[name],) = theirs[name]
    model = read_model_config(theirs)
    weights = read_weights(folder)
    vocabularies = read_vocabularies(folder, theirs, model)
    generation = read_settings(folder, theirs, vocabularies, model.max_target_length)

    # --- options that the weights show
    start = theirs["decoder_start_token_id"]
    if start != theirs["pad_token_id"]:
        raise ConfigError("config.json: decoder_start_token_id is not pad_token_id. Such a model cannot be imported.")
    bias = weights.pop("final_logits_bias", np.zeros(len(vocabularies.orders["target"]), np.float32))
    has_bias = bool(np.any(bias != 0)) or not vocabularies.has_unused or generation.start_excluded
    table_name, *copies = table_names(model)
    if table_name not in weights and (kept := [name for name in copies if name in weights]):
        weights[table_name] = weights[kept[0]]
    zero_start = table_name in weights and not np.any(weights[table_name][start])
    model = TransformerConfig(**(vars(model) | {"output_bias": has_bias, "zero_start": zero_start}))
    if has_bias:
        weights["final_logits_bias"] = bias

    pair = vocabularies.tokenizers
    params = place_weights(model, pair, vocabularies.orders, weights)
    if not vocabularies.has_unused:
        params["output_bias"][pair.target.special.pad] = NEVER
    if generation.start_excluded:
        params["output_bias"][pair.target.special.start] = NEVER  # nothing reads MarianMT's own bias of it
    write_run(run, model, pair, generation, params)
    return run, generation.lost


def write_run(
    run: RunFolder, model: TransformerConfig, pair: TokenizerPair, generation: Generation, params: dict[str, Any]
) -> None:
    """Makes a run folder from parameters. On a disk the folder gets its name when it is complete."""
    joint = model.share_embeddings == "all" or pair.joint
    config = Config(
        run=str(run.path),
        data=ParallelTextConfig(),
        tokenizer=TokenizerConfig(vocab_size=pair.target.vocab_size, joint=joint),
        model=model,
        decoding=generation.decoding,
    )
    with run.made_whole() as made:
        made.create(config, pair)
        with Checkpoints(made.checkpoints, (1, 1), pair.fingerprint) as checkpoints:
            checkpoints.save_params(1, jax.tree.map(jax.numpy.asarray, params))


def table_names(model: TransformerConfig) -> list[str]:
    """Returns MarianMT's names of the target table.

    The first name is the table's own. The others belong to tables that are tied to it; files may contain copies of
    them.
    """
    if model.share_embeddings == "all":
        copies = [
            f"{stack}.weight" for stack in ("lm_head", "model.decoder.embed_tokens", "model.encoder.embed_tokens")
        ]
        return ["model.shared.weight", *copies]
    tied = ["lm_head.weight"] if model.share_embeddings == "target_output" else []
    return ["model.decoder.embed_tokens.weight", *tied]


def place_weights(
    model: TransformerConfig, pair: TokenizerPair, orders: dict[str, np.ndarray], weights: dict[str, np.ndarray]
) -> dict[str, Any]:
    """Returns this project's parameters, filled from MarianMT's.

    Raises:
        InputError: parameters are missing, left over, or of another shape. The message names all of them.
    """
    built = nnx.eval_shape(lambda: build_model(model, vocabulary_info(pair), rngs=nnx.Rngs(params=0)))
    shapes = nnx.to_pure_dict(nnx.state(built))
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)
    table = parameter_table(model, orders)
    filled = set()
    wrong = []
    table_name, *copies = table_names(model)
    for entry in table:
        place = params
        *parents, name = entry.ours.split("/")
        for parent in parents:
            place = place[parent]
        if entry.theirs not in weights:
            wrong.append(f"{entry.theirs} is missing")
            continue
        target = place[name] if entry.layer is None else place[name][entry.layer]
        try:
            target[...] = entry.load(weights[entry.theirs], target.shape)
        except (ValueError, IndexError):
            wrong.append(f"{entry.theirs} has shape {weights[entry.theirs].shape}, which does not fit {target.shape}")
        filled.add(entry.theirs)
    for name in sorted(set(weights) - filled):
        if name.endswith("embed_positions.weight"):  # positions are computed
            continue
        if name in copies and table_name in weights and np.array_equal(weights[name], weights[table_name]):
            continue
        wrong.append(f"{name} has no place")
    if wrong:
        raise InputError(f"the model's parameters do not fit its config.json: {'; '.join(wrong)}.")
    return params
