"""Trains three models to copy random letters: one vector, recurrent attention, attention alone."""

import dataclasses

import numpy as np
from record import write_result
from short_training import LENGTHS, MODELS, prepared_text, short_training

from flax_transformer import RecurrentConfig

SEEDS = [0, 1]
STEPS = 600
NUM_LINES, LONGEST = 20_000, 24
MODELS_TO_TRAIN = {
    "one vector": RecurrentConfig(model_dim=64, hidden_dim=128, cell="gru", attention="none", dropout=0.0, **LENGTHS),
    **MODELS,
}


def letters() -> list[str]:
    """Returns lines of random letters, each letter a word, of 1 to 24 letters."""
    rng = np.random.default_rng(0)
    alphabet = np.array(list("abcdefghijklmnop"))
    return [" ".join(rng.choice(alphabet, size=rng.integers(1, LONGEST + 1))) for _ in range(NUM_LINES)]


def main() -> None:
    """Trains all models and writes the result."""
    lines = letters()
    text = prepared_text(lines, lines, vocab_size=37)
    results = []
    for seed in SEEDS:
        for name, config in MODELS_TO_TRAIN.items():
            trained = short_training(dataclasses.replace(config), text, STEPS, seed=seed)
            found = trained.translator().translate(text.held_out_lines.source)
            exact = [a.text == b for a, b in zip(found, text.held_out_lines.target, strict=True)]
            lengths = [len(line.split()) for line in text.held_out_lines.source]
            losses = [round(float(loss), 4) for loss in trained.losses]
            results.append({"model": name, "seed": seed, "lengths": lengths, "exact": exact, "losses": losses})
            print(f"{name}, seed {seed}: {100 * np.mean(exact):.1f} % exact, loss {losses[-1]}", flush=True)
    note = (
        "lengths: letters of each of 256 held-out lines. exact: whether greedy search copies the line without a "
        f"mistake after {STEPS} steps. losses: training loss of each step, nats per target token."
    )
    write_result("copying", SEEDS, results, note)


if __name__ == "__main__":
    main()
