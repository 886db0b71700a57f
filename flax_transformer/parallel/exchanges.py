"""Exchanges between the devices of a compiled program: their kinds, mesh axes, bytes and least times.

A collective moves data between the devices of a group. The devices of a group differ along some axes of the mesh. So a
mesh axis tells what an exchange is for: gradients move along "data", parameters along "fsdp", activations along
"tensor".

The least time of an exchange is that of a ring without latency. With n devices and an array of B bytes in all of them
together, each device receives

    all-gather, reduce-scatter, all-to-all: B (n - 1) / n,    all-reduce: 2 B (n - 1) / n,    permute: B

and divides this by its bandwidth; see `Link`.

References:
    Austin et al. 2025, "How to Scale Your Model", chapters "Sharded matrices" and "GPUs" (jax-ml.github.io).
"""

import dataclasses
import itertools
import math
import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from flax_transformer.errors import InputError, shown
from flax_transformer.parallel.program_text import BYTES, Computation, Line, all_arrays, loop_turns, parse
from flax_transformer.parallel.topology import COLLECTIVES, TPU_MEMORY_GIB


@dataclasses.dataclass(frozen=True)
class Link:
    """What a device receives in a second, in bytes.

    Attributes:
        near: TPU: over the two links of one axis of the torus. GPU: over NVLink, inside a host.
        far: GPU: over the network, from another host. TPU: the same as near, since a slice has links across hosts.
    """

    near: float
    far: float


# By the name in a topology. TPU: the bidirectional bandwidth of a chip on Google Cloud's pages, halved and divided by
# the axes of its torus. GPU: half of NVIDIA's figure of NVLink, and a network card of each GPU of a DGX system.
LINKS = {
    "a100_sxm_80": Link(300e9, 25e9),
    "h100_sxm": Link(450e9, 50e9),
    "h200": Link(450e9, 50e9),
    "b200": Link(900e9, 50e9),
    "v4": Link(100e9, 100e9),
    "v5e": Link(100e9, 100e9),
    "v5p": Link(200e9, 200e9),
    "v6e": Link(200e9, 200e9),
}

# Bytes that a device receives for each byte of the whole array, as a multiple of (n - 1) / n.
PASSES = {"all-reduce": 2.0}


@dataclasses.dataclass(frozen=True)
class Exchange:
    """The exchanges of one kind along the same axes, in one run of a program.

    Attributes:
        kind: kind of the collective.
        axes: mesh axes along which the devices of a group differ, or ("pairs",) if a permutation sends along several.
        number: number of exchanges.
        bytes: bytes that a device receives.
        seconds: least time, one exchange after the other; 0 if the links of the hardware are not known.
    """

    kind: str
    axes: tuple[str, ...]
    number: int
    bytes: float
    seconds: float


# --- The groups of a collective

IOTA = r"\[[\d,]+\](?:T\([\d,]+\))?"
MESH_GROUPS = re.compile(r"replica_groups=mesh\[(.*?)\](?:, device_ids=\((.*?)\))? ?\{(.*?)\}")


def replica_groups(attributes: str) -> np.ndarray:
    """Returns the groups [groups, devices of a group] that a collective names, in any of XLA's three notations.

    The notations are `{{0,1},{2,3}}`, `[2,2]<=[4]T(0)` (an iota, reshaped and transposed), and a mesh of which some
    axes form the groups, `mesh['a'=2,'b'=2] {'b'}`. A permutation lists pairs.

    Raises:
        InputError: another notation, as a compiler to come may have it.
    """
    if found := re.search(r"(?:replica_groups|source_target_pairs)=\{\{(.*?)\}\}", attributes):
        return np.array([[int(n) for n in group.split(",")] for group in found[1].split("},{")])
    if found := re.search(rf"replica_groups=\[([\d,]+)\]<=({IOTA})", attributes):
        return _iota(found[2]).reshape([int(n) for n in found[1].split(",")])
    if found := MESH_GROUPS.search(attributes):
        return _groups_of_mesh(*found.groups())
    written = re.search(r"(?:replica_groups|source_target_pairs)=.*", attributes)
    raise InputError(
        "expected the groups of an exchange as {{0,1},{2,3}}, as [2,2]<=[4] or as mesh['a'=2,'b'=2] {'b'}, but the "
        f"compiler of jax {jax.__version__} wrote {shown(written[0] if written else attributes)}. "
        "Install an older jax, such as 0.10.2, or a newer flax-transformer."
    )


def _groups_of_mesh(axes: str, device_ids: str | None, chosen: str) -> np.ndarray:
    """Returns the groups of `mesh['a'=2,'b'=8], device_ids=([8,2]T(1,0)) {'a','b':(2)2}`, from its three parts.

    Here 'b':(2)2 is a part of the axis 'b': its devices are [2, 2, 2], and the group goes along the second of these.
    """
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes)}
    parts = [
        (name, int(before or 1), int(size or sizes[name]))
        for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", chosen)
    ]
    cuts = {name: {1, size} for name, size in sizes.items()}
    for name, before, size in parts:
        cuts[name] |= {before, before * size}
    factors = [  # name of the axis, product of the factors before it, size
        (name, before, end // before) for name in sizes for before, end in itertools.pairwise(sorted(cuts[name]))
    ]
    grouped = [factors.index(part) for part in parts if part[2] > 1]  # an axis of size 1 has no factor
    order = [n for n in range(len(factors)) if n not in grouped] + grouped
    if device_ids is None:
        devices = np.arange(math.prod(sizes.values()))
    else:
        devices = _iota(device_ids) if "[" in device_ids else np.array([int(n) for n in device_ids.split(",")])
    width = math.prod(size for *_, size in parts)
    return devices.reshape([size for *_, size in factors]).transpose(order).reshape(-1, width)


def _iota(text: str) -> np.ndarray:
    """Returns the flat numbers of `[4,2]T(1,0)`: an iota of that shape, transposed."""
    shape, *axes = ([int(n) for n in part.split(",")] for part in re.findall(r"\d[\d,]*", text))
    numbers = np.arange(math.prod(shape)).reshape(shape)
    return (numbers.transpose(axes[0]) if axes else numbers).ravel()


def axes_of_groups(groups: np.ndarray, mesh: Mesh) -> tuple[str, ...]:
    """Returns the axes of a mesh along which the devices of the groups differ."""
    places = np.stack(np.unravel_index(groups, mesh.devices.shape), axis=-1)  # [groups, devices, axes]
    differs = (places != places[:, :1]).any(axis=(0, 1))
    return tuple(name for name, differ in zip(mesh.axis_names, differs, strict=True) if differ)


def bandwidth(groups: np.ndarray, devices: Sequence[Any], topology: str) -> float | None:
    """Returns the bytes that a device of a group receives in a second, or None for hardware without known links.

    `devices` are those of the mesh, in order. A group of TPUs uses all axes of the torus along which its chips lie.
    GPUs of several hosts use the network.
    """
    name = topology.partition(":")[0]
    if name not in LINKS:
        return None
    link = LINKS[name]
    if name in TPU_MEMORY_GIB:
        places = np.array([devices[n].coords for n in groups[0]])
        return link.near * max(1, int((places != places[0]).any(axis=0).sum()))
    hosts = {devices[n].process_index for n in groups[0]}
    return link.near if len(hosts) == 1 else link.far


# --- The exchanges of a program


def computation_runs(
    text: str, unknown_turns: int = 1, loop: str | None = None
) -> tuple[dict[str, Computation], dict[str, int]]:
    """Returns the computations of a program, and how often each runs: in all, or in one turn of the loop `loop`."""
    computations, entry = parse(text)
    runs: dict[str, int] = defaultdict(int)

    def visit(name: str, times: int) -> None:
        runs[name] += times
        for line in computations[name].lines.values():
            turns = loop_turns(computations, line, unknown_turns) if line.opcode == "while" else 1
            for called in _called(computations, line):
                visit(called, times * turns)

    if loop is None:
        visit(entry, 1)
    else:
        line = next(each.lines[loop] for each in computations.values() if loop in each.lines)
        for called in _called(computations, line):
            visit(called, 1)
    return computations, dict(runs)


def _called(computations: dict[str, Computation], line: Line) -> list[str]:
    return [name for name in re.findall(r"%([\w.\-]+)", line.attributes) if name in computations]


def read_exchanges(
    text: str, mesh: Mesh, topology: str, unknown_turns: int = 1, loop: str | None = None
) -> list[Exchange]:
    """Returns the exchanges of a program, those with the most bytes first.

    libtpu overlaps an exchange with arithmetic, and then writes it into several fused computations, which share its
    channel. Such an exchange counts once.

    Args:
        text: the program as `compiled.as_text()` returns it.
        mesh: the mesh that it is compiled for.
        topology: name of the hardware, such as "v5e:4x4".
        unknown_turns: turns of a loop whose number the compiler does not know.
        loop: name of a loop, of which one turn is read; None reads the whole program.

    Raises:
        InputError: the compiler writes groups in an unknown notation.
    """
    computations, runs = computation_runs(text, unknown_turns, loop)
    by_channel: dict[str, tuple[str, Line, Computation, int]] = {}
    for name, computation in computations.items():
        for line in computation.lines.values():
            kind = line.opcode.removesuffix("-start")
            if kind in COLLECTIVES and runs.get(name):
                channel = re.search(r"channel_id=(\d+)", line.attributes)
                key = channel[1] if channel else f"{name} {line.name}"
                by_channel.setdefault(key, (kind, line, computation, runs[name]))
    sums: dict[tuple[str, tuple[str, ...]], list[float]] = defaultdict(lambda: [0, 0.0, 0.0])
    for kind, line, computation, times in by_channel.values():
        if kind == "all-reduce" and computation.root.opcode == "dynamic-slice":
            kind = "reduce-scatter"  # libtpu writes it so
        groups = replica_groups(line.attributes)
        size = groups.shape[1]
        share = 1.0 if kind == "collective-permute" else (size - 1) / size
        received = PASSES.get(kind, 1.0) * share * whole_bytes(kind, line, computation)
        speed = bandwidth(groups, list(mesh.devices.flat), topology)
        total = sums[kind, axes_of_groups(groups, mesh)]
        total[0] += times
        total[1] += times * received
        total[2] += times * received / speed if speed else 0.0
    found = [Exchange(kind, axes, int(n), size, seconds) for (kind, axes), (n, size, seconds) in sums.items()]
    return sorted(found, key=lambda exchange: (-exchange.bytes, exchange.kind, exchange.axes))


def whole_bytes(kind: str, line: Line, computation: Computation) -> int:
    """Returns the bytes of the arrays of a collective: of the gathered or summed whole, or of what a device sends."""
    operands = [computation.lines[name].result for name in line.operands]
    own = sum(map(_all_bytes, operands))
    if kind == "all-gather":  # the result of a start is a tuple of operands and results
        return max(_all_bytes(line.result) - (own if line.opcode.endswith("-start") else 0), own)
    return own


def _all_bytes(result: str) -> int:
    """Returns the bytes of a type, in any memory of the device, without the padding of tiles."""
    return sum(BYTES[array.kind] * math.prod(array.shape) for array in all_arrays(result))
