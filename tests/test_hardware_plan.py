"""Plans for hardware: beside a real compilation on the CPU, in text, and what is said if something does not fit."""

import dataclasses
import re
from pathlib import Path

import jax
import pytest

from flax_transformer.cli import main as cli
from flax_transformer.config.reading import read_config
from flax_transformer.config.recipe import Config, DecodingConfig
from flax_transformer.data.batching import BatchingConfig, BatchShape
from flax_transformer.data.tokenizer import TokenizerConfig
from flax_transformer.errors import ConfigError
from flax_transformer.experiment import hardware_plan, plan_search
from flax_transformer.experiment.hardware_plan import (
    HardwarePlan,
    longest_batch,
    most_output_tokens,
    plan_hardware,
    too_large_bytes,
)
from flax_transformer.experiment.plan_report import describe_plan, describe_ranking
from flax_transformer.experiment.plan_search import choices, rank_plans
from flax_transformer.experiment.recipe_programs import RecipePrograms
from flax_transformer.experiment.step_estimate import axis_bandwidth, divisors, estimate_step
from flax_transformer.models.recurrent_config import RecurrentConfig
from flax_transformer.optim.optimizer import make_optimizer
from flax_transformer.optim.schedule import make_schedule
from flax_transformer.parallel.exchanges import LINKS
from flax_transformer.parallel.memory import needed_bytes
from flax_transformer.parallel.mesh import MeshConfig, make_mesh
from flax_transformer.parallel.program_cost import SPEEDS, Cost
from flax_transformer.training.state import describe_parameters, init_state, make_layout
from tests import tiny

MESH = MeshConfig(2, 2, 2)
SMALL = Config(
    model=tiny.config(num_encoder_layers=1, num_decoder_layers=1),
    tokenizer=TokenizerConfig(vocab_size=64),
    batching=BatchingConfig(tokens_per_batch=256),
    decoding=DecodingConfig(beam_size=2, batch_size=12),
    mesh=MESH,
)


@pytest.fixture(scope="module")
def plan():
    return plan_hardware(SMALL, "cpu:8")


def test_a_plan_has_the_memory_of_a_real_state_and_a_real_compilation(plan):
    vocabulary, mesh = hardware_plan.vocabulary_of_recipe(SMALL), make_mesh(MESH)
    optimizer = make_optimizer(
        SMALL.optimizer, make_schedule(SMALL.optimizer, 16), describe_parameters(SMALL.model, vocabulary)
    )
    layout = make_layout(SMALL.model, vocabulary, optimizer, mesh)
    state = init_state(SMALL.model, vocabulary, layout, 0)

    def bytes_of_first_device(tree) -> int:
        return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))

    assert plan.train.memory["parameters"] == bytes_of_first_device(state.params)
    assert plan.train.memory["optimiser"] == bytes_of_first_device(state.optimizer)
    assert plan.num_parameters == sum(leaf.size for leaf in jax.tree.leaves(state.params))

    program = RecipePrograms(SMALL, vocabulary, mesh).train_step(BatchShape(8, 32, 24))
    assert plan.shape == (8, 32, 24)
    assert plan.train.needed == needed_bytes(program.compiled)
    assert plan.search is not None and plan.search.tokens == 16  # eight devices divide it
    assert {axis for exchange in plan.train.exchanges for axis in exchange.axes} == {"data", "fsdp", "tensor"}
    assert plan.search.exchanges == []


def test_the_text_of_a_plan_names_hardware_memory_and_verdict(plan):
    text = describe_plan(plan)
    assert "cpu:8: 8 x cpu; mesh data 2 x fsdp 2 x tensor 2" in text
    assert "8 rows of 32 + 24 tokens" in text
    assert "fits" in text and "time       not known" in text and "Times are bounds" not in text
    cost = Cost(1, 1, 1e9, 1.0, 0, 1.0, {})
    timed = dataclasses.replace(plan, train=dataclasses.replace(plan.train, cost=cost, flops_utilization=0.5))
    assert "Times are bounds" in describe_plan(timed)


def test_a_program_that_does_not_fit_says_by_how_much_and_what_to_do(plan):
    less = dataclasses.replace(plan, available=plan.train.needed // 2)
    with pytest.raises(ConfigError, match=r"the train step does not fit cpu:8: .* Set model.rematerialize: true\.$"):
        less.check_fits()
    rematerialized = dataclasses.replace(SMALL, model=tiny.config(rematerialize=True))
    with pytest.raises(ConfigError, match=r"Set batching.gradient_accumulation_steps: 2\.$"):
        dataclasses.replace(less, config=rematerialized).check_fits()
    state = plan.train.memory["parameters"] + plan.train.memory["optimiser"]
    whole = dataclasses.replace(less, available=state, config=dataclasses.replace(SMALL, mesh=MeshConfig(4, 1, 2)))
    with pytest.raises(ConfigError, match=r"Split them over more devices: mesh.fsdp: 2\.$"):
        whole.check_fits()
    with pytest.raises(ConfigError, match="Take more devices"):
        dataclasses.replace(whole, available=state // 16).check_fits()
    small_search = dataclasses.replace(plan.search, memory={"parameters": 2**40})
    with pytest.raises(ConfigError, match="the search does not fit .* Lower decoding.batch_size"):
        dataclasses.replace(plan, search=small_search).check_fits()


def test_what_libtpu_says_of_a_program_that_is_too_large_is_read():
    message = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm. Exceeded by 4.75G."
    assert too_large_bytes(message) == int(20.5 * 2**30)
    assert too_large_bytes("INTERNAL: Used 20.50G of 15.75G hbm.") is None


def test_rows_that_the_mesh_does_not_divide_are_told_with_the_number_to_set():
    config = dataclasses.replace(SMALL, batching=BatchingConfig(tokens_per_batch=256, row_multiple=6))
    with pytest.raises(ConfigError, match=r"batching.row_multiple \(6\) must be a .* batching.row_multiple: 8"):
        plan_hardware(config, "cpu:8")


def test_the_longest_batch_is_the_largest_that_the_recipe_allows():
    assert longest_batch(SMALL) == (8, 32, 24)
    assert longest_batch(SMALL, 8) == (32, 8, 8)
    packed = dataclasses.replace(SMALL, batching=BatchingConfig(packing=True, row_length=16, tokens_per_batch=256))
    assert longest_batch(packed) == (16, 16, 16)
    assert most_output_tokens(SMALL, 4) == min(24, int(2.0 * 4 + SMALL.decoding.max_length_offset) + 1)


# --- By formula


def test_the_estimate_has_the_products_of_the_compiled_step():
    vocabulary, one = hardware_plan.vocabulary_of_recipe(SMALL), dataclasses.replace(SMALL, mesh=MeshConfig(1, 1, 1))
    shape = longest_batch(one)
    program = RecipePrograms(one, vocabulary, make_mesh(one.mesh, jax.devices()[:1])).traced_train_step(shape)
    counted = sum(
        2.0 * equation.outvars[0].aval.size * _contracted(equation)
        for equation in _equations(program.jaxpr)
        if equation.primitive.name == "dot_general"
    )
    estimate = estimate_step(one, vocabulary, shape, "h100_sxm:1")
    assert estimate.flops == pytest.approx(counted, rel=0.15)
    assert estimate.exchanged == {"data": 0.0, "fsdp": 0.0, "tensor": 0.0}


def _contracted(equation) -> int:
    (axes, _), _ = equation.params["dimension_numbers"]
    size = 1
    for axis in axes:
        size *= equation.invars[0].aval.shape[axis]
    return size


def _equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            if hasattr(inner, "eqns"):
                yield from _equations(inner)


def test_the_estimate_has_the_state_of_the_plan(plan):
    estimate = estimate_step(SMALL, hardware_plan.vocabulary_of_recipe(SMALL), plan.shape, "h100_sxm:8")
    assert estimate.state_bytes == plan.train.memory["parameters"] + plan.train.memory["optimiser"]


def test_rematerialisation_costs_a_forward_pass_and_saves_activations():
    vocabulary, shape = hardware_plan.vocabulary_of_recipe(SMALL), BatchShape(64, 32, 24)
    deep = dataclasses.replace(SMALL, model=tiny.config(num_encoder_layers=6, num_decoder_layers=6))
    again = dataclasses.replace(
        SMALL, model=tiny.config(num_encoder_layers=6, num_decoder_layers=6, rematerialize=True)
    )
    plain, saved = (estimate_step(config, vocabulary, shape, "v5e:2x4") for config in (deep, again))
    assert saved.flops == pytest.approx(plain.flops * 4 / 3)
    assert saved.activation_bytes < plain.activation_bytes


def test_the_estimate_of_a_model_that_is_no_transformer_has_its_parameters_alone():
    model = RecurrentConfig(model_dim=16, hidden_dim=16, max_source_length=32, max_target_length=24)
    one, two = (dataclasses.replace(SMALL, model=model, mesh=MeshConfig(4, 1, t)) for t in (1, 2))
    vocabulary, shape = hardware_plan.vocabulary_of_recipe(SMALL), BatchShape(64, 32, 24)
    assert estimate_step(one, vocabulary, shape, "v5e:2x4").state_bytes > 0
    assert estimate_step(two, vocabulary, shape, "v5e:2x4").exchanged["tensor"] == 0.0


def test_an_axis_inside_a_host_uses_its_links():
    wide = dataclasses.replace(SMALL, mesh=MeshConfig(2, 4, 2))
    assert [axis_bandwidth("h100_sxm:2x8", wide, axis) for axis in ("tensor", "fsdp", "data")] == [450e9, 450e9, 50e9]


def test_choices_are_all_meshes_with_batches_that_divide():
    found = list(choices(SMALL, 8))
    meshes = {(c.mesh.data, c.mesh.fsdp, c.mesh.tensor) for c in found}
    assert meshes == {(8 // t // f, f, t) for t in (1, 2, 4, 8) for f in divisors(8 // t)}
    assert all(longest_batch(c).rows % (c.mesh.data * c.mesh.fsdp) == 0 for c in found)
    assert divisors(12) == [1, 2, 3, 4, 6, 12]


def test_a_ranking_begins_with_the_fastest_choice(monkeypatch, plan):
    """The programs are not compiled here: their costs are invented, so that the estimate's favourite is the slowest."""
    slower = iter((3.0, 1.0, 2.0))

    def invented(config: Config, topology: str, length: int | None, search: bool) -> HardwarePlan:
        cost = Cost(1, 1, 1e9, 1.0, 0, next(slower), {})
        train = dataclasses.replace(plan.train, cost=cost, exchanges=[], flops_utilization=0.5)
        return dataclasses.replace(plan, config=config, train=train)

    monkeypatch.setattr(plan_search, "plan_hardware", invented)
    monkeypatch.setattr(plan_search, "BATCHES", (1,))
    monkeypatch.setitem(SPEEDS, "cpu", SPEEDS["v5e"])
    monkeypatch.setitem(LINKS, "cpu", LINKS["v5e"])
    ranking = rank_plans(SMALL, "cpu:2")
    assert [round(ranked.tokens / ranked.tokens_per_second, 6) for ranked in ranking] == [1.0, 2.0, 3.0]
    best, table = ranking[0].config, describe_ranking(ranking)
    assert f"--mesh.data {best.mesh.data} --mesh.fsdp {best.mesh.fsdp} --mesh.tensor {best.mesh.tensor}" in table
    rematerialize = getattr(best.model, "rematerialize", None)
    assert ("--model.rematerialize" in table, "--model.no-rematerialize" in table) == (rematerialize, not rematerialize)
    full = [dataclasses.replace(each, plan=dataclasses.replace(plan, available=9)) for each in ranking]
    assert "None of these fits" in describe_ranking(full) and "The best" not in describe_ranking(full)

    monkeypatch.setattr(plan_search, "available_bytes", lambda mesh: 1000)
    with pytest.raises(ConfigError, match="no mesh of cpu:2 fits the recipe: by formula the best one needs"):
        rank_plans(SMALL, "cpu:2")


def test_hardware_without_a_known_speed_is_not_ranked():
    with pytest.raises(ConfigError, match="--search needs hardware of known speed"):
        rank_plans(SMALL, "cpu:2")


# --- The command


def test_the_command_prints_a_plan_or_what_to_change(recipe, capsys, monkeypatch, plan):
    asked = []
    monkeypatch.setattr("flax_transformer.cli.plan.plan_hardware", lambda *arguments: asked.append(arguments) or plan)
    arguments = ["--config", str(recipe), "--topology", "cpu:2", "--mesh.data", "2"]
    assert cli.run_verb(cli.verb("plan"), arguments, "plan") == 0
    assert "cpu:8: 8 x cpu; mesh data 2 x fsdp 2 x tensor 2" in capsys.readouterr().out
    ((config, topology, length),) = asked
    assert (config.mesh.data, topology, length) == (2, "cpu:2", None)

    monkeypatch.setattr("flax_transformer.cli.plan.plan_hardware", lambda *_: dataclasses.replace(plan, available=9))
    assert cli.run_verb(cli.verb("plan"), arguments, "plan") == 2
    shown = capsys.readouterr()
    assert "does not fit" in shown.out and "error: the train step does not fit cpu:8" in shown.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--topology", "v9:4x4"], "unknown hardware 'v9'.*the names are v4, v5e, v5p, v6e, a100_sxm_80"),
        (["--topology", "cpu:9"], "cpu:9 needs 9 CPU devices, and JAX has 8"),
        (["--topology", "cpu:²"], "named by their number, such as cpu:2, got 'cpu:²'"),
        (["--topology", "cpu"], "named by their number, such as cpu:2, got 'cpu'"),
        (["--topology", "cpu:2", "--length", "0"], "--length must be at least 1"),
        (["--topology", "cpu:2", "--resume"], "plan is for runs to come"),
    ],
)
def test_bad_input_of_the_command(recipe, capsys, arguments, message):
    jax.devices()  # JAX has begun, so it keeps its number of cores
    assert cli.run_verb(cli.verb("plan"), ["--config", str(recipe), *arguments], "plan") == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize("name", ["wmt14_en_de_base", "multi30k_en_de"])
def test_published_recipes_can_be_estimated(name):
    config = read_config(Path("configs") / f"{name}.yaml")
    config = dataclasses.replace(config, mesh=MeshConfig(8, 1, 1))
    estimate = estimate_step(config, hardware_plan.vocabulary_of_recipe(config), longest_batch(config), "h100_sxm:8")
    assert 0 < estimate.seconds < 10
