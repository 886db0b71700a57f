"""The first recipe for a corpus and a machine, with the reason of each choice.

The sizes are those of recipes with published or measured results, in the order of their corpora:

- Transformer-Tiny for Multi30k (Wu et al. 2021, "Good for Misconceived Reasons"), in the forms of
  `configs/multi30k_en_de_tiny.yaml` and `configs/multi30k_en_de_best.yaml`.
- fairseq's Transformer for IWSLT 2014 (`configs/iwslt14_de_en.yaml`).
- Transformer-base for WMT 2014 (Vaswani et al. 2017; `configs/wmt14_en_de_base.yaml`).

Below the size of Multi30k the vocabulary and the batches are smaller still (Sennrich and Zhang 2019, "Revisiting
Low-Resource Neural Machine Translation", section 4). Araabi and Monz 2020, "Optimizing Transformer for Low-Resource
Neural Machine Translation", measured how much such choices matter for the Transformer.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from flax_transformer.config.commented_recipe import CommentedRecipe
from flax_transformer.data.batching import TokenizedPairs
from flax_transformer.data.text_survey import UNEQUAL_RATIO, TextSurvey

# Share of the training pairs that must be within the model's lengths, and the limits of these lengths.
KEPT_SHARE = 0.999
LENGTH_MULTIPLE = 32
LEAST_LENGTH, MOST_LENGTH = 64, 256

# A language with more characters than this share of the vocabulary gets no piece for its rarest characters. The README
# of google/sentencepiece recommends this coverage for languages of rich character sets.
MOST_CHARACTERS = 0.25
RICH_COVERAGE = 0.9995

# Both languages share a vocabulary if at least this share of the target's letters occurs in the source.
LEAST_SHARED_LETTERS = 0.5

# Copied pairs are left out if they are more than this share of the text.
MOST_COPIED = 0.01

# Number of evaluations of a training, if they do not take more than this share of its time.
EVALUATIONS, LEAST_EVALUATIONS = 10, 2
EVALUATION_SHARE = 0.2

STEP_MULTIPLE = 100


# --- the size, by corpus and machine


@dataclass(frozen=True)
class Size:
    """Sizes for corpora of at least some number of pairs.

    Attributes:
        least_pairs: least number of training pairs.
        vocab_size: number of pieces.
        model_dim, num_heads, feed_forward_dim, num_layers: sizes of the model, with as many encoder as decoder layers.
        dropout: rate of dropout.
        tokens_per_batch: number of tokens of a batch.
        epochs: number of epochs of a whole training.
        optimizer: "muon" with a rate that falls linearly, or "adam" with one that falls with the root of the steps.
        learning_rate: highest rate.
        source: where the sizes come from.
    """

    least_pairs: int
    vocab_size: int
    model_dim: int
    num_heads: int
    feed_forward_dim: int
    num_layers: int
    dropout: float
    tokens_per_batch: int
    epochs: int
    optimizer: Literal["muon", "adam"]
    learning_rate: float
    source: str


LEAST_STEPS, MOST_STEPS = 3_000, 100_000

SIZES = (
    Size(0, 2_000, 128, 4, 256, 4, 0.3, 2_048, 50, "muon", 3e-3,
         "Transformer-Tiny (Wu et al. 2021), with the small vocabulary and batches of Sennrich and Zhang 2019"),
    Size(15_000, 5_000, 128, 4, 512, 4, 0.3, 4_096, 45, "muon", 4e-3,
         "configs/multi30k_en_de_best.yaml, after Transformer-Tiny (Wu et al. 2021): 29,000 pairs"),
    Size(60_000, 10_000, 512, 4, 1_024, 6, 0.3, 4_096, 50, "adam", 5e-4,
         "configs/iwslt14_de_en.yaml, after fairseq's transformer_iwslt_de_en: 160,000 pairs"),
    Size(1_000_000, 32_000, 512, 8, 2_048, 6, 0.1, 25_000, 20, "adam", 7e-4,
         "configs/wmt14_en_de_base.yaml, Transformer-base (Vaswani et al. 2017): 4.5 million pairs"),
)  # fmt: skip

# The largest model for a CPU. Larger ones take days there.
ON_CPU = Size(60_000, 10_000, 256, 4, 1_024, 3, 0.2, 4_096, 20, "adam", 7e-4,
              "model 'd 256' of docs/performance.md, since larger ones take days on a CPU")  # fmt: skip


@dataclass(frozen=True)
class Machine:
    """The devices of a training.

    Attributes:
        platform: "cpu", "gpu" or "tpu".
        num_devices: number of devices.
        kind: name of a device.
        memory_bytes: memory of a device, or None if it is not known.
    """

    platform: str
    num_devices: int
    kind: str
    memory_bytes: int | None

    @property
    def text(self) -> str:
        """The machine in a few words."""
        memory = "" if self.memory_bytes is None else f", {self.memory_bytes / 2**30:,.0f} GiB each"
        name = "CPU cores" if self.platform == "cpu" else f"devices ({self.kind})"
        return f"{self.num_devices} {name}{memory}"


def choose_size(num_pairs: int, machine: Machine) -> Size:
    """Returns the sizes for a number of training pairs."""
    size = next(size for size in reversed(SIZES) if num_pairs >= size.least_pairs)
    return ON_CPU if machine.platform == "cpu" and size.model_dim > ON_CPU.model_dim else size


# --- section tokenizer


def add_tokenizer(recipe: CommentedRecipe, survey: TextSurvey, size: Size, num_pairs: int) -> None:
    """Adds the sections of the filters and the tokenizer."""
    recipe.set(
        f"{survey.num_unequal:,} pairs have sides of very different length; the ratio is the default of Moses' "
        "clean-corpus-n.perl",
        filters__max_length_ratio=UNEQUAL_RATIO,
    )
    about = "" if survey.pairs.exact else "about "
    if survey.num_duplicates:
        recipe.set(
            f"{about}{survey.num_duplicates:,} pairs repeat an earlier one, and would weigh more than others",
            filters__drop_duplicates=True,
        )
    if survey.num_copied > MOST_COPIED * survey.num_pairs:
        recipe.set(
            f"{survey.num_copied:,} pairs ({survey.num_copied / survey.num_pairs:.1%}) have the same text on both "
            "sides; a model learns to copy from them (Khayrallah and Koehn 2018)",
            filters__drop_identical=True,
        )
    characters = max(len(survey.source.counts), len(survey.target.counts))
    rich = characters > MOST_CHARACTERS * size.vocab_size
    needed = max(side.num_characters(RICH_COVERAGE) for side in (survey.source, survey.target))
    vocab_size = max(size.vocab_size, 1_000 * -(-2 * needed // 1_000)) if rich else size.vocab_size
    recipe.set(
        f"for {num_pairs:,} pairs: {size.source}"
        + (f"; the text has {characters:,} different characters on a side" if vocab_size > size.vocab_size else ""),
        tokenizer__vocab_size=vocab_size,
    )
    if survey.shared_letters < LEAST_SHARED_LETTERS:
        recipe.set(
            f"{survey.shared_letters:.0%} of the target's letters occur in the source, so the languages share no "
            "pieces",
            tokenizer__joint=False,
        )
        recipe.set("two vocabularies have no table in common", model__share_embeddings="target_output")
    else:
        recipe.set(
            f"{survey.shared_letters:.0%} of the target's letters occur in the source, so names and numbers share "
            "pieces (Vaswani et al. 2017, section 5.1)",
            tokenizer__joint=True,
        )
    if rich:
        recipe.set(
            f"{characters:,} different characters: the rarest become unknown tokens, as SentencePiece recommends for "
            "such scripts",
            tokenizer__character_coverage=RICH_COVERAGE,
        )


# --- section model


def length_limit(lengths: np.ndarray) -> int:
    """Returns a limit that keeps `KEPT_SHARE` of [number of pairs] lengths, as far as `MOST_LENGTH` allows."""
    needed = int(np.quantile(lengths, KEPT_SHARE, method="higher"))
    return int(np.clip(-(-needed // LENGTH_MULTIPLE) * LENGTH_MULTIPLE, LEAST_LENGTH, MOST_LENGTH))


def add_model(recipe: CommentedRecipe, pairs: TokenizedPairs, size: Size, machine: Machine) -> None:
    """Adds the section of the model.

    Args:
        recipe: the recipe so far.
        pairs: training pairs of any length.
        size: result of `choose_size`.
        machine: the devices.
    """
    recipe.set(size.source, model__kind="transformer", model__model_dim=size.model_dim)
    recipe.set(
        "",
        model__num_heads=size.num_heads,
        model__feed_forward_dim=size.feed_forward_dim,
        model__num_encoder_layers=size.num_layers,
        model__num_decoder_layers=size.num_layers,
    )
    limits = [length_limit(pairs.lengths[:, side]) for side in (0, 1)]
    mean, longest = pairs.lengths.mean(axis=0), pairs.lengths.max(axis=0)
    beyond = int((pairs.lengths > np.array(limits)).any(axis=1).sum())
    recipe.set(
        f"in tokens: the mean is {mean[0]:.1f} and {mean[1]:.1f}, the longest {longest[0]:,} and {longest[1]:,}; "
        f"{beyond:,} of {len(pairs):,} pairs are longer and left out",
        model__max_source_length=limits[0],
        model__max_target_length=limits[1],
    )
    recipe.set(
        'trains on batches of any size (docs/lab_book.md, "Published Transformer-Tiny set-up")', model__norm_order="pre"
    )
    recipe.set(
        "the smaller the corpus, the more of it",
        model__dropout=size.dropout,
        model__activation_dropout=0.0,
    )
    if machine.platform != "cpu":
        recipe.set("accelerators multiply it several times as fast", model__compute_dtype="bfloat16")


# --- section batching


def add_batching(recipe: CommentedRecipe, size: Size, machine: Machine, num_micro_batches: int = 1) -> None:
    """Adds the section of the batches. `num_micro_batches` is above 1 if a whole batch does not fit the memory."""
    recipe.set("goes with the size of the model", batching__tokens_per_batch=size.tokens_per_batch)
    recipe.set("each shape is compiled once; more shapes leave less padding", batching__num_buckets=6)
    if num_micro_batches > 1:
        recipe.set(
            "a whole batch at once does not fit the memory of a device",
            batching__gradient_accumulation_steps=num_micro_batches,
        )
    if machine.num_devices > 8:
        recipe.set("rows of a batch are split over all devices", batching__row_multiple=machine.num_devices)


# --- sections training and optimizer


def num_steps(size: Size, batches_per_epoch: int) -> int:
    """Returns the number of steps of a whole training, from the number of batches in an epoch."""
    steps = min(max(size.epochs * batches_per_epoch, LEAST_STEPS), MOST_STEPS)
    return -(-steps // STEP_MULTIPLE) * STEP_MULTIPLE


def reason_of_steps(size: Size, batches_per_epoch: int) -> str:
    """Returns the reason of the number of steps that `num_steps` gives."""
    steps, usual = num_steps(size, batches_per_epoch), size.epochs * batches_per_epoch
    limit = f"at least {LEAST_STEPS:,} steps" if usual < LEAST_STEPS else f"at most {MOST_STEPS:,} steps"
    epochs = f"{steps / batches_per_epoch:.0f} epochs of {batches_per_epoch:,} batches"
    text = f"{epochs}; {size.epochs} are usual for this size"
    return text if LEAST_STEPS <= usual <= MOST_STEPS else f"{text}, but {limit}"


def num_evaluations(training_seconds: float, evaluation_seconds: float) -> int:
    """Returns the number of evaluations of a training, so that they take a fifth of its time at most."""
    return int(np.clip(EVALUATION_SHARE * training_seconds / evaluation_seconds, LEAST_EVALUATIONS, EVALUATIONS))


def add_evaluations(recipe: CommentedRecipe, steps: int, number: int) -> None:
    """Adds the intervals of evaluations and checkpoints to section `training`."""
    recipe.set(
        f"{number} evaluations; the best by BLEU is kept, tested and translated with",
        training__evaluate_every_steps=-(-steps // number),
    )
    recipe.set("", training__checkpoint_every_steps=-(-steps // EVALUATIONS))


def add_training(recipe: CommentedRecipe, size: Size, steps: int, why_steps: str, num_validation: int) -> None:
    """Adds the sections of the optimiser and the training.

    Args:
        recipe: the recipe so far.
        size: result of `choose_size`.
        steps: number of steps.
        why_steps: reason of this number.
        num_validation: number of validation pairs.
    """
    warm_up = min(max(steps // 10, 100), 4_000)
    if size.optimizer == "muon":
        recipe.set(
            'needs fewer updates than Adam at this size (docs/lab_book.md, "Muon in place of Adam")',
            optimizer__name="muon",
        )
        recipe.set(
            "the rate rises in a tenth of the steps, and falls to nothing at the last one; if you change "
            "training.steps, change decay_steps with it",
            optimizer__schedule="linear",
            optimizer__learning_rate=size.learning_rate,
            optimizer__warmup_steps=warm_up,
            optimizer__decay_steps=steps,
        )
        recipe.set("configs/multi30k_en_de_best.yaml: Muon limits its updates itself", optimizer__clip_norm=0.0)
    else:
        recipe.set(
            "Adam, whose rate rises, then falls with the root of the number of steps, as in the recipe that the sizes "
            "come from",
            optimizer__name="adam",
            optimizer__schedule="inverse_sqrt",
            optimizer__learning_rate=size.learning_rate,
            optimizer__warmup_steps=warm_up,
        )
    recipe.set(why_steps, training__steps=steps)
    recipe.set("Vaswani et al. 2017, section 5.4", training__label_smoothing=0.1)
    recipe.set(
        "evaluations use the mean of the last updates' parameters, which is steadier than the last ones",
        training__ema_decay=0.998,
    )
    recipe.set("", training__log_every_steps=min(100, max(steps // 50, 1)))
    recipe.set("the first lines of the validation text", training__evaluate_sentences=min(num_validation, 1_000))
    add_evaluations(recipe, steps, EVALUATIONS)
    recipe.set("for TensorBoard, which also gets some translations", training__draw_attention=True)


# --- sections decoding and evaluation


def add_decoding(recipe: CommentedRecipe, survey: TextSurvey, pairs: TokenizedPairs) -> None:
    """Adds the sections of decoding and evaluation."""
    recipe.set("configs/multi30k_en_de_best.yaml", decoding__beam_size=5, decoding__length_penalty="average:1.0")
    source, target = pairs.lengths.sum(axis=0)
    if (ratio := float(target / source)) > 1.5:
        recipe.set(
            f"the target has {ratio:.1f} times the tokens of the source",
            decoding__max_length_factor=round(2 * ratio, 1),
        )
    recipe.set("sentences that are translated together", decoding__batch_size=64)
    tokenizer, reason = bleu_tokenizer(survey)
    recipe.set(reason, evaluation__bleu_tokenizer=tokenizer)


def bleu_tokenizer(survey: TextSurvey) -> tuple[str, str]:
    """Returns the name of sacreBLEU's tokenizer for the target language, and the reason."""
    target = survey.target
    kana = target.share_of_script("HIRAGANA", "KATAKANA")
    han = target.share_of_script("CJK UNIFIED")
    if kana > 0.1:
        return "char", (
            "the target is Japanese, and each character counts as a word; ja-mecab finds words, after pip install "
            "'sacrebleu[ja]'"
        )
    if han > 0.5:
        return "zh", "the target is written in Chinese characters"
    if target.share_of_script("HANGUL") > 0.5:
        return "char", "the target is Korean; ko-mecab finds words, after pip install 'sacrebleu[ko]'"
    if not target.writes_spaces:
        return "char", "the target has no spaces between words, so each character counts as a word"
    return "13a", "sacreBLEU's default, for languages with spaces between words"
