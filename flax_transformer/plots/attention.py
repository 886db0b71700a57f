"""Cross-attention as a picture."""

from pathlib import Path

from flax_transformer.inference.attention_map import AttentionMap


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
    width = max(4.0, 0.38 * len(attention.source) + 1.8)
    height = max(3.4, 0.3 * len(attention.target) + 1.8)
    figure = Figure(figsize=(columns * width, rows * height + 0.4), layout="constrained")
    figure.suptitle(title, parse_math=False)  # a sentence may hold dollar signs
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in panels[num_layers:]:
        axes.set_axis_off()
    image = None
    for layer, axes in enumerate(panels[:num_layers]):
        image = axes.imshow(attention.weights[layer].mean(axis=0), cmap="viridis", vmin=0.0, vmax=1.0, aspect="auto")
        axes.set_xticks(range(len(attention.source)), attention.source, rotation=90, parse_math=False)
        axes.set_yticks(range(len(attention.target)), attention.target, parse_math=False)
        axes.set(title=f"decoder layer {layer + 1}, mean over heads", xlabel="source", ylabel="target")
    assert image is not None, "a decoder has at least one layer"
    figure.colorbar(image, ax=list(panels), label="attention weight", shrink=0.8)
    figure.savefig(output, dpi=110)
