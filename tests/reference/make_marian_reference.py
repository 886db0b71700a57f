"""Writes the folder `marian`: a small MarianMT model with random parameters, and what transformers makes of text by it.

The default tests read it, so that they check reading, tokenizing, logits and search against transformers without
installing it. Run this again after a change to `foreign_marian`, with the parity extra installed:

    python -m tests.reference.make_marian_reference
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers

from flax_transformer.data.synthetic import english_number_words, german_number_words
from flax_transformer.interop.marian_generation import EARLY_STOPPING
from tests.test_marian import foreign_marian, sentencepiece_model_pb2

FOLDER = Path(__file__).with_name("marian")
LONGEST = 24  # tokens of an output
NUMBERS = range(1, 1_000, 2)  # short enough for one compiled shape


def make_reference() -> dict:
    """Returns what transformers makes of the model in the folder."""
    model: Any = transformers.MarianMTModel.from_pretrained(FOLDER).eval()
    tokenizer = transformers.MarianTokenizer.from_pretrained(FOLDER)
    sources = [english_number_words(n) for n in NUMBERS] + [">>deu<< twenty-one", "z\u00fcnf unknown: \u4e2d"]
    targets = [german_number_words(n) for n in NUMBERS[:50]]
    source_ids = [tokenizer(text)["input_ids"] for text in sources]
    target_ids = [tokenizer(text_target=text)["input_ids"] for text in targets]
    found = {}
    with torch.no_grad():
        for stop, early_stopping in EARLY_STOPPING.items():
            made = model.generate(
                **tokenizer(sources, return_tensors="pt", padding=True), num_beams=4, length_penalty=1.0,
                early_stopping=early_stopping, max_length=LONGEST + 1, forced_eos_token_id=None,
                bad_words_ids=[[model.config.pad_token_id]],
            )  # fmt: skip
            rows = [row[1:] for row in made.tolist()]
            found[stop] = [row[: row.index(0) + 1] if 0 in row else None for row in rows]  # None: cut at the limit
        logits = [
            model(
                input_ids=torch.tensor([source]),
                decoder_input_ids=torch.tensor([[model.config.pad_token_id, *target[:-1]]]),
            ).logits[0]
            for source, target in zip(source_ids[:5], target_ids[:5], strict=True)
        ]
    return {
        "made_by": f"transformers {transformers.__version__}, torch {torch.__version__}",
        "sources": sources,
        "source_ids": source_ids,
        "targets": targets,
        "target_ids": target_ids,
        "outputs": found,
        "logits": [[[round(x, 5) for x in row] for row in of_one.tolist()] for of_one in logits],
    }


if __name__ == "__main__":
    shutil.rmtree(FOLDER, ignore_errors=True)
    foreign_marian(FOLDER)
    for side in ("source", "target"):  # the table of nmt_nfkc would be most of the folder
        proto = sentencepiece_model_pb2.ModelProto()
        proto.ParseFromString((FOLDER / f"{side}.spm").read_bytes())
        proto.normalizer_spec.name, proto.normalizer_spec.precompiled_charsmap = "identity", b""
        (FOLDER / f"{side}.spm").write_bytes(proto.SerializeToString())
    text = json.dumps(make_reference(), ensure_ascii=False, separators=(",", ":"))
    (FOLDER / "expected.json").write_text(text.replace('],"', '],\n"') + "\n", encoding="utf-8")
    print({file.name: file.stat().st_size for file in FOLDER.iterdir()})
