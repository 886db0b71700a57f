"""prepare: train the tokenizers and tokenise the training text of a recipe, before the training."""

from flax_transformer.cli.train import read_recipe
from flax_transformer.data.corpus import load_corpus
from flax_transformer.data.loader import training_plan
from flax_transformer.data.preparation import prepare_training_pairs
from flax_transformer.errors import ConfigError
from flax_transformer.experiment.new_run import tokenizers_of_new_run
from flax_transformer.experiment.report import describe_batches, describe_normalization, describe_pairs, describe_tokens
from flax_transformer.standard_streams import lossy_standard_streams


@lossy_standard_streams()
def main(arguments: list[str], program: str) -> int:
    """Returns the exit code.

    Args:
        arguments: `--config FILE [--section.field value ...]`, as for training.
        program: name of the program in the help.

    Raises:
        InputError: invalid files or an invalid configuration.
    """
    config, resume = read_recipe(arguments, program)
    if resume:
        raise ConfigError("prepare is for runs to come; a run that is resumed has been prepared.")
    corpus = load_corpus(config.data)
    tokenizers = tokenizers_of_new_run(config, corpus)
    lengths = config.model.max_source_length, config.model.max_target_length
    variants = prepare_training_pairs(corpus.train, tokenizers, config.filters, *lengths, config.subword_sampling)
    plan = training_plan(variants, config.batching, config.training.seed)
    pairs = variants[0]
    print(f"{describe_pairs(pairs)}\n{describe_tokens(pairs, tokenizers)}")
    print(describe_normalization(corpus.train, tokenizers) + describe_batches(pairs, plan))
    return 0
