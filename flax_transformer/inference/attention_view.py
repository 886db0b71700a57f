"""All that can be seen of a translation: the attention of every layer and head, the n-best list, the beam's tree."""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from flax_transformer.decoding.beam_search import is_running
from flax_transformer.decoding.beam_tree import BeamTree, TreeRecorder
from flax_transformer.decoding.hypotheses import Hypotheses
from flax_transformer.errors import ConfigError, InputError
from flax_transformer.inference.alignment import word_alignment
from flax_transformer.inference.attention_map import attention_weights
from flax_transformer.inference.programs import ProgramOptions
from flax_transformer.inference.requests import Request, check_call
from flax_transformer.inference.results import ResultReader
from flax_transformer.inference.stepped_search import SteppedSearch
from flax_transformer.inference.translation import NoTranslation, Translation
from flax_transformer.inference.translator import Translator
from flax_transformer.models.build import ModelConfig
from flax_transformer.models.recurrent_config import RecurrentConfig
from flax_transformer.models.seq2seq import AttentionWeights
from flax_transformer.models.transformer_config import TransformerConfig
from flax_transformer.parallel.mesh import MeshConfig, make_mesh

# Most tokens of a sentence, or of its translation. A page has a number for each pair of them, layer and head.
MOST_TOKENS = 100


@dataclass(frozen=True)
class AttentionView:
    """A translation and how the model made it.

    Attributes:
        sentence: the raw text.
        translation: its hypotheses, as `Translator.translate` gives them.
        source: pieces that the encoder reads, end token included.
        target: pieces of the best hypothesis, with the end token if it is finished.
        start: piece that the decoder reads first.
        end: piece that ends an output.
        weights: attention while the model reads the source and predicts `target`; arrays of NumPy without the axis B.
        alignment: pairs of source word and target word, counted from 0; empty without attention.
        tree: tree of the search.
        tree_pieces: piece of each node's last token.
    """

    sentence: str
    translation: Translation
    source: list[str]
    target: list[str]
    start: str
    end: str
    weights: AttentionWeights
    alignment: list[tuple[int, int]]
    tree: BeamTree
    tree_pieces: list[str]


def pictures_of(model: ModelConfig) -> str:
    """Returns a sentence about the pictures that a view of this model has."""
    if isinstance(model, TransformerConfig):
        return "Encoder, decoder and cross-attention are shown for every layer and head."
    if isinstance(model, RecurrentConfig) and model.has_attention:
        return "A recurrent model has one cross-attention without heads, and no self-attention."
    if model.has_attention:
        return "Each attention whose weights the model returns is shown, for every layer and head."
    setting = " (model.attention: none)" if isinstance(model, RecurrentConfig) else ""
    return (
        f"This model has no attention{setting}, so there are pictures of its token probabilities, its n-best list and "
        "its beam alone."
    )


def attention_views(
    translator: Translator, sentences: Iterable[Any], num_hypotheses: int | None = None
) -> list[AttentionView | NoTranslation]:
    """Returns the view of each sentence, or the reason why it has none.

    A sentence has no view if it has no token or too many, if its translation has too many, or if it has none.

    The search is that of `Translator.translate`, one sentence at a time on one device. So results are equal except near
    ties.

    Args:
        translator: translator with a single model, whose method is beam search.
        sentences: raw text.
        num_hypotheses: most outputs of each sentence; None asks for the whole beam.

    Raises:
        ConfigError: an ensemble, another method than beam search, or settings that contradict each other. Or an item
            that is no text.
    """
    decoding, num_models = translator.decoding, translator.parameters.num_models
    if decoding.method != "beam":
        raise ConfigError(f"a view shows a beam search, got decoding.method: {decoding.method}. Set it to beam.")
    if num_models > 1:
        raise ConfigError(f"a view shows the attention of one model, got an ensemble of {num_models}. Give one run.")
    num_hypotheses = decoding.beam_size if num_hypotheses is None else num_hypotheses
    check_call(translator.model, decoding, num_hypotheses, False, False)
    alone = _on_one_device(translator)
    return [_view(alone, request, num_hypotheses) for request in translator.requests.read_all(sentences)]


def _on_one_device(translator: Translator) -> Translator:
    """Returns a translator that searches one sentence at a time; on one device unless the parameters are split."""
    decoding = dataclasses.replace(translator.decoding, batch_size=1)
    options = ProgramOptions(sentences_per_row=1, sentences_per_row_with_attention=1)
    if not translator.parameters.sharded and translator.mesh.size > 1:
        mesh = make_mesh(MeshConfig(), [translator.parameters.search_meshes[0].devices.flat[0]])
        of_model = translator.model, translator.tokenizers, translator.params, decoding, mesh
        translator = Translator.from_params(*of_model, sharded=False)
    return dataclasses.replace(translator, decoding=decoding, options=options)


def _source_fault(translator: Translator, request: Request) -> InputError | None:
    """Returns the reason why a sentence cannot be shown; None if it can."""
    most = min(MOST_TOKENS, translator.model.max_source_length - 1)
    if not request.source:
        return InputError("it has no token, so there is nothing to show. Give a text with a word.")
    if request.num_tokens > most or request.truncated:
        whose = "a page shows" if most == MOST_TOKENS else "the model reads"
        return InputError(
            f"it has {request.num_tokens} tokens, and {whose} at most {most}. Give a shorter text, such as a part of "
            "it."
        )
    return None


def _target_fault(num_tokens: int) -> InputError | None:
    """Returns the reason why a translation of so many tokens cannot be shown; None if it can."""
    if num_tokens <= MOST_TOKENS:
        return None
    return InputError(
        f"its translation has {num_tokens} tokens, and a page shows at most {MOST_TOKENS}. Give a shorter text, or "
        "lower decoding.max_length_factor and max_length_offset."
    )


def _view(
    translator: Translator, request: Request | NoTranslation, num_hypotheses: int
) -> AttentionView | NoTranslation:
    if isinstance(request, NoTranslation):
        return request
    if (fault := _source_fault(translator, request)) is not None:
        return NoTranslation(request.sentence, fault, request.truncated)
    tokenizers, special = translator.tokenizers, translator.tokenizers.target.special
    found, recorder = _searched(translator, request, num_hypotheses)
    reader = ResultReader(tokenizers, translator.decoding, num_hypotheses, translator.parameters)
    translation = reader.read(request, found, 0)
    if isinstance(translation, NoTranslation):
        return translation
    target = found.tokens[0, 0, : found.lengths[0, 0]].tolist()
    if (fault := _target_fault(len(target) - 1)) is not None:
        return NoTranslation(request.sentence, fault)
    best, pairs = translation.hypotheses[0], []
    if best.attention is not None:
        words = word_alignment(translation.source_words, best.words, best.attention).split()
        pairs = [(int(source), int(to)) for source, _, to in (pair.partition("-") for pair in words)]
    tree = recorder.tree(found, 0, num_hypotheses)
    start, end = tokenizers.target.pieces([special.start, special.end])
    return AttentionView(
        sentence=request.sentence,
        translation=translation,
        source=tokenizers.source.pieces(request.source),
        target=tokenizers.target.pieces(target),
        start=start,
        end=end,
        weights=attention_weights(translator, request.source, target),
        alignment=pairs,
        tree=tree,
        tree_pieces=tokenizers.target.pieces([node.token for node in tree.nodes]),
    )


def _searched(translator: Translator, request: Request, num_hypotheses: int) -> tuple[Hypotheses, TreeRecorder]:
    """Returns the results of a search, as arrays of NumPy, and its recorded steps."""
    programs = translator.programs(translator.requests, num_hypotheses, translator.model.has_attention)
    search, recorder = SteppedSearch.of(programs, [request]), TreeRecorder()
    state = search.start()
    while is_running(state):
        state = search.advance(state, 1)
        recorder.add(state)
    return search.finish(state), recorder
