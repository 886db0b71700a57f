"""Runs one part: `python -m accelerator PART [options]`, with `benchmarks` on Python's path."""

from accelerator.agreement import Agreement
from accelerator.ceilings import Ceilings
from accelerator.decoding import Decoding
from accelerator.fused_attention import FusedAttention
from accelerator.training import Training
from harness import run

if __name__ == "__main__":
    run(
        {
            "ceilings": Ceilings,
            "training": Training,
            "decoding": Decoding,
            "fused-attention": FusedAttention,
            "agreement": Agreement,
        }
    )
