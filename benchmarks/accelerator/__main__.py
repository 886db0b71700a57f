"""Runs one part: `python -m accelerator PART [options]`, with `benchmarks` on Python's path."""

from harness import run

from accelerator.agreement import Agreement
from accelerator.ceilings import Ceilings
from accelerator.decoding import Decoding
from accelerator.fused_attention import FusedAttention
from accelerator.training import Training

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
