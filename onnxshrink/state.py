"""What ``--resume`` needs: the model a run accepted last, and the steps before it.

Its tests are those of the manager, ``tests/test_manager.py``, and of lineage.

Tested in tests/test_manager.py.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnxshrink._version import __version__
from onnxshrink.errors import UsageError
from onnxshrink.files import write_text
from onnxshrink.measuring.measure import Stats
from onnxshrink.reporting.report import Step

__all__ = ["SavedRun", "StateFolder", "digest"]

_FORMAT = 3
"""Changes when what is kept does; a state of another format is refused."""


@dataclass(frozen=True)
class SavedRun:
    """Where an interrupted run goes on.

    Attributes:
        step: Index of the step that comes next.
        model: File of the model accepted last; ``None`` is the model as it was given.
        lineage: What the values of that model were in the model as it was given, as
            ``Lineage.to_json`` says it.
        baseline: File of the model that outputs are compared with; ``None`` is the
            model as it was given.
        stats: Figures of the model accepted last.
        steps: What the steps so far came to.
    """

    step: int
    model: Path | None
    lineage: Mapping[str, Any]
    baseline: Path | None
    stats: Stats
    steps: Sequence[Step]


class StateFolder:
    """A folder beside the output that outlives an interrupted run."""

    def __init__(self, folder: Path, run: Mapping[str, Any]) -> None:
        """Use a folder.

        Args:
            folder: The folder, which exists; models that are named lie in it.
            run: What another run must share to continue this one; what JSON can hold.
        """
        self.folder = folder
        self._run = json.loads(json.dumps({"onnxshrink": __version__, **run}))

    @property
    def _file(self) -> Path:
        return self.folder / "state.json"

    def write(self, saved: SavedRun) -> None:
        """Note where to go on; what the step before kept for itself is deleted."""
        state = {
            "format": _FORMAT,
            "run": self._run,
            "next": saved.step,
            "path": self._name(saved.model),
            "lineage": saved.lineage,
            "baseline": self._name(saved.baseline),
            "stats": saved.stats.to_json(),
            "steps": [step.to_json() for step in saved.steps],
        }
        write_text(self._file, json.dumps(state), what="cannot keep the run in")
        for folder in self.folder.glob("step-*"):
            shutil.rmtree(folder, ignore_errors=True)

    def read(self) -> SavedRun | None:
        """Return where to go on, or ``None`` where no run was interrupted.

        Raises:
            UsageError: Another run was interrupted, or its state cannot be read.
        """
        if not self._file.exists():
            return None
        try:
            state = json.loads(self._file.read_text())
            if state.get("format") != _FORMAT:
                raise UsageError(
                    f"the state in {self.folder} was written by another version of "
                    "onnxshrink, which keeps other things; run without --resume"
                )
            if state["run"] != self._run:
                raise UsageError(
                    f"the interrupted run in {self.folder} was another one (other "
                    f"{self._differs(state['run'])}); run without --resume"
                )
            return SavedRun(
                step=int(state["next"]),
                model=self._path(state["path"]),
                lineage=state["lineage"],
                baseline=self._path(state["baseline"]),
                stats=Stats.from_json(state["stats"]),
                steps=[Step.from_json(step) for step in state["steps"]],
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise self.unreadable(error) from error

    def unreadable(self, error: Exception) -> UsageError:
        """Return the error for a state that does not fit together."""
        return UsageError(
            f"the state in {self.folder} cannot be read ({error}); run without --resume"
        )

    def _differs(self, other: Mapping[str, Any]) -> str:
        """Say what another run does not share with this one."""
        keys = [*self._run, *(key for key in other if key not in self._run)]
        names = [_WORDS.get(k, k) for k in keys if other.get(k) != self._run.get(k)]
        return " and ".join(dict.fromkeys(names))

    def _name(self, path: Path | None) -> str | None:
        return path.name if path is not None and path.parent == self.folder else None

    def _path(self, name: str | None) -> Path | None:
        return None if name is None else self.folder / Path(name).name


_WORDS = {
    "onnxshrink": "version of onnxshrink",
    "pipeline": "passes",
    "on_breach": "--on-breach",
}
"""What to call parts of a run that another run does not share."""


def digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            found.update(chunk)
    return found.hexdigest()
