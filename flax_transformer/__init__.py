"""Sequence-to-sequence learning in JAX and Flax NNX: from two parallel text files to translations."""

# Translate with a trained run
# Train and evaluate
from flax_transformer.config import Config, override, read_config

# Search with any step function
from flax_transformer.decoding.beam_search import BeamSearchConfig, beam_search
from flax_transformer.decoding.hypotheses import Hypotheses
from flax_transformer.decoding.length_penalty import LengthPenalty

# What users can get wrong
from flax_transformer.errors import ConfigError, InputError, RunFolderError
from flax_transformer.experiment import Outcome, run_experiment
from flax_transformer.inference.evaluate import Scores, evaluate
from flax_transformer.inference.translator import Hypothesis, Translation, Translator

# Build a model, or bring one
from flax_transformer.models.build import VocabularyInfo, build_model
from flax_transformer.models.seq2seq import Seq2Seq
from flax_transformer.models.transformer import Transformer, TransformerConfig
from flax_transformer.shapes import Batch

__version__ = "0.1.0"

__all__ = [
    "Batch",
    "BeamSearchConfig",
    "Config",
    "ConfigError",
    "Hypotheses",
    "Hypothesis",
    "InputError",
    "LengthPenalty",
    "Outcome",
    "RunFolderError",
    "Scores",
    "Seq2Seq",
    "Transformer",
    "TransformerConfig",
    "Translation",
    "Translator",
    "VocabularyInfo",
    "beam_search",
    "build_model",
    "evaluate",
    "override",
    "read_config",
    "run_experiment",
]
