"""What a configuration says: nested frozen dataclasses, the whole one last.

Each section is defined beside what it configures; this file composes them, and defines those that belong to a
run as a whole. A section that comes in kinds (data, model) names its kind by the key `kind`.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

from flax_transformer.data.batching import BatchingConfig
from flax_transformer.data.corpus import DataConfig
from flax_transformer.data.filters import FilterConfig
from flax_transformer.data.synthetic import NumberWordsConfig
from flax_transformer.data.tokenizer import SubwordSamplingConfig, TokenizerConfig
from flax_transformer.decoding.beam_search import StopRule
from flax_transformer.decoding.length_penalty import LengthPenalty
from flax_transformer.decoding.sampling import SamplingConfig
from flax_transformer.errors import ConfigError, check_finite, check_seed
from flax_transformer.models.build import ModelConfig
from flax_transformer.models.transformer import TransformerConfig
from flax_transformer.optim.optimizer import OptimizerConfig
from flax_transformer.parallel.mesh import MeshConfig


@dataclass(frozen=True)
class TrainingConfig:
    """How long to train, and what to do on the way.

    Attributes:
        steps: updates in all.
        seed: of the parameters, the order of the data and dropout.
        label_smoothing: share of the target distribution that is uniform over the vocabulary, in [0, 1).
        r_drop: weight of R-Drop (Liang et al. 2021): each row is computed twice, with different dropout, and the
            divergence between both predictions is added to the loss; 0 computes each row once.
        ema_decay: of an exponential moving average of the parameters, which is what is evaluated, kept as the best, and
            translated with; in [0, 1), 0 keeps none.
        log_every_steps: distance of progress lines.
        evaluate_every_steps: distance of evaluations (loss and beam search) on validation text.
        evaluate_sentences: validation sentences translated at each, at most.
        best_metric: what makes one evaluation better than another: "bleu", "chrf", or "loss" (the lower).
        early_stopping_patience: evaluations in a row without a new best after which the training ends; 0 never ends it.
        checkpoint_every_steps: distance of checkpoints; every evaluation and the last step have one, too.
        keep_newest: so many of the newest checkpoints are kept.
        keep_best: so many of the best are kept beside them.
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

    def __post_init__(self):
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
        check_seed("training.seed", self.seed)
        if not 0 <= self.label_smoothing < 1:
            raise ConfigError(f"training.label_smoothing must lie in [0, 1), got {self.label_smoothing}.")
        check_finite("training", self)
        if self.r_drop < 0:
            raise ConfigError(f"training.r_drop must not be negative (0 turns it off), got {self.r_drop}.")


Method = Literal["beam", "sampling"]

# Fields of `DecodingConfig` that one method alone looks at.
METHOD_FIELDS: dict[Method, tuple[str, ...]] = {
    "beam": ("beam_size", "coverage_penalty", "stop"),
    "sampling": ("temperature", "top_k", "top_p", "min_p", "mbr_samples", "mbr_utility", "seed"),
}


@dataclass(frozen=True)
class DecodingConfig:
    """How to translate.

    Attributes:
        method: "beam" (the best outputs that a beam search finds) or "sampling" (outputs drawn at random).
        beam_size: hypotheses kept at each step; 1 is greedy search.
        length_penalty: "gnmt:0.6", "average:1.0" or "none"; see `decoding/length_penalty.py`.
        coverage_penalty: weight of a penalty on source tokens that got little attention (0.2 is usual); 0 turns it off.
        stop: when the search of a sentence ends. "exact": once no unfinished output can beat what it has found (Hugging
            Face: early_stopping "never"). "heuristic": once no unfinished output, scored as it stands, beats it
            (early_stopping False). "first_finished": once beam_size outputs are finished (early_stopping True, and
            CTranslate2). Each rule ends no later than the one before. The last two may miss a longer, better output.
        max_length_factor, max_length_offset: an output has at most factor * source tokens + offset tokens. Outputs that
            min_length, a prefix or required phrases make longer have as many tokens as those need.
        min_length: fewest tokens of an output. No length of this section counts an end token.
        force_eos: whether an output that reaches its maximum length is closed there by the end token, which then costs
            nothing, as Hugging Face's forced_eos_token_id does; without it such an output is unfinished.
        no_repeat_ngram: no sequence of so many tokens occurs twice in an output; 0 allows all.
        repetition_penalty: factor on the log-probabilities of tokens that have occurred, at least 1; part of the score.
        suppress_unknown: whether outputs may not hold the unknown token.
        suppress_sequences: texts whose tokens never occur one after the other in an output.
        suppress_tokens: tokens that no output holds, by the names of pieces: "\u2581the" begins a word, "ing" does not.
        temperature, top_k, top_p, min_p: of sampling; see `decoding/sampling.py`.
        mbr_samples: of sampling: draw so many outputs and put those first that agree best with all that were drawn
            (minimum Bayes risk); 0 puts the most probable first.
        mbr_utility: what agreement is: sacreBLEU's "chrf" or "bleu" of single sentences.
        seed: of sampling; with a sentence's text it decides what is drawn for it.
        batch_size: sentences decoded together; a part-full batch is filled up with padding.
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
        check_finite("decoding", self)
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
        """Raises a `ConfigError` if a field is set that the method does not look at."""
        SamplingConfig(self.temperature, self.top_k, self.top_p, self.min_p)
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
        """Returns these settings for a method, without those that the other one alone looks at."""
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        others = [name for other, names in METHOD_FIELDS.items() if other != method for name in names]
        return dataclasses.replace(self, method=method, **{name: defaults[name] for name in others})

    @property
    def sampling(self) -> SamplingConfig | None:
        """How to draw, or None for a beam search."""
        if self.method == "beam":
            return None
        return SamplingConfig(self.temperature, self.top_k, self.top_p, self.min_p)


@dataclass(frozen=True)
class EvaluationConfig:
    """How translations are scored.

    Attributes:
        bleu_tokenizer: sacreBLEU's: "13a" (its default) or "intl" for running text, "none" for text that is tokenised
            already, "char" where a sentence is one word.
    """

    bleu_tokenizer: Literal["13a", "intl", "char", "none"] = "13a"


@dataclass(frozen=True)
class Config:
    """A complete recipe.

    Attributes:
        run: the run folder; all that the run writes lies in it.
        init_from: run folder whose best parameters and whose tokenizer the training starts from; None starts anew.
        data: which corpus.
        filters: which training pairs are left out.
        tokenizer: how its text becomes ids.
        subword_sampling: whether training text is cut into subwords at random.
        model: which model.
        batching: how pairs become batches.
        optimizer: how parameters change.
        training: how long, and what on the way.
        decoding: how to translate.
        evaluation: how translations are scored.
        mesh: how devices are used.
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

    def __post_init__(self):
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
