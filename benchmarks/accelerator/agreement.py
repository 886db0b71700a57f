"""Whether the accelerator computes what a CPU computes: loss, gradients, train steps and searches of small models.

Both platforms are devices of one process, and have the same parameters and batches. Products are float32 at the highest
precision, unless a row says bfloat16.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from harness import Report

from accelerator.decoding import PENALTY, word_tokenizer
from accelerator.measurement import Measurement, short

WORDS, ROWS, LENGTH, STEPS = 203, 16, 24, 3


@dataclass(frozen=True)
class Agreement(Measurement):
    """The accelerator beside the CPU of the same machine, on small models.

    A distance is the Frobenius norm of a difference, relative to the norm of the CPU's result. Dropout is on, since its
    bits depend on the key alone.
    """

    def measure(self, report: Report) -> None:
        """Adds a row for each model and result."""
        import jax

        jax.config.update("jax_default_matmul_precision", "highest")
        report.say(f"{jax.devices()[0].device_kind} beside {jax.devices('cpu')[0].device_kind}\n")
        report.table(["model", "result", "distance or number"], self.rows())

    def rows(self) -> Iterator[list[str]]:
        """Yields the rows."""
        for name, model in models().items():
            for part in (training_rows, search_rows):
                try:
                    for what, figure in part(model):
                        self.note(name, result=what, figure=figure)
                        yield [name, what, figure]
                except Exception as error:  # another model may still work
                    self.note(name, error=short(error))
                    yield [name, part.__name__, short(error).replace("|", "/")]


def models() -> dict[str, Any]:
    """Returns the configurations by name."""
    from flax_transformer.models.recurrent_config import RecurrentConfig
    from flax_transformer.models.transformer_config import TransformerConfig

    sizes = {"model_dim": 64, "num_encoder_layers": 1, "num_decoder_layers": 1}
    lengths = {"max_source_length": LENGTH, "max_target_length": LENGTH}
    plain = TransformerConfig(attention_dropout=0.1, **sizes, **lengths)
    recurrent = RecurrentConfig(hidden_dim=64, **sizes, **lengths)
    half = dataclasses.replace(plain, compute_dtype="bfloat16")
    return {"Transformer": plain, "Transformer in bfloat16": half, "recurrent": recurrent}


def meshes() -> list[Any]:
    """Returns a mesh of one device of the CPU, and one of the accelerator."""
    import jax

    from flax_transformer.parallel.mesh import MeshConfig, make_mesh

    return [make_mesh(MeshConfig(), devices[:1]) for devices in (jax.devices("cpu"), jax.devices())]


def distance(right: Any, made: Any) -> str:
    """Returns the distance of two trees of arrays."""
    import jax

    a, b = (np.concatenate([np.ravel(np.asarray(x, np.float64)) for x in jax.tree.leaves(t)]) for t in (right, made))
    return f"{np.linalg.norm(a - b) / np.linalg.norm(a):.2e}"


def training_rows(model: Any) -> Iterator[tuple[str, str]]:
    """Yields the distances of losses, gradients and trained parameters.

    In bfloat16 a CPU accumulates in float32 as well, but rounds elsewhere.
    """
    cpu, accelerator = (trained(model, mesh, first) for mesh, first in zip(meshes(), parameters(model), strict=True))
    for what, right, made in zip(
        ("loss", "gradients", f"parameters after {STEPS} steps"), cpu, accelerator, strict=True
    ):
        yield what, distance(right, made)


def vocabulary() -> Any:
    """Returns the sizes of the vocabulary."""
    from flax_transformer.models.build import VocabularyInfo

    return VocabularyInfo(WORDS, WORDS, 1)


def parameters(model: Any) -> list[Any]:
    """Returns the same random parameters for each mesh, on the host."""
    import jax
    from flax import nnx

    from flax_transformer.models.build import build_model

    with jax.default_device(jax.devices("cpu")[0]):
        made = nnx.to_pure_dict(nnx.state(build_model(model, vocabulary(), rngs=nnx.Rngs(params=0))))
    return [jax.tree.map(np.asarray, made)] * 2


def trained(model: Any, mesh: Any, first: Any) -> tuple[Any, Any, Any]:
    """Returns the sums of losses, the gradients, and the parameters after some train steps on one mesh."""
    import jax
    from flax import nnx

    from flax_transformer.optim.optimizer import OptimizerConfig, make_optimizer
    from flax_transformer.optim.schedule import make_schedule
    from flax_transformer.training.state import TrainState, describe_parameters, make_layout
    from flax_transformer.training.step import Objective, batch_loss, jit_train_step

    config = OptimizerConfig(clip_norm=1.0, warmup_steps=10)
    schedule = make_schedule(config, model.model_dim)
    layout = make_layout(
        model, vocabulary(), make_optimizer(config, schedule, describe_parameters(model, vocabulary())), mesh
    )
    placed, objective, batch = jax.device_put(first, layout.shardings.params), Objective(0.1), padded_batch()

    def loss(params: Any) -> Any:
        return batch_loss(nnx.merge(layout.graphdef, params), batch, objective, jax.random.key(1)).loss

    step = jit_train_step(layout, schedule, objective, 0, mesh)
    with jax.set_mesh(mesh):
        value, gradients = jax.jit(jax.value_and_grad(loss))(placed)
        first_state = TrainState(np.zeros((), np.int32), placed, layout.optimizer.init(placed))
        state = jax.device_put(first_state, layout.shardings)
        for _ in range(STEPS):
            state, _ = step(state, batch)
        return jax.tree.map(np.asarray, (value, gradients, state.params))


def padded_batch() -> Any:
    """Returns a batch of random tokens with rows of different lengths."""
    from flax_transformer.shapes import Batch

    rng = np.random.default_rng(0)

    def side() -> tuple[np.ndarray, ...]:
        real = np.arange(LENGTH)[None] < rng.integers(LENGTH // 2, LENGTH + 1, (ROWS, 1))
        tokens = np.where(real, rng.integers(4, WORDS, (ROWS, LENGTH)), 0).astype(np.int32)
        positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), tokens.shape)
        return tokens, positions * real, real.astype(np.int32)

    return Batch(*side(), *side())


def search_rows(model: Any) -> Iterator[tuple[str, str]]:
    """Yields how many outputs of a beam search are equal, and the largest difference of scores among those."""
    cpu, accelerator = (searched(model, mesh, first) for mesh, first in zip(meshes(), parameters(model), strict=True))
    equal = [(a, b) for a, b in zip(cpu, accelerator, strict=True) if a.text == b.text]
    yield "equal outputs of a beam search", f"{len(equal)} of {len(cpu)}"
    differences = [abs(a.hypotheses[0].score - b.hypotheses[0].score) for a, b in equal]
    yield "largest difference of their scores", f"{max(differences, default=float('nan')):.2e}"


def searched(model: Any, mesh: Any, first: Any) -> list[Any]:
    """Returns translations of random sentences on one mesh."""
    from flax_transformer.config.recipe import DecodingConfig
    from flax_transformer.data.sentencepiece_tokenizer import SentencePieceTokenizer
    from flax_transformer.data.tokenizer_pair import TokenizerPair
    from flax_transformer.inference.translator import Translator

    tokenizer, rng = SentencePieceTokenizer(word_tokenizer(WORDS)), np.random.default_rng(0)
    sizes = {"max_length_factor": 0.0, "max_length_offset": LENGTH - 1}
    decoding = DecodingConfig(beam_size=4, length_penalty=PENALTY, stop="first_finished", batch_size=16, **sizes)
    translator = Translator.from_params(model, TokenizerPair(tokenizer, tokenizer), first, decoding, mesh)
    lengths = rng.integers(3, LENGTH, 64).tolist()
    lines = [" ".join(f"w{word}" for word in rng.integers(4, WORDS, length).tolist()) for length in lengths]
    return translator.translate(lines)
