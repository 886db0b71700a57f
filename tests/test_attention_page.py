"""The page about how a model translates: its numbers, its script in a browser, any text, and bad input."""

import base64
import dataclasses
import functools
import inspect
import json
import re
import types
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flax_transformer.cli.attention import AttentionOptions
from flax_transformer.decoding.beam_tree import BeamNode, BeamTree
from flax_transformer.errors import ConfigError, InputError
from flax_transformer.inference import attention_view
from flax_transformer.inference.attention_view import AttentionView, attention_views, pictures_of
from flax_transformer.inference.translation import Hypothesis, NoTranslation, Translation
from flax_transformer.inference.translator import Translator
from flax_transformer.models.recurrent_config import RecurrentConfig
from flax_transformer.models.seq2seq import AttentionWeights
from flax_transformer.plots.attention_page import attention_page, text_direction
from flax_transformer.shapes import Batch
from tests.browser import Browser, programs
from tests.small_models import ALIKE, DECODING, MODELS, SEEDS, TOKENIZERS, command, make_run, params_that_end

HOSTILE = "</script><script>alert(1)</script> <b>&amp;\"'` \0 \u2028 \u202e \U0001f600 <!-- ${x} $y \\"
ARABIC, HEBREW, CHINESE = "رجل يركب", "איש רוכב", "红色的自行车"


@pytest.fixture(scope="module")
def translator(one_device) -> Translator:
    model = MODELS["transformer"]
    return Translator.from_params(model, TOKENIZERS, params_that_end(model, SEEDS["transformer"]), DECODING, one_device)


@pytest.fixture(scope="module")
def views(translator) -> list[AttentionView]:
    return [each for each in attention_views(translator, ALIKE[:2]) if isinstance(each, AttentionView)]


def view_of(source: list[str], target: list[str]) -> AttentionView:
    """A view with two layers of two heads, of tokens that no model has to make."""
    rng, sizes = np.random.default_rng(0), (len(source), len(target))
    pairs = (sizes[0], sizes[0]), (sizes[1], sizes[1]), (sizes[1], sizes[0])
    weights = AttentionWeights(*(rng.dirichlet(np.ones(keys), (2, 2, rows)).astype(np.float32) for rows, keys in pairs))
    text, nodes = " ".join(target), [BeamNode(1, 0, None, 1, -0.5, -0.5, "finished", -0.5, 0)]
    best = Hypothesis(text, target[:-1], -0.5, True, [-0.5] * len(target))
    translation, tree = Translation([best], source=source[:-1]), BeamTree(1, nodes)
    return AttentionView(
        " ".join(source), translation, source, target, "<s>", "</s>", weights, [(0, 0)], tree, ["</s>"]
    )


class Elements(HTMLParser):
    """The elements of a page, and the text in each element `script`."""

    def __init__(self, page: str):
        super().__init__()
        self.names: list[str] = []
        self.scripts: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.names.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        if self.names and self.names[-1] == "script" and data.strip():
            self.scripts.append(data)


def data_of(page: str) -> dict[str, Any]:
    return json.loads(Elements(page).scripts[0])


def array_of(values: dict[str, Any]) -> np.ndarray:
    return np.frombuffer(base64.b64decode(values["values"]), "<f4").reshape(values["shape"])


# --- numbers


def test_the_page_has_the_weights_of_a_forward_pass(translator, views):
    """Of every kind, layer and head, for the tokens alone: padding changes nothing but rounding."""
    model = nnx.merge(translator.parameters.graphdef, translator.params)
    page = data_of(attention_page(views, "run", "model", "note"))
    for view, sentence in zip(views, page["sentences"], strict=True):
        (source,) = TOKENIZERS.source.encode([view.sentence])
        source = [*source, TOKENIZERS.source.special.end]
        special = TOKENIZERS.target.special
        target = [special.end if piece == "</s>" else TOKENIZERS.target.id_of(piece) for piece in view.target]
        assert sentence["source"] == TOKENIZERS.source.pieces(source)
        sides = [([ids], [list(range(len(ids)))], [[1] * len(ids)]) for ids in (source, target)]
        batch = Batch(*(jnp.asarray(values, jnp.int32) for side in sides for values in side))
        expected = jax.jit(lambda model, batch: model.attention_weights(batch))(model, batch)
        assert sentence["kinds"].keys() == {"encoder", "decoder", "cross"}
        for kind, values in sentence["kinds"].items():
            found = array_of(values)
            np.testing.assert_allclose(found, getattr(expected, kind)[0], rtol=1e-4, atol=1e-6)
            np.testing.assert_allclose(found.sum(-1), 1.0, rtol=1e-5)
        # The search itself reports the mean over the heads of the last layer.
        of_search = view.translation.hypotheses[0].attention
        np.testing.assert_allclose(array_of(sentence["kinds"]["cross"])[-1].mean(0), of_search, rtol=1e-4, atol=1e-6)


def test_outputs_and_the_tree_are_those_of_translate(translator, views):
    page = data_of(attention_page(views, "run", "model", "note"))
    answers = translator.translate(ALIKE[:2], num_hypotheses=3)
    for answer, sentence in zip(answers, page["sentences"], strict=True):
        expected = [(each.text, each.finished, each.tokens) for each in answer.hypotheses]
        assert [(h["text"], h["finished"], h["tokens"]) for h in sentence["hypotheses"]] == expected
        scores = [each.score for each in answer.hypotheses]
        np.testing.assert_allclose([h["score"] for h in sentence["hypotheses"]], scores, rtol=1e-4)
        for hypothesis, each in zip(sentence["hypotheses"], answer.hypotheses, strict=True):
            np.testing.assert_allclose(hypothesis["probabilities"], np.exp(each.token_scores), rtol=1e-4)
        nodes = sentence["tree"]["nodes"]
        results = sorted((node["rank"], n) for n, node in enumerate(nodes) if node["rank"] is not None)
        assert [rank for rank, _ in results] == [0, 1, 2]
        np.testing.assert_allclose([nodes[n]["score"] for _, n in results], scores, rtol=1e-4)
        for (_, n), each in zip(results, answer.hypotheses, strict=True):
            tokens, log_probs = [], []
            while n is not None:
                tokens.insert(0, nodes[n]["token"])
                log_probs.insert(0, nodes[n]["logProb"])
                n = nodes[n]["parent"]
            assert tokens == [*each.tokens, *["</s>"] * each.finished]
            np.testing.assert_allclose(log_probs, each.token_scores, rtol=1e-4)


# --- texts


def test_no_text_becomes_markup_and_no_file_is_asked_for():
    plain = Elements(attention_page([view_of(["a", "</s>"], ["b", "</s>"])], "run", "model", "note"))
    page = attention_page([view_of([HOSTILE, "</s>"], [HOSTILE, "</s>"])], HOSTILE, "model", "note")
    elements = Elements(page)
    assert elements.names == plain.names and len(elements.scripts) == 2
    data = data_of(page)
    escaped = HOSTILE.replace("\0", "<U+0000>").replace("\u2028", "<U+2028>")
    assert data["run"] == data["sentences"][0]["source"][0] == data["sentences"][0]["target"][0] == escaped
    assert not {"src", "href"} & {name for name, value in elements.attributes if value != "data:,"}
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest|innerHTML|document\.write", page)
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:") in (
        elements.attributes
    )


def test_the_first_strong_letter_gives_the_direction():
    directions = {
        ARABIC: "rtl",
        HEBREW: "rtl",
        CHINESE: "ltr",
        "": "ltr",
        "12 !": "ltr",
        f"\u2581\u00ab{ARABIC} a": "rtl",
    }
    assert {text: text_direction(text) for text in directions} == directions


def test_a_notebook_shows_a_translation():
    hypotheses = [
        Hypothesis(HOSTILE, ["\u2581<b>", ARABIC], -0.25, True, [-0.25] * 3, np.array([[0.75, 0.25, 0], [0, 1, 0]]),
                   words=[[0], [1]]),
        Hypothesis("b", ["b"], -1.5, False, [-1.5]),
    ]  # fmt: skip
    shown = Translation(hypotheses, source=["\u2581a", CHINESE], source_words=[[0], [1]])._repr_html_()
    elements = Elements(shown)
    assert not {"script", "b", "img"} & set(elements.names) and "\0" not in shown and "&lt;/script&gt;" in shown
    assert elements.names.count("table") == 2 and shown.count('<bdi dir="auto">') == 2 + 2 + 2
    assert "-0.2500" in shown and ">0.75<" in shown and "0-0 1-1" in shown and "cut at the maximum length" in shown
    assert Elements(Translation(hypotheses[1:])._repr_html_()).names.count("table") == 1


# --- in a browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Browser]:
    if (found := programs()) is None:
        pytest.skip("the browser part did not run: this machine has no Chromium with chromedriver")
    running = Browser(*found, tmp_path_factory.mktemp("profile"))
    yield running
    running.close()


def opened(browser: Browser, path: Path, page: str) -> None:
    path.write_text(page, encoding="utf-8")
    browser.open(path)


def row_shown(browser: Browser, row: int) -> list[float]:
    """The weights of a row of the matrix."""
    code = "return [...document.querySelectorAll(arguments[0])].map((cell) => Number(cell.dataset.weight))"
    return browser.script(code, f'#matrix td[data-row="{row}"]')


def lightness(browser: Browser, selector: str) -> list[int]:
    code = "return [...document.querySelectorAll(arguments[0])].map((e) => getComputedStyle(e).backgroundColor)"
    return [sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in browser.script(code, selector)]


def test_a_browser_shows_what_is_clicked_and_hovered(browser, views, tmp_path):
    opened(browser, tmp_path / "page.html", attention_page(views, "run", "model", "note"))
    view, close = views[0], functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-8)
    cross, encoder = view.weights.cross, view.weights.encoder
    close(row_shown(browser, 1), cross[-1].mean(0)[1])
    browser.click("#heads-1")
    assert "layer 1, head 2" in browser.texts("#caption")[0]
    close(row_shown(browser, 1), cross[0, 1, 1])
    browser.click("#overview button[aria-label='Layer 1, head 1']")
    close(row_shown(browser, 1), cross[0, 0, 1])

    browser.hover("#target li:nth-child(3)")  # the first child is the start token, and this one is of row 1
    assert browser.texts("#source small") == [f"{weight:.3f}" for weight in cross[0, 0, 1]]
    best, light = int(cross[0, 0, 1].argmax()), lightness(browser, "#source li")
    assert light[best] == min(light) < max(light)
    assert f"attends most to {view.source[best]} {cross[0, 0, 1, best]:.3f}" in browser.texts("#readout")[0]

    browser.click("#kinds-encoder")
    browser.hover('#matrix td[data-row="2"][data-column="0"]')
    assert f"attends to {view.source[0]} with weight {encoder[0, 0, 2, 0]:.4f}" in browser.texts("#readout")[0]
    browser.click("#hypotheses tbody tr:nth-child(2) button")
    (end,) = [n for n, node in enumerate(view.tree.nodes) if node.rank == 1]
    marked = browser.script("return [...document.querySelectorAll('#tree div.on')].map((e) => Number(e.dataset.node))")
    assert end in marked and len(marked) == view.tree.nodes[end].step
    browser.click("#sentences button:nth-child(2)")
    assert browser.texts("#source b") == views[1].source

    picture = browser.screenshot()
    (tmp_path / "page.png").write_bytes(picture)
    assert picture.startswith(b"\x89PNG") and len(picture) > 10_000
    assert not browser.messages()


def test_a_browser_shows_any_text_as_text(browser, tmp_path):
    views = [view_of([HOSTILE, "</s>"], [HOSTILE, "</s>"]), view_of([ARABIC, "</s>"], [HEBREW, "\u2581.", "</s>"])]
    opened(browser, tmp_path / "page.html", attention_page(views, HOSTILE, "model", "note"))
    expected = HOSTILE.replace("\0", "<U+0000>").replace("\u2028", "<U+2028>")
    assert browser.texts("#source b") == [expected, "</s>"] and browser.texts("main script, main img") == []
    for layer, head in ((0, 1), (1, 0), (1, "mean")):
        browser.click(f"#layers-{layer}")
        browser.click(f"#heads-{head}")
        weights = views[0].weights.cross[layer]
        np.testing.assert_allclose(
            row_shown(browser, 0), (weights.mean(0) if head == "mean" else weights[head])[0], 1e-5
        )
    browser.click("#sentences button:nth-child(2)")
    places = browser.script("return [...document.querySelectorAll('#source li')].map((e) => e.offsetLeft)")
    assert places == sorted(places, reverse=True)  # from right to left
    browser.resize(420, 900)
    assert browser.script("return document.documentElement.scrollWidth <= innerWidth")
    assert not browser.messages()


# --- the command


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "run", MODELS["transformer"], SEEDS["transformer"])


def test_the_command_writes_a_page(monkeypatch, capsys, run, tmp_path):
    output = tmp_path / "page.html"
    arguments = ["attention", "--run", str(run), "--output", str(output), "--text", ALIKE[0], "--text", ALIKE[1]]
    code, out, err = command(monkeypatch, capsys, arguments)
    assert code == 0 and not out and err == f"{output} shows 2 sentences; open it in a web browser\n"
    data = data_of(output.read_text(encoding="utf-8"))
    assert [each["text"] for each in data["sentences"]] == ALIKE[:2] and data["run"] == str(run)
    assert [len(each["hypotheses"]) for each in data["sentences"]] == [DECODING.beam_size] * 2


def test_bad_input_is_one_sentence(monkeypatch, capsys, run, tmp_path):
    output = tmp_path / "page.html"

    def error(*arguments: str) -> str:
        code, _, err = command(monkeypatch, capsys, ["attention", *arguments])
        assert code == 2 and err.count("\n") == 1 and err.startswith("error: ") and not output.exists()
        return err

    of_run, to = ("--run", str(run)), ("--output", str(output))
    assert "sentence 1 (' ') is not shown: it has no token, so there is nothing to show" in error(
        *of_run, *to, "--text", " "
    )
    assert "and the model reads at most 47" in error(*of_run, *to, "--text", "one " * 60)
    monkeypatch.setattr(attention_view, "MOST_TOKENS", 3)
    assert "and a page shows at most 3" in error(*of_run, *to, "--text", ALIKE[0])
    assert f"--output {tmp_path} is a folder. Name a file." in error(
        *of_run, "--text", "one", "--output", str(tmp_path)
    )
    assert f"{tmp_path}" in error("--run", str(tmp_path), *to, "--text", "one")
    assert "give a sentence to translate by --text" in error(*of_run, *to)
    assert "by --run FOLDER" in error(*to, "--text", "one")
    assert "num_hypotheses (9) must lie between 1 and beam_size (3)" in error(
        *of_run, *to, "--text", "one", "--num-hypotheses", "9"
    )


def test_other_searches_and_long_translations_are_refused(translator, monkeypatch):
    with pytest.raises(ConfigError, match="shows a beam search, got decoding.method: sampling"):
        attention_views(translator.with_decoding(DECODING.with_method("sampling")), ["one"])
    monkeypatch.setattr(attention_view, "_source_fault", lambda translator, request: None)
    monkeypatch.setattr(attention_view, "MOST_TOKENS", 0)
    (found,) = attention_views(translator, ALIKE[:1])
    assert isinstance(found, NoTranslation) and isinstance(found.reason, InputError)
    assert re.search("has .* tokens, and a page shows at most 0", str(found.reason))


def test_a_sentence_that_cannot_be_shown_says_why_and_leaves_the_others_as_they_are(
    monkeypatch, capsys, run, tmp_path, translator, views
):
    found = attention_views(translator, ["one " * 60, ALIKE[0], "a\udcff"])
    assert isinstance(found[1], AttentionView) and found[1].translation == views[0].translation
    assert [type(each) for each in found] == [NoTranslation, AttentionView, NoTranslation]

    output = tmp_path / "page.html"
    arguments = ["attention", "--run", str(run), "--output", str(output), "--text", ALIKE[0], "--text", " "]
    code, _, err = command(monkeypatch, capsys, arguments)
    assert (
        code == 4 and [each["text"] for each in data_of(output.read_text(encoding="utf-8"))["sentences"]] == ALIKE[:1]
    )
    assert "warning: sentence 2 (' ') is not shown: it has no token, so there is nothing to show. Give a text" in err


def test_a_model_without_attention_says_which_pictures_there_are():
    without = pictures_of(RecurrentConfig(attention="none"))
    assert "no attention" in without and "its n-best list and its beam alone" in without
    assert pictures_of(MODELS["recurrent"]) == (
        "A recurrent model has one cross-attention without heads, and no self-attention."
    )
    other: Any = types.SimpleNamespace(has_attention=True)  # of a kind that this page does not know
    without_attention: Any = types.SimpleNamespace(has_attention=False)
    note_of = inspect.unwrap(pictures_of)  # without the check of types under pytest, as users call it
    assert "recurrent" not in note_of(other) and "for every layer and head" in note_of(other)
    assert "model.attention" not in note_of(without_attention)
    assert AttentionOptions().output == Path("attention.html")


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["none", "additive"])
def test_a_page_of_a_recurrent_model(monkeypatch, capsys, tmp_path, attention):
    model = dataclasses.replace(MODELS["recurrent"], attention=attention, input_feeding=False, context_join=None)
    run = make_run(tmp_path / "run", model, SEEDS["recurrent"])
    arguments = ["attention", "--run", str(run), "--output", str(tmp_path / "page.html"), "--text", ALIKE[0]]
    code, _, err = command(monkeypatch, capsys, arguments)
    page = data_of((tmp_path / "page.html").read_text(encoding="utf-8"))
    sentence = page["sentences"][0]
    assert code == 0 and page["note"] == pictures_of(model)
    notes = [line for line in err.splitlines() if line.startswith("note: ")]
    assert notes == ([] if attention == "additive" else [f"note: {page['note']}"])
    assert set(sentence["kinds"]) == ({"cross"} if attention == "additive" else set())
    assert len(sentence["hypotheses"]) == 3 and bool(sentence["alignment"]) == (attention == "additive")
