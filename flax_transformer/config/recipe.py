"""The configuration of a run, as nested frozen dataclasses; `Config` is the whole.

Each section is defined beside what it configures. This file joins the sections, and defines those of a run as a whole.
Sections `data` and `model` have several kinds. The key `kind` names the kind.
"""

import dataclasses
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Literal

from sacrebleu.metrics import BLEU

from flax_transformer.data.batching import BatchingConfig
from flax_transformer.data.corpus import DataConfig
from flax_transformer.data.filters import FilterConfig
from flax_transformer.data.parallel_text import ParallelTextConfig
from flax_transformer.data.synthetic import NumberWordsConfig
from flax_transformer.data.tokenizer import SubwordSamplingConfig, TokenizerConfig
from flax_transformer.decoding.length_penalty import LengthPenalty
from flax_transformer.decoding.sampling import TokenSampling
from flax_transformer.decoding.stop_rules import StopRule
from flax_transformer.errors import ConfigError, check_fields, check_seed, did_you_mean, shown
from flax_transformer.models.build import ModelConfig
from flax_transformer.models.transformer_config import TransformerConfig
from flax_transformer.optim.optimizer import OptimizerConfig
from flax_transformer.parallel.mesh import MeshConfig

# --- section training


@dataclass(frozen=True)
class TrainingConfig:
    """Length and loss of a training, and what it logs, evaluates and saves.

    Attributes:
        steps: number of updates.
        seed: seed of the first parameters, of the order of the data, and of dropout.
        label_smoothing: share of the target distribution that is uniform over the vocabulary, in [0, 1).
        r_drop: weight of R-Drop in the loss (Liang et al. 2021); 0 turns it off. R-Drop computes each pair twice with
            different dropout, and adds the divergence of both predictions to the loss.
        ema_decay: decay of an exponential moving average of the parameters, in [0, 1); 0 keeps no average. Evaluations
            and translations use the average where there is one.
        log_every_steps: number of steps between progress lines.
        evaluate_every_steps: number of steps between evaluations. An evaluation computes the loss of the validation
            text, translates it and scores the translations.
        evaluate_sentences: maximum number of validation sentences to translate in an evaluation.
        best_metric: metric that decides which evaluation is the best: "bleu", "chrf" or "loss" (lowest).
        early_stopping_patience: number of evaluations in a row without a new best that ends the training; 0 turns early
            stopping off.
        checkpoint_every_steps: number of steps between checkpoints. Every evaluation and the last step save one, too.
        keep_newest: number of newest checkpoints to keep.
        keep_best: number of best checkpoints to keep beside the newest.
        draw_attention: whether each evaluation draws the attention of one of its sentences, for TensorBoard. A first
            picture, or one of a longer output, compiles a small program.
        profile_steps: number of steps to profile for TensorBoard, after the first steps of a start; 0 profiles none.
    """

    steps: int = 2_000
    seed: int = 0
    label_smoothing: float = 0.1
    r_drop: float = 0.0
    ema_decay: float = 0.0
    log_every_steps: int = 50
    evaluate_every_steps: int = 500
    evaluate_sentences: int = 512
    best_metric: Literal["bleu", "chrf", "loss"] = "bleu"
    early_stopping_patience: int = 0
    checkpoint_every_steps: int = 500
    keep_newest: int = 2
    keep_best: int = 1
    draw_attention: bool = False
    profile_steps: int = 0

    def __post_init__(self):
        check_fields("training", self)
        for name in ("steps", "log_every_steps", "evaluate_every_steps", "evaluate_sentences",
                     "checkpoint_every_steps", "keep_newest", "keep_best"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ConfigError(f"training.{name} must be at least 1, got {getattr(self, name)}.")
        if not 0 <= self.ema_decay < 1:
            raise ConfigError(f"training.ema_decay must lie in [0, 1), got {self.ema_decay}.")
        if self.early_stopping_patience < 0:
            raise ConfigError(
                f"training.early_stopping_patience must not be negative (0 turns it off), got "
                f"{self.early_stopping_patience}."
            )
        if self.profile_steps < 0:
            raise ConfigError(
                f"training.profile_steps must not be negative (0 profiles none), got {self.profile_steps}."
            )
        check_seed("training.seed", self.seed)
        if not 0 <= self.label_smoothing < 1:
            raise ConfigError(f"training.label_smoothing must lie in [0, 1), got {self.label_smoothing}.")
        if self.r_drop < 0:
            raise ConfigError(f"training.r_drop must not be negative (0 turns it off), got {self.r_drop}.")


# --- section decoding

Method = Literal["beam", "sampling"]

# Fields of `DecodingConfig` that only one method uses.
METHOD_FIELDS: dict[Method, tuple[str, ...]] = {
    "beam": ("beam_size", "coverage_penalty", "stop"),
    "sampling": ("temperature", "top_k", "top_p", "min_p", "mbr_samples", "mbr_utility", "seed"),
}


@dataclass(frozen=True)
class DecodingConfig:
    """Settings of beam search and sampling.

    Attributes:
        method: "beam" for beam search, or "sampling" for outputs drawn at random.
        beam_size: number of hypotheses kept at each step of a beam search; 1 is greedy search.
        length_penalty: divisor of an output's log-probability: "gnmt:0.6", "average:1.0" or "none". A larger exponent
            favours longer outputs.
        coverage_penalty: weight of a penalty on source tokens that got little attention, in a beam search; 0 turns it
            off. GNMT uses 0.2.
        stop: rule that ends the beam search of a sentence. "exact" ends it when no unfinished output can beat the
            finished ones (Hugging Face: early_stopping "never"). "heuristic" compares unfinished outputs by their
            present score (early_stopping False). "first_finished" ends it when beam_size outputs are finished (as
            early_stopping True and CTranslate2). The last two are faster, and may miss a longer, better output.
        max_length_factor: factor in the maximum length of an output. The maximum is max_length_factor * source tokens +
            max_length_offset. It grows where min_length, a prefix or required phrases need more tokens.
        max_length_offset: offset in the maximum length of an output; see max_length_factor.
        min_length: minimum length of an output. The lengths of this section do not count the end token.
        force_eos: whether the end token closes an output at its maximum length, and costs nothing there (Hugging Face:
            forced_eos_token_id). Otherwise such an output is unfinished.
        no_repeat_ngram: size of the n-grams that occur at most once in an output; 0 allows repetition.
        repetition_penalty: factor, at least 1, on the log-probability of each token that the output already contains.
            It is part of the score.
        suppress_unknown: whether the unknown token is excluded from outputs.
        suppress_sequences: texts that are excluded from outputs, each as the tokens that the tokenizer cuts it into.
        suppress_tokens: tokens that are excluded from outputs, by their pieces. "\u2581the" begins a word, "ing" does
            not.
        temperature: divisor of the logits in sampling; below 1 it favours probable tokens.
        top_k: number of most probable tokens to sample from; 0 allows all.
        top_p: probability mass in sampling. It keeps the fewest most probable tokens that have this mass; 1 allows all.
        min_p: minimum probability in sampling, as a share of the highest probability; 0 allows all.
        mbr_samples: number of samples for minimum Bayes risk, which puts first the sample that agrees best with all
            samples. With 0 the most probable sample comes first.
        mbr_utility: measure of agreement for mbr_samples: sacreBLEU's "chrf" or "bleu" of single sentences. BLEU takes
            the tokenizer "13a" here, so "chrf" is better for text without spaces between words.
        seed: seed of sampling. What is drawn for a sentence depends on the seed and on its text alone.
        batch_size: number of sentences decoded together. Padding fills up a smaller batch.
    """

    method: Method = "beam"
    beam_size: int = 5
    length_penalty: str = "gnmt:0.6"
    coverage_penalty: float = 0.0
    stop: StopRule = "exact"
    max_length_factor: float = 2.0
    max_length_offset: int = 10
    min_length: int = 0
    force_eos: bool = False
    no_repeat_ngram: int = 0
    repetition_penalty: float = 1.0
    suppress_unknown: bool = False
    suppress_sequences: tuple[str, ...] = ()
    suppress_tokens: tuple[str, ...] = ()
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    mbr_samples: int = 0
    mbr_utility: Literal["chrf", "bleu"] = "chrf"
    seed: int = 0
    batch_size: int = 32

    def __post_init__(self):
        check_fields("decoding", self)
        check_seed("decoding.seed", self.seed)
        LengthPenalty.parse(self.length_penalty)
        for name in ("beam_size", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"decoding.{name} must be at least 1, got {getattr(self, name)}.")
        for name in ("coverage_penalty", "min_length", "no_repeat_ngram", "mbr_samples"):
            if getattr(self, name) < 0:
                raise ConfigError(f"decoding.{name} must not be negative, got {getattr(self, name)}.")
        if self.repetition_penalty < 1:
            raise ConfigError(
                f"decoding.repetition_penalty must be at least 1, got {self.repetition_penalty}: a smaller one would "
                "make what has occurred more probable."
            )
        if not all(phrase.strip() for phrase in self.suppress_sequences):
            raise ConfigError("decoding.suppress_sequences: an empty text cannot be suppressed.")
        if (
            self.max_length_factor < 0
            or self.max_length_offset < 0
            or self.max_length_factor + self.max_length_offset < 1
        ):
            raise ConfigError(
                "decoding.max_length_factor and max_length_offset must not be negative and must leave room for one "
                f"token, got {self.max_length_factor} and {self.max_length_offset}."
            )
        self._check_method()

    def _check_method(self) -> None:
        """Raises a `ConfigError` if a field is set that the method does not use."""
        TokenSampling(self.temperature, self.top_k, self.top_p, self.min_p)
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        if self.mbr_utility != defaults["mbr_utility"] and not self.mbr_samples:
            raise ConfigError(
                f"decoding.mbr_utility ({self.mbr_utility}) compares the samples of decoding.mbr_samples, and that is "
                "0. Say how many to draw, or leave mbr_utility out."
            )
        for name in METHOD_FIELDS["sampling" if self.method == "beam" else "beam"]:
            if getattr(self, name) != defaults[name]:
                raise ConfigError(
                    f"decoding.{name} ({getattr(self, name)}) and decoding.method: {self.method} contradict each "
                    f"other: that method does not use it. Leave {name} out, or choose the other method."
                )

    def with_method(self, method: Method) -> "DecodingConfig":
        """Returns these settings for `method`; fields that only the other method uses get their defaults."""
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        others = [name for other, names in METHOD_FIELDS.items() if other != method for name in names]
        return dataclasses.replace(self, method=method, **{name: defaults[name] for name in others})

    @property
    def sampling(self) -> TokenSampling | None:
        """The settings of sampling, or None for a beam search."""
        if self.method == "beam":
            return None
        return TokenSampling(self.temperature, self.top_k, self.top_p, self.min_p)


# --- section evaluation


@dataclass(frozen=True)
class EvaluationConfig:
    """Settings of the scores of translations.

    Attributes:
        bleu_tokenizer: name of a tokenizer of sacreBLEU, which finds the words for BLEU; `sacrebleu --help` lists all.
            Its default, "13a", and "intl" split at spaces and punctuation. For Chinese there is "zh", for Japanese
            there is "ja-mecab", for Korean "ko-mecab", and for any language "flores200". With "char", each character is
            a word. With "none", text stays as it is, which is right for text that is tokenised already.
    """

    bleu_tokenizer: str = "13a"

    def __post_init__(self):
        check_fields("evaluation", self)
        if self.bleu_tokenizer not in BLEU.TOKENIZERS:
            raise ConfigError(
                f"evaluation.bleu_tokenizer: sacreBLEU {version('sacrebleu')} has no tokenizer "
                f"{shown(self.bleu_tokenizer)}.{did_you_mean(self.bleu_tokenizer, BLEU.TOKENIZERS)}"
            )


# --- the whole recipe


@dataclass(frozen=True)
class Config:
    """A complete recipe.

    Attributes:
        run: run folder, which gets all files that the run writes.
        init_from: run folder to start from, with its best parameters and its tokenizer; None starts anew.
        data: the corpus.
        filters: rules that leave out training pairs.
        tokenizer: the tokenizer, and how it is learnt.
        subword_sampling: random segmentations of the training text.
        model: the model, and its sizes.
        batching: the batches of a training.
        optimizer: the optimiser, and the schedule of its learning rate.
        training: length and loss of a training, and what it logs, evaluates and saves.
        decoding: settings of beam search and sampling.
        evaluation: settings of the scores of translations.
        mesh: the mesh of devices.

    Raises:
        ConfigError: a value is out of range, or fields contradict each other.

    Example:
        >>> config = Config(run="runs/wide", model=TransformerConfig(model_dim=256, num_heads=8))
        >>> config.model.model_dim, config.training.label_smoothing
        (256, 0.1)
    """

    run: str = "runs/number_words"
    init_from: str | None = None
    data: DataConfig = field(default_factory=NumberWordsConfig)
    filters: FilterConfig = field(default_factory=FilterConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    subword_sampling: SubwordSamplingConfig = field(default_factory=SubwordSamplingConfig)
    model: ModelConfig = field(default_factory=TransformerConfig)
    batching: BatchingConfig = field(default_factory=BatchingConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    decoding: DecodingConfig = field(default_factory=DecodingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)

    @property
    def text_format(self) -> ParallelTextConfig:
        """The columns and keys of text files that the run reads after its training."""
        return self.data if isinstance(self.data, ParallelTextConfig) else ParallelTextConfig()

    def __post_init__(self):
        check_fields("", self)
        self.subword_sampling.check_algorithm(self.tokenizer.algorithm)
        if self.batching.packing and not self.model.supports_packing:
            raise ConfigError(
                f"batching.packing: true puts several pairs into a row, and model.kind {self.model.kind} cannot tell "
                "them apart. Set batching.packing: false."
            )
        if self.training.r_drop and not any(
            getattr(self.model, f.name) for f in dataclasses.fields(self.model) if f.name.endswith("dropout")
        ):
            raise ConfigError(
                f"training.r_drop: {self.training.r_drop} compares two passes with different dropout, and section "
                "'model' has none. Set model.dropout, or training.r_drop: 0."
            )
        if self.model.share_embeddings == "all" and not self.tokenizer.joint:
            raise ConfigError(
                "model.share_embeddings: all needs one vocabulary for both languages, but tokenizer.joint is false. "
                "Set tokenizer.joint: true, or model.share_embeddings: target_output."
            )
