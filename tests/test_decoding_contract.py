"""The contract of decoding (docs/decoding.md) on small models with random parameters: each sentence has a test."""

import dataclasses
import itertools
from typing import Any

import jax
import numpy as np
import pytest

from flax_transformer.config.recipe import DecodingConfig
from flax_transformer.data.tokenizer import TokenizerConfig
from flax_transformer.data.tokenizer_pair import TokenizerPair
from flax_transformer.errors import ConfigError, DivergenceError, InputError, RunFolderError
from flax_transformer.inference.alignment import word_alignment
from flax_transformer.inference.minimum_bayes_risk import expected_utilities
from flax_transformer.inference.programs import ProgramOptions
from flax_transformer.inference.scorer import NoScore, Scorer
from flax_transformer.inference.translation import EMPTY, Hypothesis, NoTranslation, no_output_line, texts_or_empty
from flax_transformer.inference.translator import Translator
from flax_transformer.models.recurrent_config import RecurrentConfig
from flax_transformer.parallel.mesh import MeshConfig, make_mesh
from tests.small_models import (
    ALIKE,
    DECODING,
    MODELS,
    SEEDS,
    SMALL,
    SOURCES,
    TARGETS,
    TOKENIZERS,
    holds,
    make_run,
    params_of,
    params_that_end,
)


@pytest.fixture(scope="module")
def translators() -> dict[str, Translator]:
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    params = {name: params_that_end(model, SEEDS[name]) for name, model in MODELS.items()}
    return {
        name: Translator.from_params(model, TOKENIZERS, params[name], DECODING, mesh) for name, model in MODELS.items()
    }


@pytest.fixture(params=list(MODELS))
def translator(request, translators) -> Translator:
    return translators[request.param]


def ids_of(hypothesis) -> list[int]:
    names = TOKENIZERS.target.pieces(range(TOKENIZERS.target.vocab_size))
    return [names.index(piece) for piece in hypothesis.tokens]


def test_the_models_of_these_tests_make_outputs_of_many_lengths_and_cut_ones(translator):
    """Without that the tests below would hold little."""
    for text in (SOURCES[:24], ALIKE[:24]):
        lists = [found.hypotheses for found in translator.translate(text, num_hypotheses=3)]
        ended = [h for hypotheses in lists for h in hypotheses if h.finished]
        assert 0.3 < len(ended) / sum(map(len, lists)) < 0.7 and len({len(h.tokens) for h in ended}) >= 8
        assert sum(len({h.finished for h in hypotheses}) == 2 for hypotheses in lists) >= 5
        assert 6 < sum(hypotheses[0].finished for hypotheses in lists) < 22
        scores = [score for hypotheses in lists for h in hypotheses for score in h.token_scores]
        assert max(scores) > -0.01 and min(scores) < -1  # a token that is nearly certain has an exception


# --- batch invariance


def test_how_many_sentences_a_call_takes_changes_no_bit(translators):
    """One call for all, with more pieces of sentences than wait at a time, or several calls of nearly as many each."""
    translator = translators["transformer"]
    text = [source for source in ALIKE if source]
    assert len(text) > 3 * 2 * translator.batch_size
    expected = translator.translate(text)
    found = dataclasses.replace(translator, options=ProgramOptions(sentences_per_row=2)).translate(text)
    assert [[(h.tokens, h.score) for h in t.hypotheses] for t in found] == [
        [(h.tokens, h.score) for h in t.hypotheses] for t in expected
    ]


@pytest.mark.parametrize("stop", ["exact", "first_finished"])
def test_fewer_hypotheses_are_the_first_of_more(translators, stop):
    """By the rule "exact" a search of fewer also stops sooner."""
    texts = SOURCES[:40]
    found = {n: translators["transformer"].translate(texts, num_hypotheses=n, stop=stop) for n in (1, 2, 3)}
    for n, sentence in itertools.product((1, 2), range(len(texts))):
        more = found[3][sentence].hypotheses
        if sum(h.finished for h in more) >= n:  # unfinished ones are those of the step at which a search stopped
            assert found[n][sentence].hypotheses == more[:n]


def test_no_composition_of_a_batch_changes_a_bit(translator):
    """1,200 translations in random compositions: each n-best list, scores included, is that of the sentence alone."""
    alone = {s: translator.translate([s], num_hypotheses=3)[0] for s in SOURCES[:24]}
    rng = np.random.default_rng(1)
    seen = 0
    while seen < 1_200:
        chosen = rng.choice(SOURCES[:24], int(rng.integers(1, 60))).tolist()
        for sentence, found in zip(chosen, translator.translate(chosen, num_hypotheses=3), strict=True):
            assert found == alone[sentence]
        seen += len(chosen)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2])
def test_no_small_composition_changes_a_bit_on_one_device_or_two(translators, devices):
    """1,000 of them. By either rule slots are refilled one by one, as sentences end at different steps.

    Two devices search side by side.
    """
    mesh = make_mesh(MeshConfig(), jax.devices()[:devices])
    params, pool, rng = translators["transformer"].params, SOURCES[:40], np.random.default_rng(devices)
    for stop in ("exact", "first_finished"):
        decoding = dataclasses.replace(DECODING, stop=stop)
        translator = Translator.from_params(
            MODELS["transformer"], TOKENIZERS, params, decoding, mesh, side_by_side=True
        )
        alone = {s: translator.translate([s], num_hypotheses=3)[0] for s in pool}
        ended = [sum(h.finished for h in found.hypotheses) for found in alone.values()]
        assert {0, 3} <= set(ended)
        for _ in range(500):
            chosen = rng.choice(pool, int(rng.integers(1, 13)), replace=bool(rng.integers(2))).tolist()
            assert translator.translate(chosen, num_hypotheses=3) == [alone[sentence] for sentence in chosen]


def test_samples_hold_neither_padding_nor_start(translators):
    sampler = translators["transformer"].with_decoding(DecodingConfig("sampling", batch_size=4, temperature=5.0))
    for found in sampler.translate(ALIKE[:4], num_hypotheses=16):
        assert not {"<pad>", "<s>"} & {token for h in found.hypotheses for token in h.tokens}


@pytest.mark.parametrize("method", ["beam", "sampling"])
def test_a_sentence_without_any_output_says_why_and_costs_the_others_nothing(method):
    # With four tokens beside padding, start and end, an output of 20 that are all different cannot be.
    tokenizers = TokenizerPair.train(["ab ba"] * 3, ["ab ba"] * 3, TokenizerConfig("char", 8))
    assert tokenizers.target.vocab_size == 7
    model, mesh = MODELS["transformer"], make_mesh(MeshConfig(), jax.devices()[:1])
    decoding = DecodingConfig(method, length_penalty="average:1.0", batch_size=2)
    translator = Translator.from_params(model, tokenizers, params_of(model, 1, tokenizers), decoding, mesh)
    spoilt = translator.with_params(jax.tree.map(lambda leaf: leaf * np.nan, translator.params))
    rules: dict[str, Any] = {"min_length": 20, "no_repeat_ngram": 1}
    by_rules = r"the rules that are set \(decoding.min_length: 20, decoding.no_repeat_ngram: 1\) leave no token"
    for made, changes, error, cause in (
        (translator, rules, ConfigError, by_rules),
        (spoilt, rules, DivergenceError, "the model's scores are not finite: the training has diverged"),
        (spoilt, {}, DivergenceError, "the model's scores are not finite: the training has diverged"),
    ):
        nothing, *others = made.translate(["", "ba b", "ab ba" * 6], **changes)
        assert nothing == EMPTY
        for sentence, found in zip(("ba b", "ab ba" * 6), others, strict=True):
            assert isinstance(found, NoTranslation) and type(found.reason) is error and found.sentence == sentence
            for name in ("text", "hypotheses", "score", "tokens"):
                message = rf"'{sentence}' has no translation: the search found no output at all, since {cause}"
                with pytest.raises(error, match=message):
                    getattr(found, name)
    assert translator.translate(["", "ba b"])[1].tokens


def test_what_one_sentence_cannot_have_leaves_the_others_as_they_are(translators):
    """Whether that is known before the search or after it."""
    translator, text = translators["transformer"], ALIKE[:4]
    usual = translator.translate(text, num_hypotheses=2)
    for asked, bad in (
        ({"prefixes": ["", "\u4e2d", "", "ein" * 40]}, {1, 3}),
        ({"required": [[], [], ["\u4e2d"], []]}, {2}),
    ):
        found = translator.translate(text, num_hypotheses=2, **asked)
        assert {n for n, each in enumerate(found) if isinstance(each, NoTranslation)} == bad
        assert all(each == before for n, (each, before) in enumerate(zip(found, usual, strict=True)) if n not in bad)
    halves = translator.translate([text[0], "a\udcff", text[1]], num_hypotheses=2)
    assert [halves[0], halves[2]] == usual[:2] and "not valid Unicode" in str(halves[1].reason)

    # Of two tokens, each once and in one order alone: an output that begins with the wrong one has no second.
    sampler = translator.with_decoding(DecodingConfig("sampling", batch_size=4, temperature=9.0))
    begin, end = TOKENIZERS.target.pieces(TOKENIZERS.target.encode(["neun"])[0])
    others = set(TOKENIZERS.target.pieces(range(4, TOKENIZERS.target.vocab_size))) - {begin, end}
    rules = {"min_length": 2, "suppress_unknown": True, "no_repeat_ngram": 1, "suppress_sequences": ("neun",)}
    found = sampler.translate(
        text[:2], num_hypotheses=16, prefixes=["", [begin]], suppress_tokens=tuple(sorted(others)), **rules
    )
    assert found[0].tokens == [end, begin]
    with pytest.raises(ConfigError, match="has no translation: .* the rules that are set .* leave no token to go on"):
        _ = found[1].text


def test_an_evaluation_takes_an_empty_line_for_a_sentence_without_an_output():
    whole = dataclasses.replace(EMPTY, hypotheses=[Hypothesis("eins", ["eins"], -1.0, True, [-1.0])], source=["one"])
    ruled, spoilt = NoTranslation("two", ConfigError("no token")), NoTranslation("six", DivergenceError("no number"))
    assert texts_or_empty([EMPTY, ruled, whole, spoilt]) == ["", "", "eins", ""]
    named = "2 of 4 test sentences have no output and count as empty. The first is 'two': no token"
    assert no_output_line([EMPTY, ruled, whole, spoilt], "test sentences") == named
    assert texts_or_empty([ruled]) == [""] and texts_or_empty([EMPTY]) == [""]
    assert no_output_line([EMPTY, whole], "test sentences") == ""
    with pytest.raises(DivergenceError, match="'six' has no translation: no number"):  # of all that are not empty
        texts_or_empty([EMPTY, spoilt])
    with pytest.raises(DivergenceError, match="'six' has no translation: no number"):  # finite, but beyond float32
        texts_or_empty([ruled, spoilt])
    with pytest.raises(ConfigError, match="'two' has no translation: no token"):  # the settings leave nothing at all
        texts_or_empty([ruled, EMPTY, ruled])


def test_a_prefix_may_be_pieces_by_their_names(translators):
    """So an output may begin with what no text is cut into, and go on where another stopped."""
    translator = translators["transformer"]
    target = TOKENIZERS.target
    before = max(translator.translate(ALIKE[:9]), key=lambda found: len(found.tokens))
    begun = before.tokens[: len(before.tokens) // 2]
    (found,) = translator.translate(ALIKE[:1], prefixes=[begun])
    assert len(begun) > 2 and found.tokens[: len(begun)] == begun
    (text,) = translator.translate(ALIKE[:1], prefixes=["neun"])
    assert text == translator.translate(ALIKE[:1], prefixes=[target.pieces(target.encode(["neun"])[0])])[0]
    inner = next(name for name in target.pieces(range(4, 60)) if not name.startswith("\u2581"))
    assert translator.translate(ALIKE[:1], prefixes=[[inner]])[0].tokens[0] == inner  # no text begins with it
    for name, message in (
        ("hundred", "prefix 'hundred': 'hundred' is no piece .* Did you mean '\u2581hundred'"),
        ("</s>", "no piece"),
    ):
        with pytest.raises(InputError, match=message):
            _ = translator.translate(ALIKE[:1], prefixes=[[name]])[0].text


def test_samples_do_not_depend_on_the_batch(translators):
    sampler = translators["transformer"].with_decoding(DecodingConfig("sampling", batch_size=4, seed=5))
    together = sampler.translate(ALIKE[:7], num_hypotheses=4)
    alone = [sampler.translate([s], num_hypotheses=4)[0] for s in ALIKE[:3]]
    assert together[:3] == alone
    assert len({h.text for t in together for h in t.hypotheses}) > 7
    for found in together:
        texts = [tuple(h.tokens) for h in found.hypotheses]
        assert len(set(texts)) == len(texts)  # what is drawn twice is returned once
    other = sampler.translate(ALIKE[:3], num_hypotheses=4, seed=6)
    assert [t.hypotheses for t in other] != [t.hypotheses for t in alone]


def test_the_output_that_the_others_agree_with_comes_first(translators):
    texts, counts = ["the cat sat", "the cat sat down", "a dog ran off"], [2, 1, 1]
    for utility in ("chrf", "bleu"):
        found = expected_utilities(texts, counts, utility)
        assert found[2] < min(found[:2])
    # By hand: the same text is 100, so drawn once of four it has a quarter of that from itself.
    assert expected_utilities(["ab", "xy"], [3, 1], "chrf") == pytest.approx([75.0, 25.0])
    sampler = translators["transformer"].with_decoding(DecodingConfig("sampling", batch_size=4, top_k=2))
    for by_score, chosen in zip(
        sampler.translate(ALIKE[:3], num_hypotheses=8),
        sampler.translate(ALIKE[:3], num_hypotheses=2, mbr_samples=8),
        strict=True,
    ):
        pool = by_score.hypotheses
        assert sum(h.count for h in pool) == 8
        utilities = expected_utilities([h.text for h in pool], [h.count for h in pool], "chrf")
        best = sorted(utilities, reverse=True)[: len(chosen.hypotheses)]
        assert [h.utility for h in chosen.hypotheses] == pytest.approx(best)
        assert chosen.text == pool[int(np.argmax(utilities))].text
        assert len(chosen.hypotheses) <= 2


def test_numbers_of_rows_agree_on_tokens(translator):
    few, many = translator.translate(ALIKE[:60]), translator.translate(ALIKE[:60], batch_size=16)
    alike = [(a.score, b.score) for a, b in zip(few, many, strict=True) if a.tokens == b.tokens]
    assert len(alike) >= 59  # a near tie may be decided the other way
    # Sums of a whole model in float32: the order depends on the rows and on the version of XLA.
    np.testing.assert_allclose(*zip(*alike, strict=True), rtol=5e-5)


# --- one score


def test_score_gives_what_translate_gave_token_by_token(translator):
    scorer, ended = Scorer(translator), []
    for sentence, found in zip(ALIKE[:12], translator.translate(ALIKE[:12], num_hypotheses=3), strict=True):
        source = TOKENIZERS.source.encode([sentence])[0]
        for hypothesis in found.hypotheses:
            (score,) = scorer.score_ids([source], [ids_of(hypothesis)], end=hypothesis.finished)
            assert len(score.token_scores) == len(hypothesis.tokens) + hypothesis.finished
            ended.append(hypothesis.finished)
            # Logits reach 16 here, where numbers of float32 lie 1e-6 apart: ten of these for the sums that make them.
            np.testing.assert_allclose(score.token_scores, hypothesis.token_scores, rtol=1e-5, atol=1e-5)
            assert score.score == pytest.approx(hypothesis.score, rel=1e-5)
            assert sum(hypothesis.token_scores) == pytest.approx(score.log_prob, rel=1e-5)
    assert 10 < sum(ended) < len(ended)


def test_scores_of_text(translator):
    scorer = Scorer(translator)
    scores = scorer.score(SOURCES[:9], TARGETS[:9], "none")
    assert [s.tokens for s in scores] == [TOKENIZERS.target.pieces(i) for i in TOKENIZERS.target.encode(TARGETS[:9])]
    assert all(s.score == s.log_prob for s in scores)
    with pytest.raises(InputError, match="1 sources and 0 targets"):
        scorer.score(["one"], [])


def test_a_pair_without_a_score_says_why_and_costs_the_others_nothing(translator):
    scorer = Scorer(translator)
    (usual,) = scorer.score(["one"], ["eins"])
    for source, target, message in (
        ("", "zwei", "'zwei' has no score: its source is empty, and its target is not"),
        ("one", "eins " * 60, "has no score: its target has .* tokens, and the model's outputs have at most 47"),
        ("one", "\udcff", "not valid Unicode"),
        ("\udcff", "", "not valid Unicode"),
    ):
        first, without, last = scorer.score(["one", source, "one"], ["eins", target, "eins"])
        assert first == last == usual and isinstance(without, NoScore)
        for name in ("score", "log_prob", "tokens", "token_scores"):
            with pytest.raises(InputError, match=message):
                getattr(without, name)
    spoilt = translator.with_params(jax.tree.map(lambda leaf: leaf * np.nan, translator.params))
    (without, nothing) = Scorer(spoilt).score(["one", ""], ["eins", ""])
    assert isinstance(without, NoScore) and nothing.score == 0.0
    with pytest.raises(DivergenceError, match="'eins' has no score: the model's scores are not finite"):
        _ = without.score


def test_what_translate_makes_of_an_empty_and_of_a_long_line_is_scored_as_it_was(translator):
    text = ["", *(f"{word} " * 60 for word in "one two three four five six seven eight nine ten".split())]
    made = translator.translate(text)
    scores = Scorer(translator).score(text, [found.text for found in made])
    assert (scores[0].score, scores[0].tokens, scores[0].token_scores) == (made[0].score, [], [])
    assert [score.truncated for score in scores] == [False] + [True] * 10
    same = []
    for found, score in zip(made, scores, strict=True):
        same.append(found.hypotheses[0].finished and score.tokens == found.tokens)
        assert (score.score == pytest.approx(found.score, rel=1e-5)) == same[-1]
    assert 1 < sum(same) < len(made)
    (nothing,) = Scorer(translator).score_ids(TOKENIZERS.source.encode(["one"]), [[]])
    assert len(nothing.token_scores) == 1 and nothing.score < 0
    assert [nothing] == Scorer(translator).score(["one"], [""])


def test_a_forced_end_costs_nothing_and_score_counts_it(translators):
    translator, limits = translators["transformer"], {"max_length_factor": 0.0, "max_length_offset": 4}
    found = translator.translate(ALIKE[:12], force_eos=True, **limits)
    forced = [len(each.tokens) == 4 for each in found]
    assert 0 < sum(forced) < len(found) and all(each.hypotheses[0].finished for each in found)
    targets = [ids_of(each.hypotheses[0]) for each in found]
    scores = Scorer(translator).score_ids(TOKENIZERS.source.encode(ALIKE[:12]), targets)
    for each, score, at_limit in zip(found, scores, forced, strict=True):
        *before, end = each.hypotheses[0].token_scores
        np.testing.assert_allclose(score.token_scores[:-1], before, rtol=1e-5, atol=5e-6)
        if at_limit:
            assert end == 0.0 and score.token_scores[-1] < -0.01 and score.score < each.score
        else:
            assert score.token_scores[-1] == pytest.approx(end, rel=1e-5, abs=5e-6)


# --- options


def different(translations) -> float:
    """Share of the tokens that are the first of their kind in their sentence."""
    return sum(len(set(t.tokens)) for t in translations) / sum(len(t.tokens) for t in translations)


@pytest.mark.slow
def test_outputs_obey_what_is_asked(translators):
    translator = translators["transformer"]
    usual = translator.translate(ALIKE[:8], num_hypotheses=3)
    shortest = min(len(h.tokens) for t in usual for h in t.hypotheses)
    long = translator.translate(ALIKE[:8], num_hypotheses=3, min_length=shortest + 2)
    assert min(len(h.tokens) for t in long for h in t.hypotheses) >= shortest + 2

    for found in translator.translate(ALIKE[:8], num_hypotheses=3, no_repeat_ngram=2):
        for hypothesis in found.hypotheses:
            pairs = list(zip(hypothesis.tokens, hypothesis.tokens[1:], strict=False))
            assert len(set(pairs)) == len(pairs)

    common = usual[0].hypotheses[0].tokens[0].replace("\u2581", " ").strip() or "a"
    suppressed = TOKENIZERS.target.pieces(TOKENIZERS.target.encode([common])[0])
    for found in translator.translate(ALIKE[:8], num_hypotheses=3, suppress_sequences=(common,)):
        for hypothesis in found.hypotheses:
            tokens = hypothesis.tokens
            assert all(tokens[i : i + len(suppressed)] != suppressed for i in range(len(tokens)))

    # A prefix that is longer than the limit of its sentence makes room for itself, and changes nothing for others.
    long_prefix = "dreihunderteinundzwanzigtausend"
    (longer, plain) = translator.translate(ALIKE[:2], prefixes=[long_prefix, ""], max_length_factor=0.01)
    forced = TOKENIZERS.target.pieces(TOKENIZERS.target.encode([long_prefix])[0])
    assert len(forced) > 6 and longer.tokens[: len(forced)] == forced
    assert plain == translator.translate(ALIKE[1:2], max_length_factor=0.01)[0]

    prefix = "ein"
    forced = TOKENIZERS.target.pieces(TOKENIZERS.target.encode([prefix])[0])
    some = [prefix, "", prefix, ""]
    for text, found, plain in zip(some, translator.translate(ALIKE[:4], prefixes=some), usual, strict=False):
        if text:
            assert found.tokens[: len(forced)] == forced
        else:
            assert found.tokens == plain.tokens
    repeated = translator.translate(ALIKE[:8], repetition_penalty=5.0)
    assert different(repeated) > different(usual)


@pytest.mark.slow
def test_an_output_that_reaches_its_limit_is_closed_if_that_is_asked_for(translators):
    translator = translators["transformer"]
    limits: dict[str, Any] = {"max_length_factor": 0.0, "max_length_offset": 4}
    text, prefixes = ALIKE[:8], ["ein", ""] * 4
    cut = translator.translate(text, num_hypotheses=3, prefixes=prefixes, **limits)
    closed = translator.translate(text, num_hypotheses=3, prefixes=prefixes, force_eos=True, **limits)
    assert any(not h.finished for t in cut for h in t.hypotheses)
    hypotheses = [h for t in closed for h in t.hypotheses]
    assert all(h.finished and len(h.tokens) < 5 for h in hypotheses)
    at_limit = [h for h in hypotheses if len(h.tokens) == 4]
    assert at_limit and all(h.token_scores[-1] == 0.0 for h in at_limit)
    assert all(h.token_scores[-1] < 0.0 for h in hypotheses if len(h.tokens) < 4)
    pieces = TOKENIZERS.target.pieces(TOKENIZERS.target.encode(["ein"])[0])
    assert all(h.tokens[: len(pieces)] == pieces for t in closed[::2] for h in t.hypotheses)
    sampler = translator.with_decoding(DecodingConfig("sampling", batch_size=4, force_eos=True, **limits))
    assert all(h.finished for t in sampler.translate(text[:4], num_hypotheses=8) for h in t.hypotheses)
    # One that must hold phrases is not closed, since it may lack some.
    required, growing = [["neunhundert", "zwanzig"]] * 2, limits | {"max_length_factor": 0.01}
    assert translator.translate(text[:2], required=required, force_eos=True, **growing) == translator.translate(
        text[:2], required=required, **growing
    )


@pytest.mark.slow
def test_outputs_hold_what_is_required_or_say_that_they_do_not(translators):
    translator = translators["transformer"]
    asked = [["neun"], [], ["ein", "zwei"], ["zwanzig", "dreihundert"]]
    found = translator.translate(ALIKE[:4], num_hypotheses=3, required=asked)
    for translation, phrases in zip(found, asked, strict=True):
        for hypothesis in translation.hypotheses:
            there = {text for text in phrases if holds(hypothesis.tokens, text)}
            assert set(hypothesis.missing) == set(phrases) - there
            assert not (hypothesis.finished and hypothesis.missing)
        assert translation.hypotheses[0].missing == []  # finished or not
    assert found[1] == translator.translate(ALIKE[1:2], num_hypotheses=3)[0]
    for number in (0, 2, 3):  # whatever stands beside it
        (alone,) = translator.translate([ALIKE[number]], num_hypotheses=3, required=[asked[number]])
        assert alone == found[number]


def with_probable_unknown(translator: Translator, factor: float) -> Translator:
    """A translator whose outputs hold the unknown token, by a factor or by its negative."""
    table = translator.params["target_embedding"]["table"]
    return translator.with_params(translator.params | {"target_embedding": {"table": table.at[3].multiply(factor)}})


def test_unknown_tokens_are_suppressed(translators):
    unsure = with_probable_unknown(translators["transformer"], -9.0)
    assert any("<unk>" in t.tokens for t in unsure.translate(ALIKE[:30]))
    assert not any("<unk>" in t.tokens for t in unsure.translate(ALIKE[:30], suppress_unknown=True))


def test_coverage_lowers_the_scores_by_what_the_attention_missed(translators):
    translator = translators["transformer"]
    beam_one = {"beam_size": 1, "length_penalty": "none"}
    plain = translator.translate(ALIKE[:6], attention=True, **beam_one)
    covered = translator.translate(ALIKE[:6], coverage_penalty=0.3, **beam_one)
    for before, after in zip(plain, covered, strict=True):
        assert after.tokens == before.tokens
        given = np.minimum(before.hypotheses[0].attention.sum(axis=0), 1.0)
        assert after.score == pytest.approx(before.score + 0.3 * np.log(given).sum(), rel=1e-4)


def test_attention_comes_with_the_search_and_becomes_an_alignment(translator):
    sentence = f"{ALIKE[0]} \u4e2d one"  # a character that the vocabulary does not hold
    tokens = []
    for made in (translator, with_probable_unknown(translator, 9.0), with_probable_unknown(translator, -9.0)):
        (found,) = made.translate([sentence], attention=True, num_hypotheses=2)
        assert [len(words) for words in found.source_words] == [1] * len(found.source)
        for hypothesis in found.hypotheses:
            weights = hypothesis.attention
            assert weights is not None and weights.shape == (len(hypothesis.token_scores), len(found.source) + 1)
            np.testing.assert_allclose(weights.sum(axis=1), 1.0, rtol=1e-5)
            text = word_alignment(found.source_words, hypothesis.words, weights)
            pairs = [tuple(map(int, pair.split("-"))) for pair in text.split()]
            assert pairs == sorted(pairs, key=lambda p: (p[1], p[0]))
            assert {s for s, _ in pairs} <= set(range(len(sentence.split())))
            assert {t for _, t in pairs} == set(range(len(hypothesis.text.split())))
        tokens += found.tokens
    assert "<unk>" in tokens
    assert translator.translate([sentence])[0].source_words == []  # nobody asked


@pytest.mark.slow
def test_an_ensemble_averages_probabilities(translators, tmp_path):
    for name, model in MODELS.items():
        mesh = translators[name].mesh
        paths = [tmp_path / f"{name}_{seed}" for seed in (SEEDS[name], 1)]
        for seed, path in zip((SEEDS[name], 1), paths, strict=True):
            make_run(path, model, seed)
        twice = Translator.load([paths[0], paths[0]], mesh)
        alone = translators[name].translate(ALIKE[:10])
        for one, two in zip(alone, twice.translate(ALIKE[:10]), strict=True):
            assert one.tokens == two.tokens and one.score == pytest.approx(two.score, rel=1e-4)
        both = Translator.load(paths, mesh)
        (found,) = both.translate(ALIKE[:1])
        source = TOKENIZERS.source.encode(ALIKE[:1])
        each = []
        for path in paths:
            scores = Scorer(Translator.load(path, mesh)).score_ids(
                source, [ids_of(found.hypotheses[0])], end=found.hypotheses[0].finished
            )
            each.append(np.exp(scores[0].token_scores))
        np.testing.assert_allclose(np.exp(found.hypotheses[0].token_scores), np.mean(each, axis=0), rtol=1e-4)
        best = found.hypotheses[0]
        (score,) = Scorer(both).score_ids(source, [ids_of(best)], end=best.finished)
        np.testing.assert_allclose(score.token_scores, best.token_scores, rtol=1e-5, atol=1e-5)
    with pytest.raises(RunFolderError, match="cannot be an ensemble: all need the same section 'model'"):
        Translator.load([tmp_path / "transformer_1", tmp_path / "recurrent_1"], translators["transformer"].mesh)


# --- bad input


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"beam_sise": 3}, "unknown decoding option 'beam_sise'. Did you mean 'beam_size'"),
        ({"coverage_penalty": -0.1}, "decoding.coverage_penalty must not be negative"),
        ({"no_repeat_ngram": -1}, "decoding.no_repeat_ngram must not be negative"),
        ({"repetition_penalty": 0.5}, "decoding.repetition_penalty must be at least 1, got 0.5"),
        ({"suppress_sequences": (" ",)}, "an empty text cannot be suppressed"),
        ({"temperature": 0.5}, r"decoding.temperature \(0.5\) and decoding.method: beam contradict each other"),
        ({"mbr_samples": 4}, r"decoding.mbr_samples \(4\) and decoding.method: beam contradict each other"),
        (
            {"method": "sampling", "stop": "first_finished"},
            r"stop \(first_finished\) and decoding.method: sampling contradict",
        ),
        ({"min_length": 48}, r"decoding.min_length \(48\) is more than the 47 tokens"),
        ({"prefixes": ["a"]}, "prefixes must be a list with one for each of the 2 sentences"),
        ({"prefixes": ["", "\u4e2d"]}, "prefix '\u4e2d' has characters that the target vocabulary does not hold"),
        (
            {"prefixes": ["", "ein" * 30]},
            r"prefix 'ein.*' has \d+ tokens, and outputs have at most 47 \(model.max_target",
        ),
        ({"prefixes": ["", " "]}, "prefix ' ' has no token that an output could begin with: leave it out"),
        (
            {"max_length_factor": 0.0, "max_length_offset": 5, "min_length": 6},
            r"min_length \(6\) is more than the 5 tokens .*decoding.max_length_offset with max_length_factor 0",
        ),
        (
            {"max_length_factor": 0.0, "max_length_offset": 3, "prefixes": ["", "ein" * 5]},
            r"prefix 'ein.*' has \d+ tokens, and outputs have at most 3 \(decoding.max_length_offset with",
        ),
        (
            {"max_length_factor": 0.0, "max_length_offset": 3, "required": [["ein" * 5], []]},
            r"the required phrases have \d+ .* at most 3 \(decoding.max_length_offset with max",
        ),
        ({"min_length": -1}, "decoding.min_length must not be negative, got -1"),
        ({"method": "sampling", "mbr_samples": -1}, "decoding.mbr_samples must not be negative, got -1"),
        ({"max_length_offset": -1}, "max_length_factor and max_length_offset must not be negative"),
        ({"method": "sampling", "beam_size": 8}, r"beam_size \(8\) and decoding.method: sampling contradict"),
        ({"seed": 3}, r"decoding.seed \(3\) and decoding.method: beam contradict"),
        (
            {"method": "sampling", "mbr_samples": 2, "num_hypotheses": 3},
            r"num_hypotheses \(3\) and decoding.mbr_samples \(2\) contradict each other",
        ),
        ({"suppress_sequences": ("\u200b",)}, "has no token that could be suppressed"),
        ({"required": [["ein"]]}, "required must be a list with one for each of the 2 sentences"),
        ({"required": [[], "ein"]}, r"required phrases of sentence 2: give a list, not one text \('ein'\)"),
        ({"required": [[], [" "]]}, "required phrase ' ' is empty"),
        (
            {"required": [[], ["\u4e2d"]]},
            "required phrase '\u4e2d' has characters that the target vocabulary does not hold",
        ),
        (
            {"required": [["ein" * 30], []]},
            r"phrases have \d+ tokens, one after the other, and outputs have at most 47 \(model.max_target_length",
        ),
        (
            {"required": [["ein"], []], "method": "sampling"},
            "required phrases and decoding.method: sampling contradict",
        ),
        (
            {"required": [["ein"], []], "suppress_sequences": ("ein",)},
            r"required phrase 'ein' and decoding.suppress_sequences \('ein'\) contradict each other",
        ),
        (
            {"required": [[], ["neun neun"]], "no_repeat_ngram": 2},
            r"required phrase 'neun neun' and decoding.no_repeat_ngram \(2\) contradict each other, "
            "since it holds '\u2581 neun' twice: leave out one of them",
        ),
        (
            {"prefixes": ["", "neun neun"], "no_repeat_ngram": 2},
            r"prefix 'neun neun' and decoding.no_repeat_ngram \(2\) contradict each other, since it holds",
        ),
        (
            {"prefixes": ["ein", ""], "suppress_sequences": ("ein",)},
            r"prefix 'ein' and decoding.suppress_sequences \('ein'\) contradict each other: leave out one of them",
        ),
        (
            {"suppress_sequences": ("ein", "ein\u4e2d")},
            "decoding.suppress_sequences: 'ein\u4e2d' has characters that the target vocabulary does not hold",
        ),
        ({"num_hypotheses": 4}, r"num_hypotheses \(4\) must lie between 1 and beam_size \(3\)"),
    ],
)
def test_bad_options_are_explained(translators, changes, message):
    with pytest.raises((ConfigError, InputError), match=message):
        _ = [found.text for found in translators["transformer"].translate(["one", "two"], **changes)]


def test_attention_of_a_model_without_is_explained():
    model = RecurrentConfig(hidden_dim=16, attention="none", **SMALL)
    without = Translator.from_params(
        model, TOKENIZERS, params_of(model, 0), DECODING, make_mesh(MeshConfig(), jax.devices()[:1])
    )
    with pytest.raises(ConfigError, match="attention needs a model with attention, and this one has none"):
        without.translate(["one"], attention=True)
    with pytest.raises(ConfigError, match=r"coverage_penalty \(0.2\) needs a model with attention"):
        without.translate(["one"], coverage_penalty=0.2)
