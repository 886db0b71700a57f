"""The tokenizers of both languages, and the list of all kinds of tokenizer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from flax_transformer.data.sentencepiece_tokenizer import SentencePieceTokenizer
from flax_transformer.data.tokenizer import LearntKind, Tokenizer, TokenizerConfig
from flax_transformer.errors import RunFolderError
from flax_transformer.object_storage import AnyPath
from flax_transformer.small_files import write_atomically

# The kind of tokenizer that is learnt for each `TokenizerConfig.algorithm`.
LEARNT_KINDS: dict[str, LearntKind] = {
    "unigram": SentencePieceTokenizer,
    "bpe": SentencePieceTokenizer,
    "word": SentencePieceTokenizer,
    "char": SentencePieceTokenizer,
}
# For each `Tokenizer.suffix`, a function that makes a tokenizer from the contents of its file. A kind that is not
# learnt is added here.
KINDS: dict[str, Callable[[bytes], Tokenizer]] = {kind.suffix: kind for kind in LEARNT_KINDS.values()}


def learnt_kind(config: TokenizerConfig) -> LearntKind:
    """Returns the kind of tokenizer that a configuration asks for."""
    return LEARNT_KINDS[config.algorithm]


@dataclass(frozen=True)
class TokenizerPair:
    """The tokenizers of the source and the target language. A shared vocabulary is one object in both places.

    Example:
        >>> config = TokenizerConfig(algorithm="char", vocab_size=20)
        >>> pair = TokenizerPair.train(["a rose"] * 3, ["eine Rose"] * 3, config)
        >>> pair.joint, pair.target.decode(pair.target.encode(["eine Rose"])[0])
        (True, 'eine Rose')
    """

    source: Tokenizer
    target: Tokenizer

    @property
    def joint(self) -> bool:
        """Whether both languages share one vocabulary."""
        return self.source is self.target

    @property
    def fingerprint(self) -> str:
        """The fingerprints of both tokenizers; see `Tokenizer.fingerprint`."""
        return f"{self.source.fingerprint}-{self.target.fingerprint}"

    @classmethod
    def train(
        cls, source: Sequence[str], target: Sequence[str], config: TokenizerConfig, name: str = "this text"
    ) -> "TokenizerPair":
        """Returns tokenizers learnt from both sides of the training text; see `LearntKind.train`."""
        train = learnt_kind(config).train
        if config.joint:
            both = train([*source, *target], config, f"both sides of {name}")
            return cls(both, both)
        return cls(
            train(source, config, f"the source side of {name}"), train(target, config, f"the target side of {name}")
        )

    def save(self, folder: AnyPath) -> None:
        """Writes the tokenizers to `folder`: one file named joint, or two files named source and target.

        The names end with `Tokenizer.suffix`. So SentencePiece models are written to joint.model, or to source.model
        and target.model.
        """
        folder.mkdir(parents=True, exist_ok=True)
        named = {"joint": self.source} if self.joint else {"source": self.source, "target": self.target}
        for name, tokenizer in named.items():
            write_atomically(folder / f"{name}.{tokenizer.suffix}", tokenizer.model)

    @classmethod
    def load(cls, folder: AnyPath) -> "TokenizerPair":
        """Returns the tokenizers that `save` wrote.

        Raises:
            RunFolderError: a file is missing.
        """
        both = _read(folder, "joint")
        if both is not None:
            return cls(both, both)
        source, target = _read(folder, "source"), _read(folder, "target")
        if source is None or target is None:
            raise RunFolderError(
                f"{folder} holds no tokenizer: expected joint.model, or source.model and target.model. "
                "Was the run interrupted before it began to train? Start it again in a new folder."
            )
        return cls(source, target)


def _read(folder: AnyPath, name: str) -> Tokenizer | None:
    """Returns the tokenizer that a folder contains under a name, or None if there is none."""
    for suffix, make in KINDS.items():
        if (file := folder / f"{name}.{suffix}").is_file():
            return make(file.read_bytes())
    return None
