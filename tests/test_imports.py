"""Holds the architecture: imports go down only, and each room keeps out what does not belong there."""

import ast
import functools
import subprocess
import sys
from pathlib import Path

import pytest

import flax_transformer

PACKAGE = Path(__file__).parent.parent / "flax_transformer"

# Lowest first. A module may import modules of lower layers, and of its own room where that makes no circle. A room is a
# package, or a file outside packages. The rooms of a layer do not import each other.
LAYERS = [
    ["errors", "locks", "progress", "shapes", "standard_streams", "user_cache"],
    ["object_storage"],
    ["small_files"],
    ["backend"],
    ["parallel.sharding_rules"],
    ["ops"],
    ["parallel"],
    ["nn", "data", "decoding"],
    ["models"],
    ["optim"],
    ["config"],
    ["run_folder"],
    ["training"],
    ["inference"],
    ["plots", "interop"],
    ["experiment"],
    ["cli"],
    ["__init__"],
]


# What some modules alone may do: each name with its reason. The tests also fail for a module that no longer does it.
IMPORT_BY_STRING = {
    "__init__": "public names are imported at their first use",
    "cli.main": "a verb is imported when it is called",
    "data.text_files": "this Python may lack a module that decompresses",
}
USE_PRIVATE_NAMES = {
    "backend": {"jax._src.mesh.AbstractDevice"},  # the type of a device that is only described
    "parallel.processes": {"jax._src.distributed.global_state"},  # the store of messages
}
ASK_JAX_FOR_DEVICES = {
    "parallel.mesh": "all devices are a mesh",
    "parallel.processes": "the question waits until all processes have joined",
    "parallel.topology": "the cores of this machine can be described too",
    "cli.versions": "a report says why there is no device, and so no mesh",
}
READ_A_DEVICE = {
    "backend": "the platform that a program is compiled for",
    "parallel.mesh": "devices of a CPU search side by side",
    "parallel.memory": "devices of a CPU share their memory; other kinds have a known size",
    "training.throughput": "the highest speed of a kind",
    "experiment.recipe_choice": "the machine that a first recipe is for",
    "experiment.first_recipe": "the machine that a first recipe is for",
    "experiment.hardware_plan": "the name of described hardware",
    "experiment.plan_report": "the name of described hardware",
    "experiment.report": "the name of the hardware in a run's report",
    "cli.versions": "the name of the hardware in a report of a fault",
}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def layer_of(module: str) -> int:
    best, longest = -1, -1
    for level, names in enumerate(LAYERS):
        for name in names:
            if (module == name or module.startswith(f"{name}.")) and len(name) > longest:
                best, longest = level, len(name)
    assert best >= 0, f"{module} has no layer: add it to LAYERS"
    return best


# Packages hold no code, which a test below checks, so they are no modules here. The top one has the public names.
MODULES = {module_name(p): p for p in sorted(PACKAGE.rglob("*.py")) if p.name != "__init__.py" or p.parent == PACKAGE}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}


@functools.cache
def imports_of(module: str) -> dict[str, str]:
    """Returns the whole name of each thing that a module imports anywhere, by the name that it has there."""
    names = {}
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Import):
            for alias in node.names:
                names[alias.asname or alias.name] = alias.name
                if not alias.asname:  # `import a.b` binds `a`
                    names[alias.name.split(".")[0]] = alias.name.split(".")[0]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} uses a relative import"
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return names


@functools.cache
def names_of(module: str) -> frozenset[str]:
    """Returns the names that a module imports, and those of all attributes in its code.

    Attributes of imported names are whole: `jnp.sum` is `jax.numpy.sum`. Others begin with a dot, such as `.platform`.
    """
    imported = imports_of(module)
    names = set(imported.values())
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Attribute):
            path, value = node.attr, node.value
            while isinstance(value, ast.Attribute):
                path, value = f"{value.attr}.{path}", value.value
            known = isinstance(value, ast.Name) and imported.get(value.id)
            names.add(f"{known}.{path}" if known else f".{node.attr}")
        elif isinstance(node, ast.Name):
            names.add(imported.get(node.id, node.id))
    return frozenset(names)


@functools.cache
def own_imports(module: str) -> frozenset[str]:
    """Returns the modules of the package that a module imports."""
    names = {n.removeprefix("flax_transformer.") for n in imports_of(module).values()}
    return frozenset((names | {n.rpartition(".")[0] for n in names}) & set(MODULES))


def all_imports(module: str) -> set[str]:
    """Returns the modules of the package that a module imports, itself or by others."""
    found: set[str] = set()
    waiting = [module]
    while waiting:
        new = own_imports(waiting.pop()) - found
        found |= new
        waiting += new
    return found


def those_that_use(*names: str) -> set[str]:
    return {module for module in MODULES if names_of(module) & set(names)}


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down(module):
    for imported in own_imports(module):
        assert layer_of(imported) <= layer_of(module), f"{module} imports {imported}, which lies above it"
        is_beside = layer_of(imported) == layer_of(module) and imported.split(".")[0] != module.split(".")[0]
        assert not is_beside, f"{module} imports {imported}, another room of its layer"


def test_modules_make_no_circle():
    done: set[str] = set()

    def visit(name, trail):
        assert name not in trail, f"circle of imports: {' -> '.join([*trail, name])}"
        if name not in done:
            for imported in own_imports(name):
                visit(imported, [*trail, name])
            done.add(name)

    for name in MODULES:
        visit(name, [])


def test_packages_hold_no_code():
    for path in PACKAGE.rglob("__init__.py"):
        if path.parent != PACKAGE:
            (docstring,) = ast.parse(path.read_text(encoding="utf-8")).body
            assert isinstance(docstring, ast.Expr) and isinstance(docstring.value, ast.Constant), path


def test_imports_name_a_module():
    """The top package has public names of all layers, so nothing is read from it, and nothing binds it."""
    for module in MODULES:
        for name, whole in imports_of(module).items():
            assert whole != "flax_transformer" and not name.startswith("flax_transformer."), f"{module} binds the top"
            inside = whole.removeprefix("flax_transformer.")
            if inside != whole:
                assert {inside, inside.rpartition(".")[0]} & set(MODULES), f"{module} imports {whole}: of which module?"
    assert those_that_use("importlib.import_module", "__import__", "sys.modules") == set(IMPORT_BY_STRING)


def test_private_names_of_libraries_are_rare():
    def private(name):
        return any(part.startswith("_") and not part.startswith("__") for part in name.split(".")[1:])

    libraries = {"chex", "etils", "flax", "jax", "jaxtyping", "numpy", "optax", "orbax"}
    used = {m: {n for n in names_of(m) if n.split(".")[0] in libraries and private(n)} for m in MODULES}
    assert {module: names - {"jax._src.distributed"} for module, names in used.items() if names} == USE_PRIVATE_NAMES


def test_search_knows_no_model_and_layers_know_no_mesh():
    for module in MODULES:
        if module.startswith("decoding."):
            assert not {n for n in all_imports(module) if n.startswith(("models", "nn", "training", "data"))}, module
        if module.startswith(("nn.", "models.")):
            assert "parallel.mesh" not in own_imports(module), module


def test_one_kind_of_tokenizer_is_known_to_its_list_and_to_interop():
    knowing = {module for module in MODULES if "data.sentencepiece_tokenizer" in own_imports(module)}
    assert {m for m in knowing if not m.startswith("interop.")} == {"data.tokenizer_pair"}


def test_hardware_is_named_in_one_room():
    """Choices by platform while tracing stand in `ops`, and what a program is compiled for in `backend`."""
    assert not those_that_use("jax.default_backend", "jax.local_devices", "jax.device_count", "jax.local_device_count")
    assert those_that_use("jax.devices") == set(ASK_JAX_FOR_DEVICES)
    answers = {"sys.platform", "flax_transformer.backend.platform"}  # of the host's system, and while tracing
    asked = {m for m in MODULES for n in names_of(m) - answers if n.endswith((".platform", ".device_kind"))}
    assert asked == set(READ_A_DEVICE)
    choices = {
        "jax.lax.platform_dependent",
        "flax_transformer.backend.platform",
        "flax_transformer.ops.product.accumulation_dtype",
        "flax_transformer.ops.vocabulary.vocab_major",
    }
    choosing = those_that_use(*choices) | {module for module in MODULES if "backend" in own_imports(module)}
    assert all(module.startswith("ops.") for module in choosing), choosing


def test_data_is_loaded_without_jax():
    """Neither the modules of `data`, nor those of the lowest layers, nor what they import, need JAX."""
    lowest = [*LAYERS[0], *LAYERS[1], *LAYERS[2]]
    modules = [f"flax_transformer.{m}" for m in MODULES if m.startswith("data.") or m in lowest]
    code = (
        f"import sys, {', '.join(modules)}\n"
        "found = {'chex', 'flax', 'jax', 'jaxtyping', 'optax', 'orbax'} & set(sys.modules)\n"
        "assert not found, f'data needs {found}'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_public_names_are_what_type_checkers_read():
    """They stand in `__init__.py` twice: as imports for type checkers, and by the module that each is taken from."""
    read = set()
    for node in ast.walk(TREES["__init__"]):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("flax_transformer."):
            read |= {(alias.name, node.module) for alias in node.names}
    taken = {(name, f"flax_transformer.{home}") for name, home in flax_transformer._HOMES.items()}
    assert read == taken
    for name in flax_transformer.__all__:
        assert getattr(flax_transformer, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'Translater'"):
        _ = flax_transformer.Translater


def test_the_command_is_there_before_the_libraries():
    code = "import flax_transformer.cli.main, sys\nassert not {'jax', 'numpy'} & set(sys.modules)\n"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_the_package_starts_no_device_and_a_model_needs_no_tokenizer():
    code = (
        "import sys, flax_transformer.models.build, flax_transformer.config.reading\n"
        "assert 'sentencepiece' not in sys.modules, 'a model needs a tokenizer'\n"
        "import flax_transformer.experiment.run, flax_transformer.cli.main\n"
        "from jax._src import xla_bridge\n"
        "assert not xla_bridge._backends, 'a device was asked for at import'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
