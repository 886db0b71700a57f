"""The evaluation of parameters on validation text, during a training."""

import re
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from flax_transformer.config.recipe import Config
from flax_transformer.data.loader import evaluation_batches
from flax_transformer.experiment.text import PreparedText
from flax_transformer.inference.attention_map import attention_map
from flax_transformer.inference.evaluate import evaluate
from flax_transformer.inference.translation import no_output_line, texts_or_empty
from flax_transformer.inference.translator import Translator
from flax_transformer.parallel import processes
from flax_transformer.parallel.memory import stored_bytes
from flax_transformer.parallel.mesh import batch_sharding
from flax_transformer.parallel.placement import put
from flax_transformer.run_folder import RunFolder
from flax_transformer.training.loop import compile_steps, shape_of
from flax_transformer.training.metrics import LossSummary
from flax_transformer.training.metrics_file import read_metrics
from flax_transformer.training.run_log import RunLog
from flax_transformer.training.state import StateLayout
from flax_transformer.training.step import Objective, jit_evaluation_step

# Number of translations that TensorBoard gets from each evaluation.
NUM_SAMPLES = 5

MARKDOWN_SIGNS = re.compile(r"[\\`*_{}\[\]<>()#+!|&~^:\r\n-]")


class Validation:
    """Evaluates parameters on the validation part: loss by teacher forcing, scores of translations."""

    def __init__(
        self,
        config: Config,
        text: PreparedText,
        translator: Translator,
        layout: StateLayout,
    ):
        num = config.training.evaluate_sentences
        self.source, self.target = text.corpus.validation.source[:num], text.corpus.validation.target[:num]
        self.pairs, self.plan = text.validation, text.validation_plan
        self.params = layout.abstract.eval_params
        # Arrays of a training that an evaluation does not read stay on the devices.
        self.reserved_bytes = stored_bytes(layout.abstract) - stored_bytes(self.params)
        self.step = jit_evaluation_step(layout, Objective(config.training.label_smoothing), translator.mesh)
        self.compiled: dict[tuple[int, ...], Any] = {}
        self.translator = translator
        self.bleu_tokenizer = config.evaluation.bleu_tokenizer
        self.best_metric = config.training.best_metric
        self.draw_attention = config.training.draw_attention

    def quality(self, record: dict[str, Any]) -> float:
        """Returns the quality of an evaluation by `training.best_metric`. Higher is better."""
        return -record["loss"] if self.best_metric == "loss" else record[self.best_metric]

    def history(self, folder: RunFolder) -> list[float]:
        """Returns the qualities of all evaluations of a run so far."""

        def qualities() -> list[float]:
            return [self.quality(r) for r in read_metrics(folder.metrics_file) if r["kind"] == "validation"]

        return processes.from_first(qualities)

    def compile(self) -> None:
        """Compiles all programs of an evaluation.

        Raises:
            ConfigError: a program needs more memory than a device has.
        """
        self.compiled = compile_steps(
            self.step, self.params, self.plan.shapes, self.translator.mesh, self.reserved_bytes
        )
        self.translator.compile(self.source, self.reserved_bytes)

    def __call__(self, log: RunLog, params: Any, step: int) -> float:
        """Logs loss and scores of `params`, and returns their quality."""
        clock = time.monotonic()
        sharding = batch_sharding(self.translator.mesh)
        sums = [  # one after the other: see `MAX_STEPS_IN_FLIGHT` of the training loop
            jax.device_get(self.compiled[shape_of(batch)](params, put(batch, sharding)))
            for batch in evaluation_batches(self.pairs, self.plan)
        ]
        loss = LossSummary.of(*(float(sum(values)) for values in zip(*sums, strict=True)))
        translator = self.translator.with_params(params)
        translations = translator.translate(self.source)
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
        self._show(log, translator, hypotheses, step)
        log.say(
            f"validation at step {step}: loss {loss.loss:.3f} ppl {loss.perplexity:.2f} acc {100 * loss.accuracy:.1f}% "
            f"BLEU {scores.bleu:.2f} chrF {scores.chrf:.2f} exact {scores.exact_match:.1f}% "
            f"({len(self.source)} sentences, {time.monotonic() - clock:.1f} s)"
        )
        if without := no_output_line(translations, "validation sentences"):
            log.say(f"warning: {without}")
        return self.quality(record)

    def _show(self, log: RunLog, translator: Translator, hypotheses: list[str], step: int) -> None:
        """Gives TensorBoard some translations, and a picture of the attention of one of them if it is asked for."""
        chosen = np.linspace(0, len(hypotheses) - 1, min(NUM_SAMPLES, len(hypotheses))).astype(int).tolist()
        rows = [(self.source[index], hypotheses[index], self.target[index]) for index in chosen]
        pictures = {}
        if self.draw_attention:
            from flax_transformer.plots.attention import attention_png  # Matplotlib is slow to import

            source, output, reference = sorted(rows, key=lambda row: len(row[0]))[len(rows) // 2]
            output = output or reference  # a model that has hardly been trained may have no output
            if (attention := attention_map(translator, source, output)) is not None:
                pictures["validation/attention"] = attention_png(attention, f"{source}\n{output}")
        log.show(step, {"validation/samples": markdown_table(("source", "output", "reference"), rows)}, pictures)


def markdown_table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a table in Markdown, in which signs of Markdown, HTML and ends of lines stand for themselves."""

    def row(cells: Sequence[str]) -> str:
        return f"| {' | '.join(MARKDOWN_SIGNS.sub(lambda sign: f'&#{ord(sign[0])};', cell) for cell in cells)} |\n"

    return row(names) + "|---" * len(names) + "|\n" + "".join(map(row, rows))
