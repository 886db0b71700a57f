"""The list of all kinds of corpus."""

from flax_transformer.data.parallel_text import Corpus, ParallelTextConfig, read_corpus
from flax_transformer.data.synthetic import NumberWordsConfig, number_words_corpus

DataConfig = NumberWordsConfig | ParallelTextConfig


def load_corpus(config: DataConfig) -> Corpus:
    """Returns the corpus that `config` describes, generated or read.

    Raises:
        InputError: a file is missing, malformed or empty, or two files are not parallel.
    """
    if isinstance(config, NumberWordsConfig):
        return number_words_corpus(config)
    return read_corpus(config)
