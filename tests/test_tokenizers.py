"""A tokenizer that is not SentencePiece, with other special ids, goes the whole way from pairs to scores."""

import collections
import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from typing import ClassVar, get_args, get_type_hints

import jax
import numpy as np
import pytest
import sentencepiece

from flax_transformer.config.recipe import Config, DecodingConfig
from flax_transformer.data import tokenizer_pair
from flax_transformer.data.batching import BatchingConfig, Position
from flax_transformer.data.filters import FilterConfig
from flax_transformer.data.loader import training_batches, training_plan
from flax_transformer.data.parallel_text import ParallelText
from flax_transformer.data.preparation import prepare_tokenizers, prepare_training_pairs
from flax_transformer.data.sentencepiece_tokenizer import SPECIAL, SentencePieceTokenizer
from flax_transformer.data.synthetic import english_number_words, german_number_words
from flax_transformer.data.tokenizer import SpecialIds, SubwordSample, Tokenizer, TokenizerConfig
from flax_transformer.data.tokenizer_pair import TokenizerPair
from flax_transformer.errors import ConfigError, RunFolderError
from flax_transformer.experiment.hardware_plan import vocabulary_of_recipe
from flax_transformer.inference.scorer import Scorer
from flax_transformer.inference.translation import Translation
from flax_transformer.inference.translator import Translator
from flax_transformer.interop.marian import write_marian
from flax_transformer.models.build import VocabularyInfo, vocabulary_info
from flax_transformer.models.transformer_config import TransformerConfig
from flax_transformer.optim.optimizer import OptimizerConfig, make_optimizer
from flax_transformer.optim.schedule import make_schedule
from flax_transformer.run_folder import RunFolder
from flax_transformer.training.checkpoint import Checkpoints
from flax_transformer.training.state import describe_parameters, init_state, make_layout
from flax_transformer.training.step import Objective, jit_train_step
from tests.small_models import TOKENIZERS


class ByteTokenizer:
    """The bytes of UTF-8. Special ids come after them, and there is no unknown text."""

    suffix: ClassVar[str] = "bytes"
    special = SpecialIds(start=258, end=256, pad=257)
    vocab_size = 259

    def __init__(self, model: bytes = b"UTF-8"):
        self.model = model
        self.fingerprint = hashlib.sha256(model).hexdigest()

    def encode(self, lines: Sequence[str], sample: SubwordSample | None = None) -> list[list[int]]:
        assert sample is None
        return [list(line.encode()) for line in lines]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i < 256).decode("utf-8", "replace").replace("\n", " ")

    def normalized(self, lines: Sequence[str]) -> list[str]:
        return list(lines)

    def pieces(self, ids: Sequence[int]) -> list[str]:
        return [f"<{i:02X}>" for i in ids]

    def id_of(self, piece: str) -> int | None:
        found = re.fullmatch("<([0-9A-F]{2})>", piece)
        return int(found[1], 16) if found else None

    def encoded_spans(self, line: str) -> list[tuple[int, int]]:
        return [(n, n + 1) for n in range(len(line.encode()))]

    def decoded_spans(self, ids: Sequence[int]) -> list[tuple[int, int]]:
        return self.encoded_spans(bytes(i for i in ids if i < 256).decode("utf-8", "replace"))


NUMBERS = range(1, 90, 2)
TEXT = ParallelText([english_number_words(n) for n in NUMBERS], [german_number_words(n) for n in NUMBERS])
MODEL = TransformerConfig(
    model_dim=16, num_heads=2, feed_forward_dim=32, num_encoder_layers=1, num_decoder_layers=1, max_source_length=24,
    max_target_length=24, share_embeddings="all", attention_dropout=0.1,
)  # fmt: skip
DECODING = DecodingConfig(beam_size=3, batch_size=4, max_length_factor=0.0, max_length_offset=11)


@pytest.fixture(scope="module")
def bytes_pair() -> TokenizerPair:
    both = ByteTokenizer()
    return TokenizerPair(both, both)


@pytest.fixture(scope="module")
def translator(bytes_pair, tmp_path_factory, one_device) -> Translator:
    """Of a run folder, after some steps of training."""
    pairs = prepare_training_pairs((TEXT,), bytes_pair, FilterConfig(), 24, 24)
    plan = training_plan(pairs, BatchingConfig(tokens_per_batch=24 * 24, num_buckets=1), 0)
    vocabulary, config = vocabulary_info(bytes_pair), OptimizerConfig(warmup_steps=4)
    schedule = make_schedule(config, MODEL.model_dim)
    optimizer = make_optimizer(config, schedule, describe_parameters(MODEL, vocabulary))
    layout = make_layout(MODEL, vocabulary, optimizer, one_device)
    step = jit_train_step(layout, schedule, Objective(0.0), 0, one_device)
    state, losses = init_state(MODEL, vocabulary, layout, 0), []
    for number, (batch, _) in enumerate(training_batches(pairs, plan, Position(0, 0))):
        for tokens, segments in zip(batch.target_tokens, batch.target_segments, strict=True):
            assert not segments.any() or tokens[segments > 0][-1] == 256
        with jax.set_mesh(one_device):
            state, metrics = step(state, jax.device_put(batch))
        losses.append(float(metrics.sums.loss) / int((batch.target_segments > 0).sum()))
        if number == 7:
            break
    assert losses[-1] < losses[0]
    folder = RunFolder(tmp_path_factory.mktemp("runs") / "bytes")
    folder.create(Config(run=str(folder.path), model=MODEL, decoding=DECODING), bytes_pair)
    with Checkpoints(folder.checkpoints, (1, 1), bytes_pair.fingerprint) as checkpoints:
        checkpoints.save_params(1, state.params)
    assert [path.name for path in (folder.path / "tokenizer").iterdir()] == ["joint.bytes"]
    with pytest.raises(RunFolderError, match="holds no tokenizer"):
        Translator.load(folder.path, one_device)  # nobody has said what makes one of such a file
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tokenizer_pair.KINDS, "bytes", ByteTokenizer)
        return Translator.load(folder.path, one_device)


def test_both_are_tokenizers(bytes_pair, tmp_path, monkeypatch):
    assert all(isinstance(each, Tokenizer) for each in (ByteTokenizer(), TOKENIZERS.source))
    assert TOKENIZERS.source.special == SPECIAL
    monkeypatch.setitem(tokenizer_pair.KINDS, "bytes", ByteTokenizer)
    TokenizerPair(TOKENIZERS.source, bytes_pair.target).save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source.model", "target.bytes"]
    mixed = TokenizerPair.load(tmp_path)
    assert mixed.fingerprint == f"{TOKENIZERS.source.fingerprint}-{bytes_pair.target.fingerprint}"
    assert vocabulary_info(mixed).start_token == 258 and vocabulary_info(TOKENIZERS).start_token == 1
    assert vocabulary_info(mixed).end_token == 256 and vocabulary_info(TOKENIZERS).end_token == 2


class LearntByteTokenizer(ByteTokenizer):
    version: ClassVar[str] = "0"

    @classmethod
    def train(cls, lines: Iterable[str], config: TokenizerConfig, name: str = "this text") -> "LearntByteTokenizer":
        return cls(f"learnt from {name}".encode())

    @classmethod
    def special_ids(cls, config: TokenizerConfig) -> SpecialIds:
        return cls.special


def test_a_kind_of_tokenizer_is_learnt_cached_and_described(tmp_path, monkeypatch):
    monkeypatch.setitem(tokenizer_pair.KINDS, "bytes", LearntByteTokenizer)
    monkeypatch.setitem(tokenizer_pair.LEARNT_KINDS, "char", LearntByteTokenizer)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    config = TokenizerConfig("char", vocab_size=259)
    for _ in range(2):  # learnt, and read from the cache
        assert prepare_tokenizers((TEXT,), config).source.model.startswith(b"learnt from both sides of")
    monkeypatch.setattr(LearntByteTokenizer, "version", "1")
    _ = prepare_tokenizers((TEXT,), config)
    assert len(list((tmp_path / "flax_transformer/tokenizers").iterdir())) == 2
    assert vocabulary_of_recipe(Config(tokenizer=config)) == VocabularyInfo(259, 259, start_token=258)
    assert vocabulary_of_recipe(Config(tokenizer=TokenizerConfig("word", 50))) == VocabularyInfo(50, 50, start_token=1)


def test_each_algorithm_has_a_kind():
    assert set(tokenizer_pair.LEARNT_KINDS) == set(get_args(get_type_hints(TokenizerConfig)["algorithm"]))


def test_caches_of_tokenizers_keep_their_names(tmp_path, monkeypatch):
    """Another hash would learn every tokenizer anew."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    config = TokenizerConfig("char", vocab_size=20)
    content = [[TEXT.fingerprint], dataclasses.asdict(config), sentencepiece.__version__]
    _ = prepare_tokenizers((TEXT,), config)
    (folder,) = (tmp_path / "flax_transformer/tokenizers").iterdir()
    assert folder.name == hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]


def test_which_special_ids_no_output_holds():
    assert SpecialIds(start=1, end=2, pad=0, unknown=3).never_in_outputs == {0, 1}
    assert SpecialIds(start=0, end=2, pad=0).never_in_outputs == {0}  # a decoder that starts with padding
    assert SpecialIds(start=2, end=2, pad=1).never_in_outputs == {1}  # or with the end token
    assert SpecialIds(start=2, end=2).never_in_outputs == set()


def test_special_ids_that_cannot_be_are_explained():
    with pytest.raises(ValueError, match="cannot be the end token"):
        SpecialIds(start=0, end=2, unknown=2)
    with pytest.raises(ValueError, match="must not be negative"):
        SpecialIds(start=0, end=1, pad=-1)


def test_a_model_without_start_or_end_is_explained():
    from sentencepiece import sentencepiece_model_pb2 as made_by_protobuf

    proto = made_by_protobuf.ModelProto.FromString(  # type: ignore[missing-attribute]
        SentencePieceTokenizer.train(TEXT.source, TokenizerConfig(vocab_size=30)).model
    )
    del proto.pieces[1]
    proto.trainer_spec.bos_id = -1
    with pytest.raises(RunFolderError, match=r"no start token \(bos\) or no end token \(eos\)"):
        _ = SentencePieceTokenizer(proto.SerializeToString()).special


def test_outputs_and_their_scores(translator):
    """With a prefix as text or as pieces, a suppressed token and alignments."""
    target, text = translator.tokenizers.target, ["twenty-one", "three", ""]

    def translated(suppressed: str) -> list[Translation]:
        return translator.translate(
            text, num_hypotheses=3, prefixes=["ein", ["<7A>", "<77>"], ""], suppress_tokens=(suppressed,),
            attention=True, length_penalty="none",
        )  # fmt: skip

    counts = collections.Counter(token for found in translated("<00>") for h in found.hypotheses for token in h.tokens)
    begun = target.pieces(target.encode(["einzw"])[0])
    often, count = next((token, count) for token, count in counts.most_common() if token not in begun)
    translations, ended = translated(often), []
    assert count > 3 and translations[2].text == ""
    for source, begin, found in zip(text[:2], ("ein", "zw"), translations, strict=False):
        assert found.source == target.pieces(list(source.encode()))
        for hypothesis in found.hypotheses:
            ids = [target.id_of(piece) for piece in hypothesis.tokens]
            assert hypothesis.text == target.decode(ids) and hypothesis.text.startswith(begin)
            assert often not in hypothesis.tokens and len(hypothesis.words) == len(ids) > 3
            (score,) = Scorer(translator).score_ids([list(source.encode())], [ids], "none", end=hypothesis.finished)
            np.testing.assert_allclose(score.token_scores, hypothesis.token_scores, rtol=1e-5, atol=1e-5)
            assert score.score == pytest.approx(hypothesis.score, rel=1e-5)
            ended.append(hypothesis.finished)
    assert len(ended) == 6


def test_what_is_suppressed_by_its_ids(translator, one_device):
    def suppressed(**changes) -> list[int]:
        other = translator.with_decoding(dataclasses.replace(DECODING.with_method(changes.pop("method")), **changes))
        reader = other.requests
        request = reader.read("one")
        programs = other.programs(reader)
        assert programs.spec(request.shape).method.excluded == (257, 258)  # in a beam search and in sampling
        inputs = programs.inputs([request], request.shape, one_device)
        assert np.asarray(inputs.tokens)[0, :4].tolist() == [*b"one", 256]
        return np.flatnonzero(inputs.suppressed).tolist()

    assert suppressed(method="sampling") == []
    assert suppressed(method="beam", suppress_unknown=True) == []  # there is no unknown text
    assert suppressed(method="beam", suppress_tokens=("<0A>",)) == [10]


def test_other_tokenizers_are_no_marian_model(translator, tmp_path):
    with pytest.raises(ConfigError, match="a MarianMT model has SentencePiece tokenizers, and this run has others"):
        write_marian(translator, MODEL, tmp_path / "marian")
