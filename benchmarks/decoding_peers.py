"""The systems that decoding is compared with, CTranslate2 and Hugging Face, by the same MarianMT folder.

Each of the two functions loads a model and returns (sentences, how many of them at the same time) -> translations.
As a script, `python decoding_peers.py NAME FOLDER BEAM_SIZE LONGEST THREADS` translates one line of standard input. So
nothing is imported at the top that a command of either system would not need.
"""

import sys
from typing import Any


def ctranslate2_translator(folder: str, beam_size: int, longest: int, threads: int, compute_type: str = "float32"):
    """Returns CTranslate2's translation by the model in FOLDER/ctranslate2.

    On a CPU it has one worker of one thread for each core, since one worker of two threads is slower at any size.

    Args:
        folder: with the SentencePiece models.
        beam_size: hypotheses kept at each step.
        longest: most tokens of an output, end token included.
        threads: of a CPU.
        compute_type: as CTranslate2 names it.
    """
    import ctranslate2
    import sentencepiece

    device = "cuda" if ctranslate2.get_cuda_device_count() else "cpu"
    workers = 1 if device == "cuda" else threads
    model = ctranslate2.Translator(
        f"{folder}/ctranslate2", device=device, compute_type=compute_type, inter_threads=workers, intra_threads=1
    )
    source = sentencepiece.SentencePieceProcessor(model_file=f"{folder}/source.spm")
    target = sentencepiece.SentencePieceProcessor(model_file=f"{folder}/target.spm")

    def translate(lines: list[str], size: int) -> list[str]:
        pieces = [[*p, "</s>"] for p in source.encode(lines, out_type=str)]
        found = model.translate_batch(
            pieces, beam_size=beam_size, max_batch_size=size, length_penalty=1.0,
            max_decoding_length=longest - 1, min_decoding_length=0,
        )  # fmt: skip
        return target.decode([f.hypotheses[0] for f in found])

    return translate


def hugging_face_translator(folder: str, beam_size: int, longest: int, threads: int, half: bool = False):
    """Returns the translation of Hugging Face's `generate`, longest sentences first.

    Args:
        folder: a MarianMT model.
        beam_size: hypotheses kept at each step.
        longest: most tokens of an output, end token included.
        threads: of a CPU.
        half: whether it computes in bfloat16.
    """
    import torch
    import transformers

    torch.set_num_threads(threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = transformers.MarianMTModel.from_pretrained(folder).eval()
    model = model.to(device, torch.bfloat16 if half else torch.float32)
    tokenizer = transformers.MarianTokenizer.from_pretrained(folder)
    bad_words = [[model.config.decoder_vocab_size - 1]]

    def translate(lines: list[str], size: int) -> list[str]:
        order = sorted(range(len(lines)), key=lambda n: -len(lines[n]))
        results = [""] * len(lines)
        for start in range(0, len(order), size):
            chunk = order[start : start + size]
            inputs = tokenizer([lines[n] for n in chunk], return_tensors="pt", padding=True).to(device)
            with torch.inference_mode():
                made = model.generate(
                    **inputs, num_beams=beam_size, length_penalty=1.0, early_stopping=True, max_length=longest + 1,
                    bad_words_ids=bad_words,
                )  # fmt: skip
            for n, text in zip(chunk, tokenizer.batch_decode(made, skip_special_tokens=True), strict=True):
                results[n] = text
        return results

    return translate


LOADERS: dict[str, Any] = {"CTranslate2": ctranslate2_translator, "Hugging Face": hugging_face_translator}

if __name__ == "__main__":
    translator = LOADERS[sys.argv[1]](sys.argv[2], *map(int, sys.argv[3:]))
    print(translator([sys.stdin.readline().strip()], 1)[0])
