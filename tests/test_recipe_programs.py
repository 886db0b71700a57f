"""The real programs, traced for hardware that is only described: none has the forms that a CPU alone is given."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import pytest
from jax.sharding import AbstractMesh, AxisType

from flax_transformer import backend
from flax_transformer.config.recipe import Config, DecodingConfig
from flax_transformer.data.batching import BatchShape
from flax_transformer.errors import ConfigError
from flax_transformer.experiment.recipe_programs import RecipePrograms
from tests import tiny

PLATFORMS = ("cpu", "gpu", "tpu")
ROWS = 24  # of the table of 19 target tokens: no other axis is as long


def programs(platform: backend.Platform, compute_dtype: str = "bfloat16") -> RecipePrograms:
    """Those of a tiny Transformer on eight described devices."""
    model = tiny.config(num_encoder_layers=1, num_decoder_layers=1, compute_dtype=compute_dtype)
    mesh = AbstractMesh(
        (2, 2, 2),
        ("data", "fsdp", "tensor"),
        axis_types=(AxisType.Auto,) * 3,
        abstract_device=backend.abstract_device(platform),
    )
    return RecipePrograms(
        Config(model=model, decoding=DecodingConfig(beam_size=3, batch_size=16)), tiny.VOCABULARY, mesh
    )


def equations(jaxpr: Any) -> Iterator[Any]:
    """All equations of a traced program, those of its inner programs included."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def shapes_and_types(variables: Any) -> list[tuple[tuple[int, ...], str]]:
    return [(v.aval.shape, str(v.aval.dtype)) for v in variables]


def narrow_products(found: list[Any]) -> list[bool]:
    """Whether each product of bfloat16 has a result in bfloat16."""
    products = [shapes_and_types([*e.invars, *e.outvars]) for e in found if e.primitive.name == "dot_general"]
    return [out == "bfloat16" for (_, left), (_, right), (_, out) in products if left == right == "bfloat16"]


@pytest.mark.parametrize("platform", PLATFORMS)
def test_the_train_step_has_a_cpu_s_forms_on_a_cpu_alone(platform):
    found = list(equations(programs(platform).traced_train_step(BatchShape(16, 8, 8)).jaxpr))
    loops = {e.primitive.name for e in found} & {"while", "scan"}
    # The blocks of the loss: a CPU leaves out those of padding alone, so their number is not known before.
    assert ("while" in loops) == (platform == "cpu")
    assert ("scan" in loops) == (platform != "cpu")
    assert any(narrow_products(found)) == (platform != "cpu")


@pytest.mark.parametrize("platform", PLATFORMS)
def test_the_search_has_a_cpu_s_forms_on_a_cpu_alone(platform):
    traced = programs(platform).traced_search(source_length=8, max_length=20)  # more than a CPU's first block
    found = list(equations(traced.jaxpr))
    assert any(e.primitive.name == "cond" for e in found) == (platform == "cpu")  # one for each further block
    assert any(narrow_products(found)) == (platform != "cpu")

    logits = [e.outvars[0].aval.shape for e in found if e.primitive.name == "dot_general"]
    axes = {shape.index(ROWS) - len(shape) for shape in logits if ROWS in shape}
    assert axes == ({-3} if platform == "cpu" else {-1})  # [V, B, K] or [B, K, V]

    carried = [v for e in found if e.primitive.name == "while" for v in shapes_and_types(e.outvars)]
    caches = {dtype for shape, dtype in carried if len(shape) == 5 and shape[0] == 2}  # of two slots of a device
    assert caches == ({"float32"} if platform == "cpu" else {"bfloat16"})


@pytest.mark.parametrize("platform", PLATFORMS)
def test_the_output_bias_is_a_column_of_the_kernel_on_a_cpu_alone(platform):
    shapes = {leaf.shape for leaf in jax.tree.leaves(programs(platform, "float32").prepared().params)}
    assert ((ROWS, 17) in shapes) == (platform == "cpu")
    assert (ROWS, 16) in shapes  # the table that is read


def test_rows_must_divide_over_the_mesh():
    small = programs("tpu")
    with pytest.raises(ConfigError, match=r"a batch \(6 rows\) must divide evenly over the mesh axes data x fsdp = 4"):
        small.traced_train_step(BatchShape(6, 8, 8))
    config = dataclasses.replace(small.config, decoding=DecodingConfig(batch_size=12))
    with pytest.raises(ConfigError, match=r"decoding.batch_size \(12 rows\)"):
        dataclasses.replace(small, config=config).traced_search(8, 20)
