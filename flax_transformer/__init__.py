"""Sequence-to-sequence learning in JAX and Flax NNX: from two parallel text files to translations."""

from flax_transformer.config import Config, override, read_config
from flax_transformer.decoding.beam_search import BeamSearchConfig, beam_search
from flax_transformer.decoding.hypotheses import Hypotheses
from flax_transformer.decoding.length_penalty import LengthPenalty
from flax_transformer.errors import ConfigError, DivergenceError, InputError, RunFolderError
from flax_transformer.experiment import Outcome, run_experiment
from flax_transformer.inference.evaluate import Scores, evaluate
from flax_transformer.inference.translator import Hypothesis, Translation, Translator
from flax_transformer.models.build import VocabularyInfo, build_model
from flax_transformer.models.rnn import RecurrentConfig, RecurrentSeq2Seq
from flax_transformer.models.seq2seq import Seq2Seq
from flax_transformer.models.transformer import Transformer, TransformerConfig
from flax_transformer.shapes import Batch

__version__ = "0.1.0"

__all__ = [
    # Translate with a trained run
    "Translator",
    "Translation",
    "Hypothesis",
    # Train and evaluate
    "Config",
    "read_config",
    "override",
    "run_experiment",
    "Outcome",
    "evaluate",
    "Scores",
    # Build a model, or bring one
    "build_model",
    "VocabularyInfo",
    "Seq2Seq",
    "Batch",
    "Transformer",
    "TransformerConfig",
    "RecurrentSeq2Seq",
    "RecurrentConfig",
    # Search with any step function
    "beam_search",
    "BeamSearchConfig",
    "Hypotheses",
    "LengthPenalty",
    # What users can get wrong
    "InputError",
    "ConfigError",
    "RunFolderError",
    "DivergenceError",
]
