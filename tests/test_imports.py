"""Holds the architecture: imports go down only, and each room keeps out what does not belong there."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import flax_transformer

PACKAGE = Path(__file__).parent.parent / "flax_transformer"

# Lowest first; a module may import modules of lower layers, and of its own where that makes no circle.
LAYERS = [
    ["errors", "locks", "object_storage", "progress", "shapes", "small_files", "standard_streams", "user_cache"],
    ["backend"],
    ["parallel.sharding_rules"],
    ["ops"],
    ["parallel"],
    ["nn", "data", "decoding"],
    ["models"],
    ["optim"],
    ["training.metrics"],
    ["config"],
    ["run_folder"],
    ["training"],
    ["inference"],
    ["plots", "interop"],
    ["experiment"],
    ["cli"],
    ["__init__"],
]


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


def imports_of(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} uses a relative import"
            if node.module != "flax_transformer":
                names.add(node.module or "")
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


MODULES = {module_name(p): p for p in sorted(PACKAGE.rglob("*.py")) if p.name != "__init__.py" or p.parent == PACKAGE}


def own_imports(path: Path) -> set[str]:
    names = imports_of(path)
    inside = {n.removeprefix("flax_transformer.") for n in names if n.startswith("flax_transformer.")}
    from_top = {n for n in inside if "." not in n} - {name.split(".")[0] for name in MODULES}
    assert path.parent == PACKAGE or not from_top, f"{path} imports {from_top} from the top: name the module"
    return {n for n in inside if n in MODULES}


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down(module):
    for imported in own_imports(MODULES[module]):
        assert layer_of(imported) <= layer_of(module), f"{module} imports {imported}, which lies above it"


def test_modules_make_no_circle():
    graph = {name: own_imports(path) for name, path in MODULES.items()}
    done: set[str] = set()

    def visit(name, trail):
        assert name not in trail, f"circle of imports: {' -> '.join([*trail, name])}"
        if name not in done:
            for imported in graph[name]:
                visit(imported, [*trail, name])
            done.add(name)

    for name in graph:
        visit(name, [])


def test_search_knows_no_model_and_layers_know_no_mesh():
    for module, path in MODULES.items():
        inside = own_imports(path)
        if module.startswith("decoding."):
            assert not {n for n in inside if n.startswith(("models", "nn", "training", "data"))}, module
        if module.startswith(("nn.", "models.")):
            assert "parallel.mesh" not in inside, module


def test_hardware_is_named_in_one_room():
    """Choices by platform while tracing stand in `ops`, and what a program is compiled for in `backend`."""
    for module, path in MODULES.items():
        text = path.read_text(encoding="utf-8")
        assert "default_backend(" not in text, module
        if {"backend"} & own_imports(path):
            assert module.startswith("ops."), module
        choices = {"flax_transformer.ops.product.accumulation_dtype", "flax_transformer.ops.vocabulary.vocab_major"}
        if not module.startswith("ops."):
            assert not choices & imports_of(path), module
        if module.startswith(("nn.", "models.", "decoding.", "optim.")):
            assert ".platform" not in text, module


def test_the_code_of_data_uses_no_jax():
    for module, path in MODULES.items():
        if module.startswith("data."):
            direct = {n.split(".")[0] for n in imports_of(path)}
            assert not direct & {"jax", "flax", "optax", "orbax"}, module


def test_public_names_are_what_type_checkers_read():
    """They stand in `__init__.py` twice: as imports for type checkers, and by the module that each is taken from."""
    read = set()
    for node in ast.walk(ast.parse(MODULES["__init__"].read_text(encoding="utf-8"))):
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


def test_importing_the_package_starts_no_device():
    code = (
        "import flax_transformer.experiment.run, flax_transformer.cli.main\n"
        "from jax._src import xla_bridge\n"
        "assert not xla_bridge._backends, 'a device was asked for at import'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
