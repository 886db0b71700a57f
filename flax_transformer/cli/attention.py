"""attention: a page about how a model translates a text."""

import dataclasses
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from flax_transformer.cli.partial_output import output_of_lines
from flax_transformer.cli.translate import values_of
from flax_transformer.config.recipe import DecodingConfig
from flax_transformer.errors import ConfigError, DivergenceError, shown
from flax_transformer.inference.attention_view import AttentionView, attention_views, pictures_of
from flax_transformer.inference.translation import NoTranslation
from flax_transformer.inference.translator import Translator
from flax_transformer.run_folder import RunFolder
from flax_transformer.training.checkpoint import Choice


@dataclass(frozen=True)
class AttentionOptions:
    """Writes a web page about the translation of one or more sentences. It needs no network and no other file.

    The page shows the attention weights of each layer and head, word alignments, token probabilities, the n-best list,
    and the tree of the beam search. A warning says why a sentence is not shown. From --method on, options that are left
    out take the run's own settings. The search must be a beam search.

    Example: flax-transformer attention --run runs/mine --text "A dog runs." --output page.html

    Attributes:
        run: run folder of the model.
        text: sentence to translate; give the option again for each further sentence.
        output: HTML file to write. A file of this name is replaced.
        checkpoint: "best" is the best one on validation text, "last" the newest.
        num_hypotheses: most outputs of each sentence; None shows the whole beam.
        decoding: how to translate.
    """

    run: Path | None = None
    text: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    output: Path = Path("attention.html")
    checkpoint: Choice = "best"
    num_hypotheses: int | None = None
    decoding: Annotated[DecodingConfig, tyro.conf.arg(name="")] = field(default_factory=DecodingConfig)


def main(arguments: list[str], program: str) -> int:
    """Returns the exit code: 0, or 4 if the page shows some sentences alone.

    Raises:
        InputError: an invalid run folder, setting or output. Or no sentence can be shown.
        DivergenceError: no sentence can be shown, since the model's scores are not finite.
    """
    defaults = AttentionOptions()
    if runs := values_of(arguments, "--run"):  # the run's own settings are the defaults
        decoding = RunFolder.open(runs[0]).read_config().decoding
        if decoding.method != "beam":
            decoding = decoding.with_method("beam")
        defaults = dataclasses.replace(defaults, decoding=decoding)
    options = tyro.cli(AttentionOptions, args=arguments, prog=program, default=defaults)
    if options.run is None:
        raise ConfigError("give the run folder of a trained model by --run FOLDER.")
    if not options.text:
        raise ConfigError('give a sentence to translate by --text "...".')
    with output_of_lines(options.output, []) as write:
        translator = Translator.load(options.run, checkpoint=options.checkpoint).with_decoding(options.decoding)
        note = pictures_of(translator.model)
        answers = attention_views(translator, options.text, options.num_hypotheses)
        views = [each for each in answers if isinstance(each, AttentionView)]
        without = {n: each for n, each in enumerate(answers, start=1) if isinstance(each, NoTranslation)}
        if not views:
            # A model that has diverged is at fault for all sentences, whatever the first one lacks.
            worst = min(without, key=lambda n: not isinstance(without[n].reason, DivergenceError))
            for number in without.keys() - {worst}:
                print(f"warning: {_not_shown(number, without[number])}", file=sys.stderr)
            reason = without[worst].reason
            raise type(reason)(_not_shown(worst, without[worst])) from reason

        from flax_transformer.plots.attention_page import attention_page  # Matplotlib takes time to import

        write([attention_page(views, str(options.run), translator.model.description, note)])
    for number, each in without.items():
        print(f"warning: {_not_shown(number, each)}", file=sys.stderr)
    if not translator.model.has_attention:
        print(f"note: {note}", file=sys.stderr)
    shows = f"{len(views)} sentence{'s' if len(views) > 1 else ''}"
    print(f"{options.output} shows {shows}; open it in a web browser", file=sys.stderr)
    return 4 if without else 0


def _not_shown(number: int, answer: NoTranslation) -> str:
    return f"sentence {number} ({shown(answer.sentence)}) is not shown: {answer.reason}"
