"""Search and scores with parameters that are split over eight devices: the results of one device that has them all."""

import dataclasses
import functools
import itertools

import jax
import numpy as np
import pytest
from flax import nnx

from flax_transformer.decoding.beam_search import is_running
from flax_transformer.errors import ConfigError
from flax_transformer.inference.parameters import mesh_that_shards
from flax_transformer.inference.requests import Request
from flax_transformer.inference.scorer import Scorer
from flax_transformer.inference.stepped_search import SteppedSearch
from flax_transformer.inference.translation import Translation
from flax_transformer.inference.translator import Translator
from flax_transformer.models.build import vocabulary_info
from flax_transformer.parallel.memory import stored_bytes
from flax_transformer.parallel.mesh import MeshConfig, make_mesh
from flax_transformer.parallel.topology import Program, largest_shape
from flax_transformer.run_folder import RunFolder
from flax_transformer.training.checkpoint import Checkpoints
from flax_transformer.training.metrics_file import read_metrics
from flax_transformer.training.state import abstract_model
from tests.small_models import ALIKE, DECODING, MODELS, SEEDS, TOKENIZERS, make_run, params_that_end
from tests.small_run import command

TRANSFORMER = dataclasses.replace(MODELS["transformer"], num_heads=8)
KINDS = {"transformer": TRANSFORMER, "recurrent": MODELS["recurrent"]}
TEXT = [sentence for sentence in ALIKE if sentence][:30]  # more than wait at a time
EIGHT = dataclasses.replace(DECODING, batch_size=8)

CASES = [
    pytest.param(kind, sizes, marks=() if (kind, sizes) == ("transformer", (2, 2, 2)) else pytest.mark.slow)
    for kind in KINDS
    for sizes in ((1, 8, 1), (1, 1, 8), (1, 2, 4), (2, 2, 2))
]


@functools.cache
def on_one_device(kind: str) -> Translator:
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    return Translator.from_params(KINDS[kind], TOKENIZERS, params_that_end(KINDS[kind], SEEDS[kind]), EIGHT, mesh)


@functools.cache
def sharded(kind: str, sizes: tuple[int, int, int]) -> Translator:
    params = jax.tree.map(np.asarray, on_one_device(kind).params)
    mesh = make_mesh(MeshConfig(*sizes))
    return Translator.from_params(KINDS[kind], TOKENIZERS, params, EIGHT, mesh, sharded=True)


def assert_same(found, expected, atol: float = 1e-4) -> None:
    """The same hypotheses, with scores that differ by rounding alone. It grows with the sum that a score is."""
    for ours, theirs in zip(found, expected, strict=True):
        assert [h.tokens for h in ours.hypotheses] == [h.tokens for h in theirs.hypotheses]
        scores = [[h.score for h in each.hypotheses] for each in (ours, theirs)]
        np.testing.assert_allclose(*scores, rtol=1e-5, atol=atol)


@pytest.mark.parametrize("kind, sizes", CASES)
def test_hypotheses_and_scores_are_those_of_one_device(kind, sizes):
    ours, theirs = sharded(kind, sizes), on_one_device(kind)
    expected = theirs.translate(TEXT, num_hypotheses=3)
    assert_same(ours.translate(TEXT, num_hypotheses=3), expected)
    targets = [each.text for each in expected]
    scores = [[pair.log_prob for pair in Scorer(each).score(TEXT, targets)] for each in (ours, theirs)]
    np.testing.assert_allclose(*scores, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"method": "sampling", "seed": 3},
        {"no_repeat_ngram": 3, "repetition_penalty": 1.2, "min_length": 3, "suppress_tokens": ("x",)},
        {"coverage_penalty": 0.2, "attention": True},
        {"required": [["und"]] * len(TEXT), "prefixes": ["ein"] * len(TEXT)},
    ],
    ids=["sampling", "processors", "attention", "constraints"],
)
def test_every_form_of_search_gives_the_same(options):
    translators = sharded("transformer", (2, 2, 2)), on_one_device("transformer")
    found, expected = (each.translate(TEXT, num_hypotheses=2, **options) for each in translators)
    assert_same(found, expected)
    for ours, theirs in zip(found, expected, strict=True) if "attention" in options else ():
        weights, expected_weights = (np.asarray(each.hypotheses[0].attention) for each in (ours, theirs))
        np.testing.assert_allclose(weights, expected_weights, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("quantize", [False, True], ids=["float32", "int8"])
def test_an_ensemble_is_split_too(quantize):
    model, mesh = TRANSFORMER, make_mesh(MeshConfig(1, 2, 4))
    params = jax.tree.map(lambda *a: np.stack(a), *(params_that_end(model, seed) for seed in (2, 5)))
    one = Translator.from_params(model, TOKENIZERS, params, EIGHT, make_mesh(MeshConfig(), jax.devices()[:1]), 2)
    split = Translator.from_params(model, TOKENIZERS, params, EIGHT, mesh, 2, sharded=True)
    if quantize:
        one, split = one.quantized(), split.quantized()
    # Activations are rounded to integers, too: one that lies between two of them may go either way.
    assert_same(split.translate(TEXT), one.translate(TEXT), atol=1e-2 if quantize else 1e-4)
    kernel = nnx.merge(*split.parameters.prepared()[0]).decoder.layers[0].feed_forward.up.kernel.get_value()
    values = kernel.values if quantize else kernel
    assert {shard.data.shape for shard in values.addressable_shards} == {(2, 8, 8)}  # of [2, 16, 32]


@pytest.mark.parametrize("kind, sizes", CASES)
def test_a_device_has_only_its_share_of_the_parameters(kind, sizes):
    """As a training keeps them and as the search reads them; the search gathers none of them."""
    translator, whole, shards = sharded(kind, sizes), on_one_device(kind), sizes[1] * sizes[2]
    prepared = translator.parameters.prepared()[0].params
    for path, leaf in jax.tree_util.tree_leaves_with_path((translator.params, prepared)):
        if kind == "transformer" and leaf.size >= 256:  # no bias and no norm
            own = [shard.data.nbytes for shard in leaf.addressable_shards]
            assert own == [leaf.nbytes // shards] * 8, jax.tree_util.keystr(path)
    # Gates of recurrent cells are not split over tensor.
    most = 1.5 / shards if kind == "transformer" else 0.9
    assert stored_bytes(prepared) < most * stored_bytes(whole.params)

    programs = translator.programs(translator.requests, num_hypotheses=3)
    request = translator.requests.read(TEXT[0])
    inputs = programs.inputs([request], request.shape, translator.mesh)
    program = Program("search", programs.compiled(programs.spec(request.shape), inputs, 0))
    arguments = program.compiled.memory_analysis().argument_size_in_bytes
    assert arguments <= stored_bytes(prepared) + stored_bytes(inputs)
    gathered = {largest_shape(i.result) for i in program.instructions if i.opcode.startswith("all-gather")}
    for leaf in jax.tree.leaves(prepared):
        if kind == "transformer" and leaf.size >= 256:
            shard = leaf.sharding.shard_shape(leaf.shape)
            assert not gathered & (set(itertools.product(*zip(shard, leaf.shape, strict=True))) - {shard})


# --- which form runs


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "sharded", TRANSFORMER, SEEDS["transformer"])


@pytest.fixture
def restored(monkeypatch) -> list:
    """The shapes, with shardings, in which checkpoints were restored."""
    targets, restore = [], Checkpoints.restore_params

    def recorded(self, step, abstract_params):
        targets.append(abstract_params)
        return restore(self, step, abstract_params)

    monkeypatch.setattr(Checkpoints, "restore_params", recorded)
    return targets


def test_a_run_is_loaded_into_its_shards(run, restored):
    """No device has more than its part at any time: the checkpoint is read into the shardings of the search."""
    translator = Translator.load(run, sharded=True)
    assert translator.mesh.devices.shape == (1, 1, 8) and translator.parameters.sharded
    (target,) = restored
    assert jax.tree.map(lambda a: a.sharding, target) == jax.tree.map(lambda a: a.sharding, translator.params)
    kernel = target["decoder"]["layers"]["feed_forward"]["up"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (1, 16, 4)  # of [1, 16, 32]
    whole = on_one_device("transformer").params
    assert stored_bytes(target) < 0.2 * stored_bytes(whole)


@pytest.mark.parametrize("short", [0, 1])
def test_parameters_are_split_if_two_copies_do_not_fit_half_of_a_device(run, restored, monkeypatch, short):
    num_bytes = stored_bytes(on_one_device("transformer").params)
    monkeypatch.setattr("flax_transformer.inference.parameters.available_bytes", lambda mesh: 4 * num_bytes - short)
    translator = Translator.load(run)
    assert translator.parameters.sharded == bool(short)
    assert translator.mesh.devices.shape == ((1, 1, 8) if short else (8, 1, 1))
    assert not Translator.load(run, sharded=False).parameters.sharded
    assert not Translator.load(run, make_mesh(MeshConfig(8))).parameters.sharded  # rows alone are split
    ensemble = Translator.load([run, run])
    assert ensemble.parameters.sharded and stored_bytes(ensemble.params) == 2 * stored_bytes(restored[-1])

    mesh, abstract = make_mesh(MeshConfig(2, 2, 2)), on_one_device("transformer").params
    for reserved_bytes, split in ((0, bool(short)), (1, True)):
        made = Translator.from_params(TRANSFORMER, TOKENIZERS, abstract, EIGHT, mesh, reserved_bytes=reserved_bytes)
        assert made.parameters.sharded == split


@pytest.mark.parametrize("heads, devices, sizes", [(8, 8, (1, 1, 8)), (2, 8, (1, 4, 2)), (2, 3, (3, 1, 1))])
def test_the_mesh_of_large_parameters_has_as_many_shards_as_the_model_allows(heads, devices, sizes):
    model = dataclasses.replace(TRANSFORMER, num_heads=heads)
    _, abstract = abstract_model(model, vocabulary_info(TOKENIZERS))
    assert mesh_that_shards(abstract, jax.devices()[:devices]).devices.shape == sizes


def test_a_mesh_that_does_not_divide_the_heads_is_refused(run):
    with pytest.raises(ConfigError, match=r"mesh.tensor \(3\) must divide .* Choose mesh.tensor among the divisors of"):
        Translator.load(run, make_mesh(MeshConfig(1, 1, 3), jax.devices()[:3]), sharded=True)


def test_parameters_of_a_training_stay_where_they_are():
    """They are compiled for as shapes; later the arrays of a training take their place, without a copy."""
    translator = sharded("transformer", (2, 2, 2))
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), translator.params)
    before = Translator.from_params(TRANSFORMER, TOKENIZERS, shapes, EIGHT, translator.mesh, sharded=True)
    before.compile(TEXT)
    after = before.with_params(translator.params)
    for new, old in zip(jax.tree.leaves(after.params), jax.tree.leaves(translator.params), strict=True):
        assert new.addressable_data(0).unsafe_buffer_pointer() == old.addressable_data(0).unsafe_buffer_pointer()
    num_programs = len(after.parameters.programs)
    assert_same(after.translate(TEXT[:8]), on_one_device("transformer").translate(TEXT[:8]))
    assert len(after.parameters.programs) == num_programs


@pytest.mark.slow
def test_a_search_in_steps_is_split_too():
    translator = sharded("transformer", (2, 2, 2))
    reader = translator.requests
    requests = [each for each in reader.read_all(TEXT) if isinstance(each, Request)]
    shape = requests[0].shape
    requests = [each for each in requests if each.shape == shape]
    search = SteppedSearch.of(translator.programs(reader), requests)
    state = search.start()
    while is_running(state):
        state = search.advance(state, 3)
    found = search.finish(state)
    answers = translator.translate([each.sentence for each in requests])
    for row, answer in enumerate(answers):
        assert isinstance(answer, Translation)
        np.testing.assert_allclose(found.scores[row, 0], answer.score, rtol=1e-5)


@pytest.mark.slow
def test_a_training_evaluates_with_its_sharded_parameters(recipe, tmp_path, monkeypatch):
    """Its validation has the losses and scores of a training that copies them to every device."""
    found = []
    for name, split in (("copies", False), ("shards", True)):
        monkeypatch.setattr("flax_transformer.inference.translator.must_be_sharded", lambda *_, s=split, **__: s)
        mesh = ["--mesh.data", "2", "--mesh.fsdp", "2", "--mesh.tensor", "2"]
        assert command("train", "--config", str(recipe), "--run", str(tmp_path / name), *mesh) == 0
        records = [r for r in read_metrics(RunFolder(tmp_path / name).metrics_file) if r["kind"] == "validation"]
        found.append([(r["loss"], r["bleu"], r["chrf"]) for r in records])
    assert len(found[0]) == 2
    np.testing.assert_allclose(*found, rtol=1e-5)
