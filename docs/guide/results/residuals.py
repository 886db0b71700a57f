"""Trains deep encoders with and without residual connections, with both places of the norm."""

import dataclasses
from contextlib import nullcontext

from norms import no_residuals
from record import write_result
from short_training import MODELS, number_text, short_training

SEEDS = [0]
LAYERS, STEPS = 8, 300


def main() -> None:
    """Trains all models and writes the result."""
    results = []
    for seed in SEEDS:
        for order in ("post", "pre"):
            for residual in (True, False):
                config = dataclasses.replace(
                    MODELS["transformer"], num_encoder_layers=LAYERS, norm_order=order, scan_layers=True
                )
                with nullcontext() if residual else no_residuals():
                    trained = short_training(config, number_text(), STEPS, rows=32, seed=seed)
                losses = [round(float(loss), 4) for loss in trained.losses]
                results.append({"norm": order, "residual": residual, "seed": seed, "losses": losses})
                print(f"{order}-norm, residual {residual}, seed {seed}: loss {losses[-1]}", flush=True)
    note = (
        f"norm: place of the layer norm. residual: whether there are residual connections. {LAYERS} encoder and 2 "
        "decoder layers. losses: training loss of each step, nats per target token."
    )
    write_result("residuals", SEEDS, results, note)


if __name__ == "__main__":
    main()
