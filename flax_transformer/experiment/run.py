"""A whole run, in reading order: text, programs, training, test, report."""

import functools
import time
from dataclasses import dataclass

from flax_transformer.config.recipe import Config
from flax_transformer.data.batching import Position
from flax_transformer.data.corpus import load_corpus
from flax_transformer.data.loader import training_batches
from flax_transformer.errors import ConfigError
from flax_transformer.experiment.new_run import NewRun
from flax_transformer.experiment.programs import make_programs
from flax_transformer.experiment.report import TrainingSummary, describe_run, draw_pictures, run_card, score_test_part
from flax_transformer.experiment.resume import ResumedRun
from flax_transformer.experiment.text import prepare_text
from flax_transformer.inference.evaluate import Scores, bleu_metric
from flax_transformer.parallel import processes
from flax_transformer.parallel.mesh import make_mesh
from flax_transformer.run_folder import RunFolder
from flax_transformer.standard_streams import lossy_standard_streams
from flax_transformer.training.loop import Callbacks, train_loop
from flax_transformer.training.state import TrainState


@dataclass(frozen=True)
class Outcome:
    """Result of a run.

    Attributes:
        folder: the run folder.
        scores: scores of the test part, or None if a signal stopped the training.
        signal: signal that stopped the training, or None.

    Example:
        >>> outcome = Outcome(RunFolder("runs/number_words"), scores=None, signal=15)
        >>> outcome.scores is None  # a signal stopped the training, before the test
        True
    """

    folder: RunFolder
    scores: Scores | None
    signal: int | None


@lossy_standard_streams()
def run_experiment(config: Config, resume: bool = False) -> Outcome:
    """Trains by a recipe, evaluates on the test part, and leaves everything in the run folder.

    A run is one function with banners, which can be read from top to bottom.

    Args:
        config: the recipe. `config.run` names the folder.
        resume: whether to go on from the newest checkpoint of that folder. Then only the number of steps, intervals,
            patience, numbers of kept checkpoints and the mesh may change.

    Raises:
        InputError: bad files, a bad configuration, or a run folder in the wrong state.
        DivergenceError: too many updates in a row were not finite.

    Example:
        >>> from flax_transformer import override, read_config
        >>> from flax_transformer.config.installed import recipe_path
        >>> flags = "--run runs/tiny --training.steps 2 --data.num-train 200 --data.num-validation 8 --data.num-test 8"
        >>> flags += " --model.model-dim 8 --model.num-heads 2 --model.num-encoder-layers 1"
        >>> flags += " --model.num-decoder-layers 1"
        >>> flags += " --tokenizer.vocab-size 60 --batching.num-buckets 1 --mesh.data 1"
        >>> outcome = run_experiment(override(read_config(recipe_path("number_words")), flags.split()))
        run runs/tiny: 200 training pairs, 8 validation, 8 test
        ...
        >>> outcome.scores.num_sentences, outcome.signal
        (8, None)
    """
    started = time.monotonic()
    folder = RunFolder(config.run)
    _check_trainable(config)
    bleu_metric(config.evaluation.bleu_tokenizer)  # what is missing is told before the training
    processes.check_agreement(described(config))
    run = ResumedRun(config, folder) if resume else NewRun(config, folder)

    # --- text and programs
    mesh = make_mesh(config.mesh)
    corpus = load_corpus(config.data)
    tokenizers = run.tokenizers(corpus)
    text = processes.first_then_others(lambda: prepare_text(config, corpus, tokenizers, mesh))
    processes.check_agreement({"text": text.fingerprint, "tokenizer": tokenizers.fingerprint})
    programs = make_programs(config, text, mesh)

    with run.start(text, programs) as start, start.log(folder) as log:
        # --- description
        log.say(describe_run(config, text, programs.layout.num_parameters, mesh))
        for note in start.notes:
            log.say(note)

        # --- training
        def save(state: TrainState, position: Position, quality: float | None) -> None:
            log.flush()  # the records are never behind a checkpoint
            start.checkpoints.save(state, position, text.fingerprint, quality)

        clock = time.monotonic()
        trained = train_loop(
            start.place,
            training_batches(text.train, text.plan, start.place.position),
            config.training,
            start.steps,
            Callbacks(
                log,
                save=save,
                check_saved=start.checkpoints.check_saved,
                evaluate=functools.partial(programs.validation, log),
                history=programs.validation.history(folder),
                profile_folder=folder.tensorboard if processes.is_first() else None,
            ),
            programs.flops,
        )
        training_seconds = time.monotonic() - clock
        log.stop_progress()
        step = int(trained.state.step)
        if trained.signal is not None:
            log.say(f"stopped by signal {trained.signal} at step {step}; saved. Go on with --resume.")
            return Outcome(folder, None, trained.signal)

        # --- test
        best = start.checkpoints.choose("best")
        tested = trained.state.eval_params
        if best != step:
            log.say(f"\nthe best evaluation was at step {best}: its parameters are tested")
            tested = start.checkpoints.restore_params(best, programs.layout.abstract.params)
        translator = programs.translator.with_params(tested)
        result = score_test_part(config, corpus, translator, folder, log)

        # --- report
        training = TrainingSummary(step, best, training_seconds)
        card = run_card(config, text, programs, training, result.scores)
        processes.from_first(lambda: folder.write_card(card))
        draw_pictures(config, translator, folder, result, log)
        log.say(f"training {training_seconds:.0f} s, all {time.monotonic() - started:.0f} s; see {folder.path}")
    return Outcome(folder, result.scores, None)


def described(config: Config) -> dict[str, str]:
    """Returns a text for each section of a configuration, which all processes of a training must agree on."""
    return {f"section '{name}'": repr(section) for name, section in vars(config).items()}


def _check_trainable(config: Config) -> None:
    """Raises a `ConfigError` for parameters in a type that rounds most updates away."""
    if config.model.param_dtype != "float32":
        raise ConfigError(
            f"model.param_dtype: {config.model.param_dtype} cannot be trained in: most updates of parameters and of "
            "the optimiser's averages are smaller than its rounding. Keep model.param_dtype: float32 and set "
            f"model.compute_dtype: {config.model.param_dtype}."
        )
