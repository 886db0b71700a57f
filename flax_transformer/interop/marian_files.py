"""The files of a MarianMT folder: settings in JSON, and tensors in safetensors or PyTorch files."""

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from flax_transformer.errors import ConfigError, InputError


def read_json(folder: Path, name: str) -> Any:
    """Returns the contents of a JSON file.

    Raises:
        InputError: the file is missing or is not JSON.
    """
    try:
        return json.loads((folder / name).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{folder / name} cannot be read: {error}. Is {folder} a MarianMT model's folder?") from error


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Returns the tensors of a safetensors file.

    The type of bfloat16 tensors comes from ml_dtypes, a dependency of JAX.

    Raises:
        InputError: the file is damaged, or a tensor has an unsupported type.
        ConfigError: the package safetensors is missing.
    """
    try:
        from safetensors import SafetensorError
        from safetensors.numpy import load_file
    except ImportError as error:
        raise ConfigError("reading a MarianMT model needs the package safetensors: pip install safetensors.") from error
    try:
        return load_file(path)
    except SafetensorError as error:
        raise InputError(f"{path} is damaged or not whole ({error}). Copy or download it again.") from error
    except (AttributeError, TypeError) as error:  # NumPy does not know the type
        raise InputError(
            f"{path} holds tensors of an unsupported type ({error}). Save the model in float32, float16 or bfloat16."
        ) from error


def read_pickled(path: Path) -> dict[str, np.ndarray]:
    """Returns the tensors of a PyTorch file. Code in the file is not run.

    Raises:
        InputError: the file is damaged, or contains more than tensors.
        ConfigError: PyTorch is missing.
    """
    try:
        import torch
    except ImportError as error:
        raise ConfigError(f"reading {path} needs PyTorch: pip install torch.") from error
    advice = "Copy or download it again, or take a model.safetensors of the same model."
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        reason = str(error).partition(". ")[0] or "it is empty"
        raise InputError(
            f"{path} cannot be read by weights-only loading ({reason}): it is damaged, or holds more than tensors. "
            f"{advice}"
        ) from error
    tensors = loaded if isinstance(loaded, dict) else {"the file": loaded}
    for name, value in tensors.items():
        if not isinstance(value, torch.Tensor):
            raise InputError(
                f"{path} must hold tensors by their names, and {name} is of type {type(value).__name__}. {advice}"
            )
    return {name: value.float().numpy() for name, value in tensors.items()}


def read_weights(folder: Path) -> dict[str, np.ndarray]:
    """Returns the parameters of a MarianMT folder, in float32.

    Raises:
        InputError: there is no file of weights, or it cannot be read.
        ConfigError: a package that reads the file is missing.
    """
    if (folder / "model.safetensors").is_file():
        weights = read_safetensors(folder / "model.safetensors")
    elif (folder / "pytorch_model.bin").is_file():
        weights = read_pickled(folder / "pytorch_model.bin")
    else:
        raise InputError(
            f"{folder} holds neither model.safetensors nor pytorch_model.bin; weights in several files are not read."
        )
    weights = {name: np.asarray(value, np.float32) for name, value in weights.items()}
    if "final_logits_bias" in weights:
        weights["final_logits_bias"] = weights["final_logits_bias"].reshape(-1)
    return weights
