"""How arrays lie in memory, where a backend cares."""

import jax


def vocabulary_first() -> bool:
    """Returns whether logits [..., V] are made, and searched, as [V, ...].

    On a CPU they are: with the table of embeddings as its left side their product is a fifth faster, where that table
    stays in the cache, since XLA's library packs the right side anew in each call; and what is done along the
    vocabulary takes the rows beside each other into one instruction (docs/lab_book.md, 2026-11-26). The axes are
    exchanged where logits are made and again where they are read, of which nothing is left in the compiled program.
    """
    return jax.default_backend() == "cpu"
