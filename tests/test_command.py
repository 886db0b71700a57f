"""How the command sets up its process, each time in a process of its own."""

import os
import platform
import re
import shutil
import subprocess
import sys

import jax
import pytest

from flax_transformer.cli import main as cli
from flax_transformer.cli.completion import options_of_verbs, script
from flax_transformer.cli.versions import files_of


def test_compiled_programs_are_kept_for_the_user_unless_he_says_otherwise(tmp_path):
    """In processes of their own, since the setting belongs to the process."""
    code = (
        "import jax; from flax_transformer.cli.main import run_verb; "
        "run_verb(lambda arguments, program: print(jax.config.jax_compilation_cache_dir) or 0, [], 'a verb')"
    )
    for more, expected in (
        ({"XDG_CACHE_HOME": str(tmp_path)}, str(tmp_path / "flax_transformer" / "compiled")),
        ({"JAX_COMPILATION_CACHE_DIR": "/elsewhere"}, "/elsewhere"),
        ({"JAX_ENABLE_COMPILATION_CACHE": "false"}, "None"),
    ):
        found = subprocess.run([sys.executable, "-c", code], env=os.environ | more, capture_output=True, text=True)
        assert found.stdout.strip() == expected, found.stderr


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the settings are those of glibc's allocator")
def test_a_training_keeps_its_memory_unless_the_user_says_otherwise():
    """In processes of their own, since the process is started anew."""
    code = (
        "from flax_transformer.cli.main import keep_memory; keep_memory(); "
        "import os, sys; print(os.getpid(), os.environ['GLIBC_TUNABLES'], sys.argv[1:])"
    )
    plain = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    for more, expected in (({}, cli.KEPT_MEMORY), ({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"},) * 2):
        with subprocess.Popen(
            [sys.executable, "-c", code, "two words"], env=plain | more, stdout=subprocess.PIPE, text=True
        ) as process:
            found = process.communicate()[0].strip()
        expected = expected if isinstance(expected, str) else expected["GLIBC_TUNABLES"]
        assert found == f"{process.pid} {expected} ['two words']"


def test_each_core_is_a_device_unless_the_user_says_otherwise():
    """In processes of their own, since devices are made once."""
    code = (
        "import jax, os; from flax_transformer.cli.main import run_verb; run_verb(lambda arguments, program: "
        "print(len(jax.devices()), len(os.sched_getaffinity(0)), os.environ.get('XLA_FLAGS')) or 0, [], 'a verb')"
    )
    for more, expected in (
        ({}, None),
        ({"JAX_NUM_CPU_DEVICES": "3"}, 3),
        ({"XLA_FLAGS": "--xla_force_host_platform_device_count=5"}, 5),
    ):
        environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | more
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        devices, cores, flags = done.stdout.split(maxsplit=2)
        if expected is None:
            assert int(devices) <= min(int(cores), 8) < 2 * int(devices) or int(devices) == 8
            assert "terminate_timeout_seconds=86400" in flags
        else:
            assert int(devices) == expected and "terminate_timeout" not in flags


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_tells_its_options(verb, capsys):
    try:
        direction = ["to-hf"] if verb == "convert" else []
        code = cli.run_verb(cli.verb(verb), [*direction, "--help"], f"flax-transformer {verb}")
    except SystemExit as stop:  # how tyro ends after its help
        code = stop.code
    captured = capsys.readouterr()
    assert code == 0 and not captured.err and "--" in captured.out
    assert f"Example: flax-transformer {verb} " in " ".join(captured.out.replace("│", "").split())


def test_the_help_is_that_of_the_kinds_that_are_asked_for(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.run_verb(cli.verb("train"), ["--data.kind", "parallel_text", "--model.kind=rnn", "--help"], "train.py")
    shown = capsys.readouterr().out
    assert not stop.value.code and "--data.train-source" in shown and "--model.cell" in shown


def test_the_version_says_what_a_report_of_a_defect_needs(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["flax-transformer", "--version"])
    monkeypatch.setenv("FLAX_TRANSFORMER_KERNELS", "off")
    assert cli.main() == 0
    said = capsys.readouterr().out
    for name in ("flax-transformer", "Python", "jax", "jaxlib", "flax", "orbax-checkpoint"):
        assert re.search(rf"^{name} \d+\.", said, flags=re.MULTILINE), name
    assert f"devices: {len(jax.devices())} x cpu (cpu" in said and "FLAX_TRANSFORMER_KERNELS=off" in said
    assert f"cache compiled: {os.environ['XDG_CACHE_HOME']}/flax_transformer/compiled, " in said


def test_a_cache_may_lose_files_while_they_are_counted(tmp_path):
    (tmp_path / "inside").mkdir()
    (tmp_path / "one").write_bytes(b"123")
    (tmp_path / "inside" / "two").write_bytes(b"45")
    (tmp_path / "removed").symlink_to(tmp_path / "nothing")  # a name whose file is gone
    assert files_of(tmp_path) == (2, 5)
    assert files_of(tmp_path / "nothing") == (0, 0)


@pytest.mark.skipif(shutil.which("bash") is None, reason="completion is tried in bash")
def test_bash_completes_verbs_and_their_options(tmp_path):
    assert options_of_verbs().keys() == cli.VERBS.keys()
    (tmp_path / "completion").write_text(script("bash", "flax-transformer"))
    words = ["ev", "evaluate --re", "train --training.st", "prepare --conf", "init --held"]
    tries = "".join(
        f"COMP_WORDS=(flax-transformer {word}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); _tyro_flax_transformer; "
        'echo "${COMPREPLY[@]}"; '
        for word in words
    )
    path = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"  # the script asks for python3
    done = subprocess.run(
        ["bash", "-c", f"source {tmp_path}/completion; {tries}"],
        env=os.environ | {"PATH": path}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.split() == ["evaluate", "--reference", "--training.steps", "--config", "--held-out"]
    assert script("zsh", "flax-transformer").startswith("#compdef flax-transformer")
