"""The Transformer put together from PyTorch's own layers, to measure this project's model against.

It runs in float64, so what a comparison with it shows is the rounding of this project's float32 alone. Only PyTorch and
NumPy are imported: nothing of what is being checked takes part in making the answer.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np
import torch
from torch.nn import functional

IGNORED_LABEL = -100

ACTIVATIONS = {"relu": functional.relu, "gelu": functional.gelu, "swish": functional.silu}

Transform = Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class ReferenceCase:
    """One model to build; the fields up to `activation` have the names that `TransformerConfig` gives them.

    By default encoder and decoder differ in depth, so that a swapped pair fails, and the vocabulary is no multiple of
    8, so that the padding rows of the embedding tables take part.
    """

    norm_order: Literal["post", "pre"]
    model_dim: int = 16
    num_heads: int = 2
    feed_forward_dim: int = 24
    num_encoder_layers: int = 2
    num_decoder_layers: int = 3
    vocab_multiple: int = 8
    norm_epsilon: float = 1e-5
    share_embeddings: Literal["all", "target_output", "none"] = "all"
    activation: Literal["relu", "gelu", "swish"] = "relu"
    source_vocab_size: int = 23
    target_vocab_size: int = 23
    start_token: int = 1
    label_smoothing: float = 0.1


@dataclasses.dataclass(frozen=True)
class ReferenceInputs:
    """Token ids and lengths of a batch of sentence pairs; ids under the padding are random, so that a leak shows."""

    source_tokens: np.ndarray
    source_lengths: np.ndarray
    target_tokens: np.ndarray
    target_lengths: np.ndarray


def sinusoids(length: int, dim: int) -> np.ndarray:
    """Returns position encodings [length, dim] with the sines in the first half of the channels, cosines after."""
    table = np.zeros((length, dim))
    for position in range(length):
        for channel in range(dim // 2):
            angle = position / np.power(10000.0, 2.0 * channel / dim)
            table[position, channel] = np.sin(angle)
            table[position, dim // 2 + channel] = np.cos(angle)
    return table


class TorchTransformer(torch.nn.Module):
    """`TransformerEncoder` and `TransformerDecoder` with the embeddings, positions and output that they lack.

    `torch.nn.Transformer` would not do: it ends both stacks with a norm, in post-norm order too.
    """

    def __init__(self, case: ReferenceCase):
        super().__init__()
        self.case = case
        self.target_embedding = torch.nn.Embedding(case.target_vocab_size, case.model_dim)
        if case.share_embeddings != "all":
            self.source_embedding = torch.nn.Embedding(case.source_vocab_size, case.model_dim)
        if case.share_embeddings == "none":
            self.output_embedding = torch.nn.Embedding(case.target_vocab_size, case.model_dim)
        options = {
            "d_model": case.model_dim,
            "nhead": case.num_heads,
            "dim_feedforward": case.feed_forward_dim,
            "dropout": 0.0,
            "activation": ACTIVATIONS[case.activation],
            "layer_norm_eps": case.norm_epsilon,
            "batch_first": True,
            "norm_first": case.norm_order == "pre",
        }

        def final_norm() -> torch.nn.LayerNorm | None:
            if case.norm_order == "post":
                return None
            return torch.nn.LayerNorm(case.model_dim, eps=case.norm_epsilon)

        self.encoder = torch.nn.TransformerEncoder(
            torch.nn.TransformerEncoderLayer(**options),
            case.num_encoder_layers,
            norm=final_norm(),
            enable_nested_tensor=False,  # the fused path for inference, of which PyTorch warns where it cannot be used
        )
        self.decoder = torch.nn.TransformerDecoder(
            torch.nn.TransformerDecoderLayer(**options), case.num_decoder_layers, norm=final_norm()
        )
        self.double()

    def _embed(self, embedding: torch.nn.Embedding, tokens: torch.Tensor) -> torch.Tensor:
        positions = torch.from_numpy(sinusoids(tokens.shape[1], self.case.model_dim))
        return embedding(tokens) * self.case.model_dim**0.5 + positions

    def forward(
        self,
        source: torch.Tensor,
        source_padding: torch.Tensor,
        target_inputs: torch.Tensor,
        target_padding: torch.Tensor,
    ) -> torch.Tensor:
        """Returns logits [B, T, V]; paddings are True where there is no token."""
        shares = self.case.share_embeddings
        source_embedding = self.target_embedding if shares == "all" else self.source_embedding
        output_embedding = self.output_embedding if shares == "none" else self.target_embedding
        length = target_inputs.shape[1]
        memory = self.encoder(self._embed(source_embedding, source), src_key_padding_mask=source_padding)
        hidden = self.decoder(
            self._embed(self.target_embedding, target_inputs),
            memory,
            tgt_mask=torch.ones(length, length, dtype=torch.bool).triu(diagonal=1),
            tgt_key_padding_mask=target_padding,
            memory_key_padding_mask=source_padding,
        )
        return functional.linear(hidden, output_embedding.weight)


def parameter_table(case: ReferenceCase) -> list[tuple[str, str, Transform]]:
    """Returns rows of (PyTorch's name, our path, transform); "*" stands for a layer, and layers are stacked first.

    PyTorch keeps a kernel as [out, in], and the three input projections of attention as one matrix of 3 D rows, each D
    of them head by head. Every transform only moves values, so it maps gradients as it maps parameters.
    """
    dim, heads = case.model_dim, case.num_heads
    head_shape = (heads, dim // heads)

    def head_kernel(third: int) -> Transform:  # [3 D, D] -> [D, N, H]
        return lambda kernel: kernel[third * dim : (third + 1) * dim].T.reshape(dim, *head_shape)

    def head_bias(third: int) -> Transform:  # [3 D] -> [N, H]
        return lambda bias: bias[third * dim : (third + 1) * dim].reshape(head_shape)

    def output_kernel(kernel: np.ndarray) -> np.ndarray:  # [D, D] -> [N, H, D]
        return kernel.T.reshape(*head_shape, dim)

    def unchanged(array: np.ndarray) -> np.ndarray:
        return array

    def padded_table(table: np.ndarray) -> np.ndarray:  # zero rows up to the multiple
        return np.pad(table, ((0, -table.shape[0] % case.vocab_multiple), (0, 0)))

    def attention(foreign: str, ours: str) -> list[tuple[str, str, Transform]]:
        rows: list[tuple[str, str, Transform]] = []
        for third, role in enumerate(("query", "key", "value")):
            rows.append((f"{foreign}.in_proj_weight", f"{ours}/{role}/kernel", head_kernel(third)))
            rows.append((f"{foreign}.in_proj_bias", f"{ours}/{role}/bias", head_bias(third)))
        rows.append((f"{foreign}.out_proj.weight", f"{ours}/output/kernel", output_kernel))
        rows.append((f"{foreign}.out_proj.bias", f"{ours}/output/bias", unchanged))
        return rows

    def feed_forward(foreign: str, ours: str) -> list[tuple[str, str, Transform]]:
        return [
            (f"{foreign}.linear1.weight", f"{ours}/up/kernel", np.transpose),
            (f"{foreign}.linear1.bias", f"{ours}/up/bias", unchanged),
            (f"{foreign}.linear2.weight", f"{ours}/down/kernel", np.transpose),
            (f"{foreign}.linear2.bias", f"{ours}/down/bias", unchanged),
        ]

    def norm(foreign: str, ours: str) -> list[tuple[str, str, Transform]]:
        return [(f"{foreign}.weight", f"{ours}/scale", unchanged), (f"{foreign}.bias", f"{ours}/bias", unchanged)]

    table = [
        ("target_embedding.weight", "target_embedding/table", padded_table),
        *attention("encoder.layers.*.self_attn", "encoder/layers/self_attention"),
        *norm("encoder.layers.*.norm1", "encoder/layers/self_attention_residual/norm"),
        *feed_forward("encoder.layers.*", "encoder/layers/feed_forward"),
        *norm("encoder.layers.*.norm2", "encoder/layers/feed_forward_residual/norm"),
        *attention("decoder.layers.*.self_attn", "decoder/layers/self_attention"),
        *norm("decoder.layers.*.norm1", "decoder/layers/self_attention_residual/norm"),
        *attention("decoder.layers.*.multihead_attn", "decoder/layers/cross_attention"),
        *norm("decoder.layers.*.norm2", "decoder/layers/cross_attention_residual/norm"),
        *feed_forward("decoder.layers.*", "decoder/layers/feed_forward"),
        *norm("decoder.layers.*.norm3", "decoder/layers/feed_forward_residual/norm"),
    ]
    if case.share_embeddings != "all":
        table.append(("source_embedding.weight", "source_embedding/table", padded_table))
    if case.share_embeddings == "none":
        table.append(("output_embedding.weight", "output_embedding/table", padded_table))
    if case.norm_order == "pre":
        table += [*norm("encoder.norm", "encoder/norm"), *norm("decoder.norm", "decoder/norm")]
    return table


def to_our_layout(case: ReferenceCase, foreign: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns float32 arrays under our paths, from arrays under PyTorch's names.

    Raises:
        ValueError: an array of PyTorch's that no row of the table reads.
    """
    depths = {"encoder": case.num_encoder_layers, "decoder": case.num_decoder_layers}
    ours, read = {}, set()
    for name, path, transform in parameter_table(case):
        if "*" in name:
            names = [name.replace("*", str(layer)) for layer in range(depths[name.split(".")[0]])]
            array = np.stack([transform(foreign[each]) for each in names])
        else:
            names, array = [name], transform(foreign[name])
        ours[path] = array.astype(np.float32)
        read.update(names)
    if read != set(foreign):
        raise ValueError(f"not in the parameter table: {sorted(set(foreign) - read)}")
    return ours


def draw_parameter(name: str, shape: tuple[int, ...], generator: np.random.Generator) -> np.ndarray:
    """Returns random values for a parameter: no bias is zero and no norm scale one, so that none can be left out.

    Values are those of float16, exact in every wider type, and they compress to half the size.
    """
    values = generator.standard_normal(shape)
    if name.endswith("bias"):
        values = 0.3 * values
    elif "norm" in name:
        values = 1.0 + 0.2 * values
    else:
        values = values * shape[-1] ** -0.5
    return values.astype(np.float16).astype(np.float64)


def draw_inputs(case: ReferenceCase, generator: np.random.Generator) -> ReferenceInputs:
    """Returns three sentence pairs of different lengths; at least one is padded on each side."""
    return ReferenceInputs(
        generator.integers(0, case.source_vocab_size, (3, 7)).astype(np.int32),
        np.array([7, 4, 2], np.int32),
        generator.integers(0, case.target_vocab_size, (3, 5)).astype(np.int32),
        np.array([3, 5, 1], np.int32),
    )


def compute_reference(case: ReferenceCase, seed: int) -> dict[str, np.ndarray]:
    """Returns the case, its inputs, and PyTorch's logits, loss and gradients, under flat names joined by "/".

    Keys: "case" (JSON of `ReferenceCase`), the fields of `ReferenceInputs`, "logits" [B, T, V] without padding rows,
    "loss" (label-smoothed, summed over target tokens), "negative_log_likelihood" (the same without smoothing),
    "parameters/..." and "gradients/..." (of "loss"), both in our layout.
    """
    generator = np.random.default_rng(seed)
    inputs = draw_inputs(case, generator)
    model = TorchTransformer(case)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(draw_parameter(name, tuple(parameter.shape), generator)))
    parameters = {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}

    target = torch.from_numpy(inputs.target_tokens).long()
    source_padding = np.arange(inputs.source_tokens.shape[1]) >= inputs.source_lengths[:, None]
    target_padding = torch.from_numpy(np.arange(target.shape[1]) >= inputs.target_lengths[:, None])
    start = torch.full((target.shape[0], 1), case.start_token)
    logits = model(
        torch.from_numpy(inputs.source_tokens).long(),
        torch.from_numpy(source_padding),
        torch.cat([start, target[:, :-1]], dim=1),
        target_padding,
    )
    labels = target.masked_fill(target_padding, IGNORED_LABEL).flatten()
    cross_entropy = functools.partial(
        functional.cross_entropy, logits.flatten(0, 1), labels, ignore_index=IGNORED_LABEL, reduction="sum"
    )
    loss = cross_entropy(label_smoothing=case.label_smoothing)
    by_parameter = torch.autograd.grad(loss, list(model.parameters()))
    gradients = {name: gradient.numpy() for name, gradient in zip(parameters, by_parameter, strict=True)}

    reference = {
        "case": np.array(json.dumps(dataclasses.asdict(case))),
        **dataclasses.asdict(inputs),
        "logits": logits.detach().numpy().astype(np.float32),
        "loss": loss.detach().numpy().astype(np.float32),
        "negative_log_likelihood": cross_entropy().detach().numpy().astype(np.float32),
    }
    reference.update({f"parameters/{path}": array for path, array in to_our_layout(case, parameters).items()})
    reference.update({f"gradients/{path}": array for path, array in to_our_layout(case, gradients).items()})
    return reference
