"""Sequence-to-sequence learning in JAX and Flax NNX: from two parallel text files to translations.

Public names are imported at their first use. So a command can answer, or set up its process, before the libraries are
loaded.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flax_transformer.config.command_line import override as override
    from flax_transformer.config.reading import read_config as read_config
    from flax_transformer.config.recipe import Config as Config
    from flax_transformer.decoding.beam_search import BeamSearchConfig as BeamSearchConfig
    from flax_transformer.decoding.beam_search import beam_search as beam_search
    from flax_transformer.decoding.decoder_functions import DecoderFunctions as DecoderFunctions
    from flax_transformer.decoding.hypotheses import Hypotheses as Hypotheses
    from flax_transformer.decoding.length_penalty import LengthPenalty as LengthPenalty
    from flax_transformer.errors import (
        ConfigError as ConfigError,
    )
    from flax_transformer.errors import (
        DivergenceError as DivergenceError,
    )
    from flax_transformer.errors import (
        InputError as InputError,
    )
    from flax_transformer.errors import (
        RunFolderError as RunFolderError,
    )
    from flax_transformer.experiment.run import Outcome as Outcome
    from flax_transformer.experiment.run import run_experiment as run_experiment
    from flax_transformer.inference.evaluate import Scores as Scores
    from flax_transformer.inference.evaluate import evaluate as evaluate
    from flax_transformer.inference.translation import Hypothesis as Hypothesis
    from flax_transformer.inference.translation import NoTranslation as NoTranslation
    from flax_transformer.inference.translation import Translation as Translation
    from flax_transformer.inference.translator import Translator as Translator
    from flax_transformer.models.build import VocabularyInfo as VocabularyInfo
    from flax_transformer.models.build import build_model as build_model
    from flax_transformer.models.recurrent import RecurrentSeq2Seq as RecurrentSeq2Seq
    from flax_transformer.models.recurrent_config import RecurrentConfig as RecurrentConfig
    from flax_transformer.models.seq2seq import Seq2Seq as Seq2Seq
    from flax_transformer.models.transformer import Transformer as Transformer
    from flax_transformer.models.transformer_config import TransformerConfig as TransformerConfig
    from flax_transformer.shapes import Batch as Batch

__version__ = "0.1.0"

# Module that defines each public name.
_HOMES = {
    # Translate with a trained run
    "Translator": "inference.translator",
    "Translation": "inference.translation",
    "NoTranslation": "inference.translation",
    "Hypothesis": "inference.translation",
    # Train and evaluate
    "Config": "config.recipe",
    "read_config": "config.reading",
    "override": "config.command_line",
    "run_experiment": "experiment.run",
    "Outcome": "experiment.run",
    "evaluate": "inference.evaluate",
    "Scores": "inference.evaluate",
    # Build a model, or bring one
    "build_model": "models.build",
    "VocabularyInfo": "models.build",
    "Seq2Seq": "models.seq2seq",
    "Batch": "shapes",
    "Transformer": "models.transformer",
    "TransformerConfig": "models.transformer_config",
    "RecurrentSeq2Seq": "models.recurrent",
    "RecurrentConfig": "models.recurrent_config",
    # Search with any step function
    "beam_search": "decoding.beam_search",
    "BeamSearchConfig": "decoding.beam_search",
    "DecoderFunctions": "decoding.decoder_functions",
    "Hypotheses": "decoding.hypotheses",
    "LengthPenalty": "decoding.length_penalty",
    # Errors that a user can cause
    "InputError": "errors",
    "ConfigError": "errors",
    "RunFolderError": "errors",
    "DivergenceError": "errors",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]
