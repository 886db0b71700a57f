"""A whole run: corpus, tokenizer, training, evaluation, pictures."""

import functools
import platform
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from flax_transformer.config import Config
from flax_transformer.data.batching import Plan, Position, TokenizedPairs, data_fingerprint, same_text
from flax_transformer.data.corpus import load_corpus
from flax_transformer.data.loader import evaluation_batches, evaluation_plan, training_batches, training_plan
from flax_transformer.data.parallel_text import Corpus, ParallelText
from flax_transformer.data.preparation import held_out_pairs, prepare_tokenizers, prepare_training_pairs
from flax_transformer.data.tokenizer_pair import TokenizerPair
from flax_transformer.errors import ConfigError, RunFolderError
from flax_transformer.inference.attention_map import attention_map
from flax_transformer.inference.evaluate import Scores, evaluate
from flax_transformer.inference.translation import NoTranslation, cut_line, no_output_line, texts_or_empty
from flax_transformer.inference.translator import Translator
from flax_transformer.models.build import vocabulary_info
from flax_transformer.parallel.memory import held_bytes, needed_bytes
from flax_transformer.parallel.mesh import batch_sharding, check_rows, make_mesh
from flax_transformer.plots.attention import plot_attention
from flax_transformer.plots.curves import plot_curves
from flax_transformer.run_folder import RunFolder
from flax_transformer.training.checkpoint import Checkpoints, checksums_of
from flax_transformer.training.loop import compile_steps, shape_of, train_loop
from flax_transformer.training.metrics import LossSummary
from flax_transformer.training.optimizer import make_optimizer, make_schedule
from flax_transformer.training.run_log import RunLog, read_metrics
from flax_transformer.training.state import StateLayout, init_state, make_layout
from flax_transformer.training.step import Objective, jit_evaluation_step, jit_train_step
from flax_transformer.training.throughput import ProductCost, peak_flops

NUM_SAMPLES = 10

# What a resumed run must have as it was; of section training some fields, see `_check_same_recipe`.
SECTIONS_KEPT = (
    "init_from", "data", "filters", "tokenizer", "subword_sampling", "model", "batching", "optimizer", "decoding",
    "evaluation",
)  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        folder: the run folder.
        scores: on the test part; None when a signal stopped the training.
        signal: which one did, or None.
    """

    folder: RunFolder
    scores: Scores | None
    signal: int | None


def run_experiment(config: Config, resume: bool = False) -> Outcome:
    """Trains as `config` says, evaluates on the test part, and leaves everything in the run folder.

    Args:
        config: the recipe; `config.run` names the folder.
        resume: go on from the newest checkpoint of that folder. Everything but the number of steps, the intervals,
            patience and the mesh must be as it was.

    Raises:
        InputError: bad files, a bad configuration, or a run folder in the wrong state.
    """
    started = time.monotonic()
    folder = RunFolder(config.run)
    _check_trainable(config)
    if resume:
        _check_same_recipe(folder, config)
    else:
        folder.check_unused()
    mesh = make_mesh(config.mesh)
    corpus = load_corpus(config.data)
    parent = None if config.init_from is None or resume else _parent(config)
    tokenizers = folder.tokenizers() if resume else tokenizers_of_new_run(config, corpus)
    if resume:
        with Checkpoints(folder.checkpoints, tokenizers=tokenizers.fingerprint) as checkpoints:
            checkpoints.check_tokenizers()
    limits = config.model.max_source_length, config.model.max_target_length
    train = prepare_training_pairs(corpus.train, tokenizers, config.filters, *limits, config.subword_sampling)
    fingerprint = data_fingerprint(train, drawn=config.subword_sampling.alpha > 0)
    validation = held_out_pairs(corpus.validation, tokenizers, *limits)
    plan = training_plan(train, config.batching, config.training.seed)
    validation_plan = evaluation_plan(validation.lengths, config.batching, mesh.shape["data"] * mesh.shape["fsdp"])
    for shape in plan.shapes:
        check_rows(
            shape.rows // config.batching.micro_batches,
            mesh,
            ("data", "fsdp"),
            "a batch, or a piece of it if it is cut",
            f" Set batching.row_multiple: {mesh.shape['data'] * mesh.shape['fsdp']}.",
        )

    schedule = make_schedule(config.optimizer, config.model.model_dim)
    optimizer = make_optimizer(config.optimizer, schedule)
    vocabulary = vocabulary_info(tokenizers)
    layout = make_layout(config.model, vocabulary, optimizer, mesh, config.training.ema_decay)
    start = None if parent is None else _best_params(parent, layout, tokenizers)
    objective = Objective(config.training.label_smoothing, config.training.r_drop)
    step = jit_train_step(
        layout,
        schedule,
        objective,
        config.training.seed,
        mesh,
        config.batching.micro_batches,
    )
    # Made of shapes: what is evaluated gets its copies of the parameters when it is, and gives them back.
    translator = Translator.from_params(config.model, tokenizers, layout.abstract.params, config.decoding, mesh)
    watch = Validation(config, corpus.validation, validation, validation_plan, translator, layout)

    def compile_all() -> tuple[dict[tuple[int, ...], Any], float]:
        clock = time.monotonic()
        compiled = compile_steps(step, layout.abstract, plan.shapes, mesh)
        watch.compile()
        translator.compile(corpus.test.source, watch.held)
        return compiled, time.monotonic() - clock

    compiled, compile_seconds = {}, 0.0
    if not resume:
        compiled, compile_seconds = compile_all()
        # Everything that the user can get wrong has been looked at: now there is a run.
        folder.create(config, tokenizers)

    keep = config.training.keep_newest, config.training.keep_best
    with folder.held(), Checkpoints(folder.checkpoints, keep, tokenizers.fingerprint) as checkpoints:
        if resume and checkpoints.latest_step() is not None:
            restored = checkpoints.restore(layout)
            state, position = restored.state, restored.position
            if not same_text(restored.data, fingerprint):
                raise RunFolderError(
                    f"{folder.path} was trained on other text than its configuration now finds: the files of section "
                    "'data' have changed, so its position in them means nothing. Put them back, or start a new run."
                )
            redrawn = restored.data != fingerprint
            if redrawn:  # an epoch may have fewer batches than it had
                position = position._replace(batch=min(position.batch, len(plan.epoch(position.epoch)) - 1))
        else:
            if resume and config.init_from is not None:  # stopped before its first checkpoint
                start = _best_params(_parent(config), layout, tokenizers)
            state = init_state(config.model, vocabulary, layout, config.training.seed)
            state = state if start is None else state.starting_from(start)
            position, redrawn = Position(0, 0), False
        first_step = int(state.step)
        checksums_of(state)  # compiles what every checkpoint will need
        if resume:
            if first_step < config.training.steps:
                compiled, compile_seconds = compile_all()
                folder.card_file.unlink(missing_ok=True)  # it tells of a training that was shorter
            folder.update_config(config)

        with RunLog(folder, first_step) as log:
            log.say(_description(config, corpus, tokenizers, train[0], validation, plan, layout, mesh))
            if resume:
                log.say(f"resumed at step {first_step}, epoch {position.epoch}, batch {position.batch}")
            if redrawn:
                log.say(
                    "the random segmentations of this run are no longer in the cache and were drawn anew: this epoch "
                    "has other batches than the one that it goes on with"
                )
            if compiled:
                largest = max(needed_bytes(program) for program in compiled.values())
                log.say(
                    f"compiled {len(compiled)} shapes, and evaluation, in {compile_seconds:.1f} s; a step needs at "
                    f"most {largest / 2**20:,.0f} MiB on each device"
                )

            clock = time.monotonic()
            state, signal = train_loop(
                state,
                compiled,
                training_batches(train, plan, position),
                config.training,
                mesh,
                log,
                save=lambda state, position, quality: checkpoints.save(state, position, fingerprint, quality),
                evaluate=functools.partial(watch, log),
                history=watch.history(folder),
                cost=ProductCost.of(layout.shapes.params, objective.num_passes),
                peak=peak_flops(mesh, config.model.compute_dtype),
            )
            training_seconds = time.monotonic() - clock
            log.stop_progress()
            if signal is not None:
                log.say(f"stopped by signal {signal} at step {int(state.step)}; saved. Go on with --resume.")
                return Outcome(folder, None, signal)

            best = checkpoints.choose("best")
            tested = state.usable
            if best != int(state.step):
                log.say(f"\nthe best evaluation was at step {best}: its parameters are tested")
                tested = checkpoints.restore_params(best, layout.abstract.params)
            translator = translator.with_params(tested)
            scores, samples = _score(config, corpus, translator, folder, log)
            card = _run_card(config, tokenizers, layout, mesh, (int(state.step), best), scores, training_seconds)
            folder.write_card(card)
            _draw(config, corpus, translator, folder, samples)
            log.say(f"training {training_seconds:.0f} s, all {time.monotonic() - started:.0f} s; see {folder.path}")
    return Outcome(folder, scores, None)


class Validation:
    """Evaluates parameters on the validation part: loss by teacher forcing, scores by beam search."""

    def __init__(
        self,
        config: Config,
        text: ParallelText,
        pairs: TokenizedPairs,
        plan: Plan,
        translator: Translator,
        layout: StateLayout,
    ):
        num = config.training.evaluate_sentences
        self.source, self.target = text.source[:num], text.target[:num]
        self.pairs = pairs
        self.plan = plan
        self.params = layout.abstract.usable
        # Of a training: what an evaluation does not read stays on the devices beside it.
        self.held = held_bytes(layout.abstract) - held_bytes(self.params)
        self.step = jit_evaluation_step(layout, Objective(config.training.label_smoothing), translator.mesh)
        self.compiled: dict[tuple[int, ...], Any] = {}
        self.translator = translator
        self.bleu_tokenizer = config.evaluation.bleu_tokenizer
        self.best_by = config.training.best_by

    def quality(self, record: dict[str, Any]) -> float:
        """Returns what `training.best_by` makes of an evaluation's figures, the higher the better."""
        return -record["loss"] if self.best_by == "loss" else record[self.best_by]

    def history(self, folder: RunFolder) -> list[float]:
        """Returns the qualities of the evaluations that a run has had so far."""
        return [self.quality(r) for r in read_metrics(folder.metrics_file) if r["kind"] == "validation"]

    def compile(self) -> None:
        """Compiles all that an evaluation needs.

        Raises:
            ConfigError: it needs more memory than a device has.
        """
        self.compiled = compile_steps(self.step, self.params, self.plan.shapes, self.translator.mesh, self.held)
        self.translator.compile(self.source, self.held)

    def __call__(self, log: RunLog, params: Any, step: int) -> float:
        """Logs loss and scores of `params`, and returns their quality."""
        clock = time.monotonic()
        sharding = batch_sharding(self.translator.mesh)
        sums = [  # one after the other: see `MOST_UNDER_WAY` of the training loop
            jax.device_get(self.compiled[shape_of(batch)](params, jax.device_put(batch, sharding)))
            for batch in evaluation_batches(self.pairs, self.plan)
        ]
        loss = LossSummary.of(*(float(sum(values)) for values in zip(*sums, strict=True)))
        translations = self.translator.with_params(params).translate(self.source)
        hypotheses = texts_or_empty(translations)
        scores = evaluate(hypotheses, self.target, self.bleu_tokenizer)
        record = {
            "step": step,
            "loss": loss.loss,
            "perplexity": loss.perplexity,
            "accuracy": loss.accuracy,
            "bleu": scores.bleu,
            "chrf": scores.chrf,
            "exact_match": scores.exact_match,
        }
        log.record("validation", record)
        log.say(
            f"validation at step {step}: loss {loss.loss:.3f} ppl {loss.perplexity:.2f} acc {100 * loss.accuracy:.1f}% "
            f"BLEU {scores.bleu:.2f} chrF {scores.chrf:.2f} exact {scores.exact_match:.1f}% "
            f"({len(self.source)} sentences, {time.monotonic() - clock:.1f} s)"
        )
        if without := no_output_line(translations, "validation sentences"):
            log.say(f"warning: {without}")
        return self.quality(record)


def _check_trainable(config: Config) -> None:
    """Raises a `ConfigError` where parameters are kept in a type in which they would not move."""
    if config.model.param_dtype != "float32":
        raise ConfigError(
            f"model.param_dtype: {config.model.param_dtype} cannot be trained in: most updates, and those of the "
            "optimiser's averages, are below its rounding and would be lost. Keep model.param_dtype: float32 and set "
            f"model.compute_dtype: {config.model.param_dtype}."
        )


def tokenizers_of_new_run(config: Config, corpus: Corpus) -> TokenizerPair:
    """Returns the tokenizers of the run that a new one starts from, or those of the training text.

    Raises:
        InputError: bad text, or a run that cannot be started from.
    """
    if config.init_from is not None:
        return _parent(config).tokenizers()
    return prepare_tokenizers(corpus.train, config.tokenizer)


def _parent(config: Config) -> RunFolder:
    """Returns the run that this one starts from.

    Raises:
        RunFolderError: it is none, or its tokenizer was made by other settings.
    """
    assert config.init_from is not None, "asked for only when it is set"
    parent = RunFolder.open(config.init_from)
    if parent.read_config().tokenizer != config.tokenizer:
        raise RunFolderError(
            f"--init-from {config.init_from}: its tokenizer was learnt with other settings than section 'tokenizer' "
            "asks for. Its parameters mean something only with its own tokenizer, which the new run takes over: "
            f"copy section 'tokenizer' from {parent.config_file}."
        )
    return parent


def _best_params(parent: RunFolder, layout: StateLayout, tokenizers: TokenizerPair) -> Any:
    """Returns the parameters of a run's best checkpoint, in the shardings of `layout`; it must have the tokenizers."""
    with Checkpoints(parent.checkpoints, tokenizers=tokenizers.fingerprint) as checkpoints:
        return checkpoints.restore_params(checkpoints.choose("best"), layout.abstract.params)


def _check_same_recipe(folder: RunFolder, config: Config) -> None:
    """Raises a `RunFolderError` unless there is a run in `folder` and it was made by the same recipe."""
    before = RunFolder.open(folder.path).read_config()
    for section in SECTIONS_KEPT:
        _check_same(folder, section, getattr(before, section), getattr(config, section))
    for name in ("seed", "label_smoothing", "r_drop", "ema_decay", "best_by", "evaluate_sentences"):
        _check_same(folder, f"training.{name}", getattr(before.training, name), getattr(config.training, name))


def _check_same(folder: RunFolder, name: str, before: Any, now: Any) -> None:
    if before != now:
        raise RunFolderError(
            f"{folder.path} was made with other settings in '{name}'; a resumed run must keep them. Use --config "
            f"{folder.config_file} --resume, or start a new run by --run FOLDER."
        )


def describe_pairs(pairs: TokenizedPairs) -> str:
    """Returns how many training pairs there are, and how many were left out for which reason."""
    return f"{len(pairs):,} training pairs" + (f" ({pairs.left_out} left out)" if pairs.left_out else "")


def describe_tokens(pairs: TokenizedPairs, tokenizers: TokenizerPair) -> str:
    """Returns how many tokens the pairs have, and of how many different ones."""
    sizes = f"{tokenizers.source.vocab_size:,}"
    if not tokenizers.joint:
        sizes += f" and {tokenizers.target.vocab_size:,}"
    source, target = pairs.lengths.sum(axis=0)
    return f"{source:,} source and {target:,} target tokens, vocabulary {sizes}"


def describe_batches(pairs: TokenizedPairs, plan: Plan) -> str:
    """Returns the shapes of the batches, how many make an epoch, and the share of padding in them."""
    batches = plan.epoch(0)
    padded = sum(b.shape.rows * (b.shape.source_length + b.shape.target_length) for b in batches)
    lengths = pairs.lengths.sum(axis=1)
    padding = 1 - sum(int(lengths[b.pairs].sum()) for b in batches) / padded
    shapes = ", ".join(f"{s.rows}x{s.source_length}/{s.target_length}" for s in plan.shapes)
    return (
        f"batches {shapes} (rows x source/target): {len(plan.shapes)} compiled shapes, {len(batches)} "
        f"batches an epoch, padding {100 * padding:.0f} %"
    )


def _description(
    config: Config,
    corpus: Corpus,
    tokenizers: TokenizerPair,
    train: TokenizedPairs,
    validation: TokenizedPairs,
    plan: Plan,
    layout: StateLayout,
    mesh: Mesh,
) -> str:
    without = f" ({validation.left_out} left out of the loss)" if validation.left_out else ""
    axes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    return (
        f"run {config.run}: {describe_pairs(train)}, {len(corpus.validation.source):,} validation{without}, "
        f"{len(corpus.test.source):,} test\n"
        f"{describe_tokens(train, tokenizers)}\n"
        f"model {config.model.description}: {layout.num_parameters:,} parameters; mesh {axes} on "
        f"{jax.devices()[0].device_kind}\n" + describe_batches(train, plan)
    )


def _score(
    config: Config, corpus: Corpus, translator: Translator, folder: RunFolder, log: RunLog
) -> tuple[Scores, list[int]]:
    """Translates and scores the test part, shows samples, and returns the scores and which lines were shown."""
    clock = time.monotonic()
    translations = translator.translate(corpus.test.source)
    seconds = time.monotonic() - clock
    hypotheses = texts_or_empty(translations)
    scores = evaluate(hypotheses, corpus.test.target, config.evaluation.bleu_tokenizer)
    folder.write_test(corpus.test.source, corpus.test.target, hypotheses)

    log.say("\nsamples from the test part")
    chosen = np.linspace(0, len(hypotheses) - 1, min(NUM_SAMPLES, len(hypotheses))).astype(int).tolist()
    for index in chosen:
        source, target = corpus.test.source[index], corpus.test.target[index]
        verdict = "=" if hypotheses[index] == target else f"reference: {target}"
        log.say(f"  {source}\n    -> {hypotheses[index]}  {verdict}")
    cut = [number for number, t in enumerate(translations, start=1) if t.truncated]
    if cut:
        first = cut_line(f"{corpus.test.name}, line {cut[0]}", translator.model.max_source_length)
        others = f" So were {len(cut) - 1} test lines after it." if cut[1:] else ""
        log.say(f"\nwarning: {first}{others}")
    if without := no_output_line(translations, "test sentences"):
        log.say(f"\nwarning: {without}")
    decoding = config.decoding
    log.say(f"\ntest, beam {decoding.beam_size}, length penalty {decoding.length_penalty}, {seconds:.1f} s")
    log.say(scores.text)
    return scores, chosen


def _draw(config: Config, corpus: Corpus, translator: Translator, folder: RunFolder, samples: list[int]) -> None:
    """Draws the course of the training, and the attention of one of the samples, of middle length."""
    folder.plots.mkdir(exist_ok=True)
    plot_curves(read_metrics(folder.metrics_file), folder.plots / "curves.png", f"training of {config.run}")
    by_length = sorted((corpus.test.source[index] for index in samples), key=len)
    source = by_length[len(by_length) // 2]
    (found,) = translator.translate([source])
    attention = None if isinstance(found, NoTranslation) else attention_map(translator, source, found.text)
    if attention is not None:
        plot_attention(attention, folder.plots / "attention.png", f"{source}\n{found.text}")


def _run_card(
    config: Config,
    tokenizers: TokenizerPair,
    layout: StateLayout,
    mesh: Mesh,
    steps: tuple[int, int],
    scores: Scores,
    training_seconds: float,
) -> dict[str, Any]:
    packages = ("flax-transformer", "jax", "flax", "optax", "orbax-checkpoint", "sentencepiece", "sacrebleu")
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "devices": [d.device_kind for d in mesh.devices.flat],
        "versions": {name: version(name) for name in packages},
        "parameters": layout.num_parameters,
        "tokenizers": {"source": tokenizers.source.fingerprint, "target": tokenizers.target.fingerprint},
        "steps": steps[0],
        "tested_step": steps[1],
        "seed": config.training.seed,
        "training_seconds": training_seconds,
        "decoding": {"beam_size": config.decoding.beam_size, "length_penalty": config.decoding.length_penalty},
        "test": scores.record,
    }
