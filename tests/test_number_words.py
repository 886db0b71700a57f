"""The main job as a user runs it: slow, so only .ci/run asks for it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# The flags of tests compile fast, but the programs run for longer than those of a user.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}


@pytest.mark.slow
def test_the_default_run_learns_number_words(tmp_path):
    run = tmp_path / "number_words"
    subprocess.run([sys.executable, "train.py", "--run", str(run)], check=True, cwd=ROOT, env=ENVIRONMENT)
    test = json.loads((run / "run_card.json").read_text())["test"]
    assert test["num_sentences"] >= 2000
    assert test["exact_match"] >= 99.5
    piped = subprocess.run(
        [sys.executable, "-m", "flax_transformer.cli.main", "translate", "--run", str(run)],
        input="twenty-one\n\nforty-two thousand seven\n",
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env=ENVIRONMENT,
    )
    assert piped.stdout == "einundzwanzig\n\nzweiundvierzigtausendsieben\n"
