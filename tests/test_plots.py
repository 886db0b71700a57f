"""Pictures of what a run does."""

import numpy as np

from flax_transformer.inference.attention_map import AttentionMap
from flax_transformer.plots.attention import plot_attention


def test_the_picture_of_a_long_sentence_is_no_larger_than_a_screen_or_two(tmp_path):
    """With all its 400 tokens named it would take minutes and gigabytes."""
    tokens = [f"t{number}" for number in range(400)]
    weights = np.full((1, 2, 400, 400), 1 / 400)
    plot_attention(AttentionMap(tokens, tokens, weights), tmp_path / "long.png", "long")
    header = (tmp_path / "long.png").read_bytes()[:24]
    width, height = (int.from_bytes(header[at : at + 4]) for at in (16, 20))  # PNG, section 11.2.2
    assert 1500 < width < 2200 and 1500 < height < 2200
