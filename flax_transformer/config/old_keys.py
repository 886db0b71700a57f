"""Keys that have another name now.

A recipe with an old key is refused, with the new name. A run folder keeps its configuration as it was written, so its
old keys are translated.
"""

import contextlib
import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class OldKey:
    """What has become of a key.

    Attributes:
        new: the new key, with its section; None if there is none.
        values: new values by old ones, where values have changed.
        advice: a sentence for users of a key that is gone.
    """

    new: str | None
    values: Mapping[Any, Any] = field(default_factory=dict)
    advice: str = ""


OLD_KEYS: dict[str, OldKey] = {
    "tokenizer.training_pairs": OldKey("tokenizer.max_training_pairs"),
    "batching.form": OldKey("batching.packing", {"bucketed": False, "packed": True}),
    "batching.num_shapes": OldKey("batching.num_buckets"),
    "batching.micro_batches": OldKey("batching.gradient_accumulation_steps"),
    "optimizer.decaying": OldKey("optimizer.weight_decay_include"),
    "optimizer.constant": OldKey("optimizer.weight_decay_exclude"),
    "training.best_by": OldKey("training.best_metric"),
    "training.patience": OldKey("training.early_stopping_patience"),
    "decoding.stop": OldKey("decoding.stop", {"sure": "exact", "likely": "heuristic", "finished": "first_finished"}),
    "decoding.patience": OldKey(None, advice="A search waits for as many hypotheses as are asked for. Leave it out."),
    "decoding.force_end": OldKey("decoding.force_eos"),
    "decoding.ban_unknown": OldKey("decoding.suppress_unknown"),
    "decoding.banned_phrases": OldKey("decoding.suppress_sequences"),
    "decoding.banned_tokens": OldKey("decoding.suppress_tokens"),
    "decoding.batch_rows": OldKey("decoding.batch_size"),
}


def explain_old_key(key: str, value: Any) -> str:
    """Returns a message with the new name of an old key, or of an old value; "" for all other keys and values."""
    old = OLD_KEYS.get(key)
    is_old_value = old is not None and isinstance(value, str) and value in old.values
    if old is None or (old.new == key and not is_old_value):
        return ""
    if old.new is None:
        return f"'{key}' is gone. {old.advice}"
    if is_old_value:
        return f"'{key}: {value}' is '{old.new}: {str(old.values[value]).lower()}' now."
    return f"'{key}' is '{old.new}' now."


def with_new_keys(values: dict[str, Any]) -> dict[str, Any]:
    """Returns the configuration of a run folder with today's keys; a configuration without old keys stays the same."""
    found = copy.deepcopy(values)
    is_old = False
    for name, old in OLD_KEYS.items():
        section, key = name.split(".")
        fields = found.get(section)
        if not isinstance(fields, dict) or key not in fields:
            continue
        is_old |= old.new != name
        value = fields.pop(key)
        if old.new is not None:
            fields[old.new.split(".")[1]] = old.values.get(value, value) if isinstance(value, str) else value
    decoding = found.get("decoding")
    if is_old and isinstance(decoding, dict):  # these lengths counted the end tokens of source and output
        factor, offset = decoding.get("max_length_factor", 2.0), decoding.get("max_length_offset", 10)
        with contextlib.suppress(TypeError, ValueError, OverflowError):  # of values that `from_dict` will refuse
            decoding["max_length_offset"] = offset + math.ceil(factor) - 1
    return found
