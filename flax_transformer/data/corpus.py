"""The list of all kinds of corpus."""

from flax_transformer.data.parallel_text import Corpus, ParallelTextConfig, read_corpus
from flax_transformer.data.synthetic import NumberWordsConfig, number_words_corpus

DataConfig = NumberWordsConfig | ParallelTextConfig


def load_corpus(config: DataConfig) -> Corpus:
    """Returns the corpus that `config` describes, generated or read.

    Raises:
        InputError: a file is missing, malformed or empty, or two files are not parallel.

    Example:
        >>> corpus = load_corpus(NumberWordsConfig(num_train=8, num_validation=2, num_test=1))
        >>> len(corpus.validation.source), len(corpus.test.target)
        (2, 1)
    """
    if isinstance(config, NumberWordsConfig):
        return number_words_corpus(config)
    return read_corpus(config)
