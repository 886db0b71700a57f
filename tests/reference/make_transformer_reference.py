"""Writes `transformer_reference.npz`: what PyTorch computes for a post-norm and a pre-norm Transformer.

The default tests read the file, so that they check the whole model against PyTorch without installing it. Run this
again after a change to `torch_transformer.py`, with the parity extra installed; the seed is fixed, so the values are
the same each time:

    python -m tests.reference.make_transformer_reference
"""

from pathlib import Path

import numpy as np

from tests.reference.torch_transformer import ReferenceCase, compute_reference

REFERENCE_PATH = Path(__file__).with_name("transformer_reference.npz")


def make_reference() -> dict[str, np.ndarray]:
    """Returns all arrays of the file; the names start with the norm order they belong to."""
    cases = [ReferenceCase(norm_order="post"), ReferenceCase(norm_order="pre")]
    return {
        f"{case.norm_order}/{name}": array
        for seed, case in enumerate(cases)
        for name, array in compute_reference(case, seed).items()
    }


if __name__ == "__main__":
    np.savez_compressed(REFERENCE_PATH, allow_pickle=False, **make_reference())
    print(f"{REFERENCE_PATH.name}: {REFERENCE_PATH.stat().st_size} bytes")
