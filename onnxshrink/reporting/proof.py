"""What makes a report a proof: what was asked for, of which files, where and when.

Tested in tests/reporting/test_proof.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import onnx

from onnxshrink.terminal import size_text

__all__ = ["LayerSize", "Proof", "layer_sizes"]

_LARGEST = 1 << 30
"""Bytes of a model file that is read for the sizes of its layers."""
_PARTS = (
    "_codes",
    "_scale",
    "_shape",
    "_zero_point",
    "_quantized",
    "_indices",
    "_table",
)
"""What stands behind the name of a weight in the names of its parts."""


@dataclass(frozen=True)
class LayerSize:
    """Bytes of a weight in the file.

    Attributes:
        name: The weight.
        before: In the model as it came; 0 if it is new.
        after: In the file that was written; 0 if it is gone.
    """

    name: str
    before: int
    after: int


@dataclass(frozen=True)
class Proof:
    """Facts about a run that its figures do not say.

    Attributes:
        date: When it ended, UTC, ISO 8601.
        command: The command line, or the Python call in words.
        budget: The budget in force, also where nobody gave one.
        data: Sources, digests and sizes of the splits, as ``Splits.to_json``.
        processor: The processor of the machine.
        target: The processor that passes wrote for, in words.
        onnxruntime: Its version.
        sha256: Digests of the files that were read and written, by path.
        layers: Bytes of weights, the largest first.
    """

    date: str = ""
    command: str = ""
    budget: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    processor: str = ""
    target: str = ""
    onnxruntime: str = ""
    sha256: Mapping[str, str] = field(default_factory=dict)
    layers: tuple[LayerSize, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return values that JSON can hold."""
        return {
            **{name: getattr(self, name) for name in _TEXTS},
            "budget": dict(self.budget),
            "data": dict(self.data),
            "sha256": dict(self.sha256),
            "layers": [asdict(layer) for layer in self.layers],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Proof:
        """Return what ``to_json`` wrote; what is missing stays empty.

        Raises:
            AttributeError, KeyError, TypeError, ValueError: It is no such thing.
        """
        layers = tuple(
            LayerSize(str(e["name"]), int(e["before"]), int(e["after"]))
            for e in data.get("layers", ())
        )
        return cls(
            **{name: str(data.get(name, "")) for name in _TEXTS},
            budget=dict(data.get("budget", {})),
            data=dict(data.get("data", {})),
            sha256={str(k): str(v) for k, v in data.get("sha256", {}).items()},
            layers=layers,
        )

    def budget_text(self) -> str:
        """Return the budget in force in words, or nothing where none is known."""
        if not self.budget:
            return ""
        words = [
            form.format(self.budget[key])
            for key, form in _LIMITS.items()
            if self.budget.get(key) is not None
        ]
        if self.budget.get("max_bytes") is not None:
            words.append(f"at most {size_text(float(self.budget['max_bytes']))}")
        how = " (by default)" if self.budget.get("automatic") else ""
        return f"budget{how}: {', '.join(words) or 'no limit'}"

    def lines(self) -> list[str]:
        """Return the facts in words, a line each."""
        found = []
        for name, part in self.data.items():
            if isinstance(part, Mapping) and part.get("sha256"):
                found.append(
                    f"{name}: {part.get('samples', 0):,} samples of "
                    f"{part.get('source', '')}, sha256 {part['sha256']}"
                )
        found += [f"{path}: sha256 {digest}" for path, digest in self.sha256.items()]
        if self.target:
            found.append(self.target)
        for what, text in (
            ("processor", self.processor),
            ("onnxruntime", self.onnxruntime),
            ("command", self.command),
            ("date", self.date),
        ):
            found += [f"{what}: {text}"] if text else []
        return found


_TEXTS = ("date", "command", "processor", "target", "onnxruntime")
_LIMITS = {
    "max_drop": "metric at most {:g} worse",
    "min_agreement": "at least {:.4g} of the answers stay",
    "min_sqnr": "outputs at least {:g} dB above their change",
    "max_latency_ratio": "at most {:g} times the latency",
}


def layer_sizes(before: Mapping[str, int], path: Path) -> tuple[LayerSize, ...]:
    """Return how many bytes weights take, as they came and in a file.

    Args:
        before: Bytes of the weights as they came, by name.
        path: The ``.onnx`` that was written. Parts of an encoded weight count for the
            first value with a name of its own that is made of them.

    Returns:
        The largest first; empty where the file is no such file, or very large.
    """
    try:
        if path.suffix != ".onnx" or path.stat().st_size > _LARGEST:
            return ()
        graph = onnx.load(path, load_external_data=False).graph
    except (OSError, ValueError, RuntimeError):
        return ()
    except Exception as error:  # protobuf's own, of which there are several
        if type(error).__name__ != "DecodeError":
            raise
        return ()
    reads: dict[str, list[str]] = {}
    for node in graph.node:
        for name in node.input:
            reads.setdefault(name, []).extend(node.output)
    after: dict[str, int] = {}
    for tensor in graph.initializer:
        owner = _owner(tensor.name, reads, before)
        after[owner] = after.get(owner, 0) + _nbytes(tensor)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                owner = _owner(node.output[0], reads, before)
                after[owner] = after.get(owner, 0) + _nbytes(attribute.t)
    found = [
        LayerSize(name, before.get(name, 0), after.get(name, 0))
        for name in {**before, **after}
    ]
    return tuple(sorted(found, key=lambda one: (-max(one.before, one.after), one.name)))


def _nbytes(tensor: onnx.TensorProto) -> int:
    external = {entry.key: entry.value for entry in tensor.external_data}
    length = external.get("length", "0")
    return tensor.ByteSize() + (int(length) if length.isdigit() else 0)


def _owner(name: str, reads: Mapping[str, list[str]], known: Mapping[str, int]) -> str:
    seen = set()
    at = name
    while at.startswith("~") and at not in seen and reads.get(at):
        seen.add(at)
        at = reads[at][0]
    if at in known:
        return at
    for part in _PARTS:
        if at.endswith(part) and at[: -len(part)] in known:
            return at[: -len(part)]
    return at
