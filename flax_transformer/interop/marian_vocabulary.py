"""The vocabularies of a MarianMT folder: tokenizers with its segmentation and the ids of this project."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2 as made_by_protobuf

from flax_transformer.data.sentencepiece_tokenizer import (
    END_OF_VOCABULARY,
    LANGUAGE,
    SPECIAL,
    SentencePieceTokenizer,
)
from flax_transformer.data.tokenizer_pair import TokenizerPair
from flax_transformer.errors import InputError, shown
from flax_transformer.interop.marian import UNUSED
from flax_transformer.interop.marian_files import read_json
from flax_transformer.models.transformer_config import TransformerConfig

sentencepiece_model_pb2: Any = made_by_protobuf  # type checkers do not know its members

Piece = sentencepiece_model_pb2.ModelProto.SentencePiece
CUT = (Piece.Type.NORMAL, Piece.Type.USER_DEFINED, Piece.Type.BYTE)  # types of the pieces that text is cut into
SPECIAL_PIECES = {
    SPECIAL.pad: ("<pad>", Piece.Type.CONTROL),
    SPECIAL.start: ("<s>", Piece.Type.CONTROL),
    SPECIAL.end: ("</s>", Piece.Type.CONTROL),
    SPECIAL.unknown: ("<unk>", Piece.Type.UNKNOWN),
}


def our_order(words: dict[str, int], pad: int, end: int, unknown: str = "<unk>") -> tuple[np.ndarray, list[str]]:
    """Returns this project's id of each MarianMT id, and the names of all tokens that are not special.

    This project's special ids come first. The other tokens follow in MarianMT's order.

    Args:
        words: MarianMT's vocabulary, from names to ids.
        pad: MarianMT's id of padding, which becomes the start token.
        end: MarianMT's id of the end token.
        unknown: name of the unknown token.

    Raises:
        InputError: the vocabulary has no unknown token, its ids are not 0, 1, 2, ..., or `pad` equals `end`.
    """
    names = sorted(words, key=lambda name: words[name])
    if unknown not in words or [words[name] for name in names] != list(range(len(names))):
        raise InputError(f"the vocabulary must have the token {unknown} and the ids 0 to {len(words) - 1}.")
    if pad == end:
        raise InputError(f"padding and the end token must have different ids in a MarianMT folder; both have {pad}.")
    special: dict[int, Any] = {pad: SPECIAL.start, end: SPECIAL.end, words[unknown]: SPECIAL.unknown}
    if UNUSED in words:
        special[words[UNUSED]] = SPECIAL.pad
    order, pieces = np.zeros(len(names), np.int64), []
    for number, name in enumerate(names):
        order[number] = special.get(number, len(SPECIAL.ids) + len(pieces))
        if number not in special:
            pieces.append(name)
    return order, pieces


def renumbered(
    model: bytes, pieces: list[str], name_of_model: str = "the SentencePiece model"
) -> SentencePieceTokenizer:
    """Returns a tokenizer with the segmentation of a SentencePiece model and the ids of a vocabulary.

    A piece that only the vocabulary has is never produced. A piece that only the model has is still produced, and
    becomes the unknown token. Language tokens, such as ">>deu<<", are removed before text is cut (see
    `SentencePieceTokenizer.encode`).

    Args:
        model: contents of the SentencePiece model's file.
        pieces: names of the vocabulary's tokens without the special ones, in order.
        name_of_model: name of the model in messages.

    Raises:
        InputError: the model is damaged. A BPE model that lacks pieces of the vocabulary is an error, too: BPE would
            merge symbols into the pieces that are added.
    """
    proto = sentencepiece_model_pb2.ModelProto()
    try:
        proto.ParseFromString(model)
    except DecodeError as error:
        raise InputError(
            f"{name_of_model} is damaged, or no SentencePiece model. Copy or download it again."
        ) from error
    if not any(piece.type in CUT for piece in proto.pieces):
        raise InputError(f"{name_of_model} has no piece that text could be cut into. Copy or download it again.")
    if [p.piece for p in proto.pieces[len(SPECIAL.ids) :]] == pieces and proto.trainer_spec.eos_id == SPECIAL.end:
        return SentencePieceTokenizer(model)  # this project wrote it
    known = {piece.piece: piece for piece in proto.pieces}
    lacking = [name for name in pieces if name not in known and not LANGUAGE.fullmatch(name)]
    if lacking and proto.trainer_spec.model_type == proto.trainer_spec.BPE:
        raise InputError(
            f"{name_of_model} is a BPE model, and lacks {len(lacking)} pieces of the vocabulary, the first is "
            f"{shown(lacking[0])}. Two models of one vocabulary can be imported if they are unigram models."
        )
    new = _ordered_pieces(known, pieces)
    there = {piece.piece for piece in new}
    if outside := [piece for piece in proto.pieces if piece.type in CUT and piece.piece not in there]:
        new += [Piece(piece=END_OF_VOCABULARY, score=0.0, type=Piece.Type.UNUSED), *outside]
    del proto.pieces[:]
    proto.pieces.extend(new)
    spec = proto.trainer_spec
    spec.pad_id, spec.bos_id, spec.eos_id, spec.unk_id = SPECIAL.pad, SPECIAL.start, SPECIAL.end, SPECIAL.unknown
    spec.pad_piece, spec.bos_piece, spec.eos_piece, spec.unk_piece = (name for name, _ in SPECIAL_PIECES.values())
    spec.vocab_size = len(new)
    return SentencePieceTokenizer(proto.SerializeToString())


def _ordered_pieces(known: dict[str, Any], pieces: list[str]) -> list[Any]:
    """Returns the special pieces and those of a vocabulary, in the order of their ids.

    Args:
        known: pieces of the SentencePiece model by name.
        pieces: names of the vocabulary's tokens without the special ones, in order.
    """
    made = [SPECIAL_PIECES[number] for number in sorted(SPECIAL.ids)]
    taken = {name for name, _ in made}
    new = [Piece(piece=name, score=0.0, type=kind) for name, kind in made]
    for name in pieces:
        is_language = LANGUAGE.fullmatch(name)
        if name in known and name not in taken and known[name].type in CUT and not is_language:
            new.append(known[name])
        else:
            name = f"<{name}>" if name in taken else name
            new.append(Piece(piece=name, score=0.0, type=Piece.Type.UNUSED))
    return new


@dataclass(frozen=True)
class Vocabularies:
    """The vocabularies of a MarianMT folder, by side ("source" and "target").

    Attributes:
        tokenizers: tokenizers with the segmentation of MarianMT's and the ids of this project.
        orders: for each side, this project's id of each MarianMT id.
        has_unused: whether MarianMT's target vocabulary has a token for this project's padding (`UNUSED`).
    """

    tokenizers: TokenizerPair
    orders: dict[str, np.ndarray]
    has_unused: bool


def read_vocabularies(folder: Path, theirs: dict[str, Any], model: TransformerConfig) -> Vocabularies:
    """Returns the vocabularies of both sides.

    Args:
        folder: MarianMT folder with vocab.json, source.spm and target.spm.
        theirs: contents of MarianMT's config.json.
        model: this project's configuration of the model.

    Raises:
        InputError: a file is missing or damaged, or two files contradict each other.
    """
    separate = model.share_embeddings != "all"
    target_file = "target_vocab.json" if separate and (folder / "target_vocab.json").is_file() else "vocab.json"
    words = {"source": read_json(folder, "vocab.json"), "target": read_json(folder, target_file)}
    orders, tokenizers = {}, {}
    for side, vocabulary in words.items():
        if side == "target":
            ids = theirs["pad_token_id"], theirs["eos_token_id"]
        elif {"<pad>", "</s>"} <= set(vocabulary):
            ids = vocabulary["<pad>"], vocabulary["</s>"]
        else:
            raise InputError("vocab.json must have the tokens <pad> and </s>.")
        orders[side], pieces = our_order(vocabulary, *ids)
        spm = folder / f"{side}.spm"
        if not spm.is_file():
            raise InputError(f"{spm} is not there. Is {folder} a MarianMT model's folder?")
        tokenizers[side] = renumbered(spm.read_bytes(), pieces, str(spm))
    source, target = tokenizers["source"], tokenizers["target"]
    pair = TokenizerPair(source, source if source.fingerprint == target.fingerprint else target)
    return Vocabularies(pair, orders, UNUSED in words["target"])
