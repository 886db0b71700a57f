"""Cross-attention as a picture."""

from pathlib import Path

from flax_transformer.inference.attention_map import AttentionMap

# Of a layer's picture: its side in inches, and tokens that are named on it, evenly spread where there are more.
LARGEST = 18.0
MOST_NAMES = 50


def plot_attention(attention: AttentionMap, output: Path, title: str) -> None:
    """Writes a PNG with one panel a decoder layer: target tokens down, source tokens across, heads averaged.

    Args:
        attention: weights and tokens.
        output: the file to write.
        title: above the picture.
    """
    from matplotlib.figure import Figure

    num_layers = attention.weights.shape[0]
    columns = min(num_layers, 3)
    rows = -(-num_layers // columns)
    width = min(max(4.0, 0.38 * len(attention.source) + 1.8), LARGEST)
    height = min(max(3.4, 0.3 * len(attention.target) + 1.8), LARGEST)
    named = [slice(None, None, -(-len(tokens) // MOST_NAMES)) for tokens in (attention.source, attention.target)]
    places = [
        range(len(tokens))[some] for tokens, some in zip((attention.source, attention.target), named, strict=True)
    ]
    figure = Figure(figsize=(columns * width, rows * height + 0.4), layout="constrained")
    figure.suptitle(title, parse_math=False)  # a sentence may hold dollar signs
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in panels[num_layers:]:
        axes.set_axis_off()
    image = None
    for layer, axes in enumerate(panels[:num_layers]):
        image = axes.imshow(attention.weights[layer].mean(axis=0), cmap="viridis", vmin=0.0, vmax=1.0, aspect="auto")
        axes.set_xticks(places[0], attention.source[named[0]], rotation=90, parse_math=False)
        axes.set_yticks(places[1], attention.target[named[1]], parse_math=False)
        axes.set(title=f"decoder layer {layer + 1}, mean over heads", xlabel="source", ylabel="target")
    assert image is not None, "a decoder has at least one layer"
    figure.colorbar(image, ax=list(panels), label="attention weight", shrink=0.8)
    figure.savefig(output, dpi=110)
