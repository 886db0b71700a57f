"""What is done otherwise on a CPU: how arrays lie in memory, and which type products are asked for."""

import jax
import jax.numpy as jnp


def backend() -> str:
    """Returns what programs are compiled for; a check that compiles for another machine puts its own in this place."""
    return jax.default_backend()


def vocabulary_first() -> bool:
    """Returns whether logits [..., V] are made, and searched, as [V, ...].

    On a CPU they are: with the table of embeddings as its left side their product is a fifth faster, where that table
    stays in the cache, since XLA's library packs the right side anew in each call; and what is done along the
    vocabulary takes the rows beside each other into one instruction (docs/lab_book.md, 2026-11-26). The axes are
    exchanged where logits are made and again where they are read, of which nothing is left in the compiled program.
    """
    return backend() == "cpu"


def caches_in_pieces() -> bool:
    """Returns whether a search keeps keys and values in pieces; a branch for each costs nothing on a CPU alone."""
    return backend() == "cpu"


def product_type(compute_type: jnp.dtype) -> jnp.dtype:
    """Returns the type that a product of `compute_type` is asked for, before it is rounded to `compute_type`.

    On a CPU float32: XLA's library multiplies bfloat16 by the processor's matrix instructions (AMX), where it has them,
    into float32 alone, and for a product that is asked for in bfloat16 it makes both sides float32 first
    (docs/lab_book.md, 2026-11-26). Elsewhere `compute_type` itself, in which sums inside a product are float32 all the
    same, and what is summed over devices is half as many bytes.
    """
    return jnp.dtype(jnp.float32) if backend() == "cpu" else jnp.dtype(compute_type)
