"""Cross-attention as a picture."""

from matplotlib.figure import Figure

from flax_transformer.inference.attention_map import AttentionMap
from flax_transformer.object_storage import AnyPath
from flax_transformer.plots.picture import Picture, literal, png_of, set_title, write_picture

# Of a layer's picture: its side in inches, and tokens that are named on it, evenly spread where there are more.
LARGEST = 18.0
MOST_NAMES = 50
TOKEN_COLUMNS = 20  # room for the name of a token


def plot_attention(attention: AttentionMap, output: AnyPath, title: str) -> Picture:
    """Writes a picture with one panel a decoder layer: target tokens down, source tokens across, heads averaged.

    Args:
        attention: weights and tokens.
        output: the file to write.
        title: above the picture, in lines.
    """
    return write_picture(attention_figure(attention, title), output)


def attention_png(attention: AttentionMap, title: str) -> bytes:
    """Returns the picture of `plot_attention` as a PNG. Letters that no font of the machine has are boxes."""
    return png_of(attention_figure(attention, title))


def attention_figure(attention: AttentionMap, title: str) -> Figure:
    """Returns the figure of `plot_attention`."""
    num_layers = attention.weights.shape[0]
    columns = min(num_layers, 3)
    rows = -(-num_layers // columns)
    width = min(max(4.0, 0.38 * len(attention.source) + 1.8), LARGEST)
    height = min(max(3.4, 0.3 * len(attention.target) + 1.8), LARGEST)
    figure = Figure(figsize=(columns * width, rows * height + 0.4), layout="constrained")
    set_title(figure, *title.split("\n"))
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in panels[num_layers:]:
        axes.set_axis_off()
    image = None
    for layer, axes in enumerate(panels[:num_layers]):
        image = axes.imshow(attention.weights[layer].mean(axis=0), cmap="viridis", vmin=0.0, vmax=1.0, aspect="auto")
        # Anchored at the end next to the axis, text stays there in an SVG, whatever font it is drawn by.
        upwards = {"rotation": 90, "rotation_mode": "anchor", "ha": "right", "va": "center"}
        axes.set_xticks(*_names(attention.source), parse_math=False, **upwards)
        axes.set_yticks(*_names(attention.target), parse_math=False)
        axes.set(title=f"decoder layer {layer + 1}, mean over heads", xlabel="source", ylabel="target")
    assert image is not None, "a decoder has at least one layer"
    figure.colorbar(image, ax=list(panels), label="attention weight", shrink=0.8)
    return figure


def _names(tokens: list[str]) -> tuple[list[int], list[str]]:
    """Returns the places of tokens that are named on an axis, and their names."""
    places = range(len(tokens))[:: -(-len(tokens) // MOST_NAMES)]
    return list(places), [literal(tokens[place], TOKEN_COLUMNS) for place in places]
