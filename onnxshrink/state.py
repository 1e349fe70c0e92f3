"""What ``--resume`` needs: the model a run accepted last, and the steps before it.

Its tests are those of the manager, ``tests/test_manager.py``, and of lineage.

Tested in tests/test_manager.py.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnxshrink._version import __version__
from onnxshrink.errors import Cancelled, OnnxshrinkError, OutputError, UsageError
from onnxshrink.files import followed, is_alive, write_text
from onnxshrink.measuring.measure import Stats
from onnxshrink.reporting.report import Step

__all__ = ["SavedRun", "StateFolder", "Workspace", "abandon", "digest"]

_LARGEST = 1 << 28
_NO_STATE = (
    AttributeError,
    IndexError,
    KeyError,
    OSError,
    OverflowError,
    RecursionError,
    TypeError,
    ValueError,
)
"""What reading something else than a state raises."""
_FORMAT = 4
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
            "sha256": self._digest(saved.model),
            "lineage": saved.lineage,
            "baseline": self._name(saved.baseline),
            "stats": saved.stats.to_json(),
            "steps": [step.to_json() for step in saved.steps],
        }
        write_text(self._file, json.dumps(state), what="cannot keep the run in")
        for folder in self.folder.glob("step-*"):
            shutil.rmtree(folder, ignore_errors=True)

    def read(self, steps: int) -> SavedRun | None:
        """Return where to go on, or ``None`` where no run was interrupted.

        Args:
            steps: How many steps the run has.

        Raises:
            UsageError: Another run was interrupted, or its state cannot be read.
        """
        if not self._file.exists():
            return None
        try:
            if self._file.stat().st_size > _LARGEST:
                raise ValueError("it is too large")
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
            step, model = state["next"], self._path(state["path"])
            if type(step) is not int or not 0 <= step <= steps:
                raise ValueError(f"it goes on at step {step!r}")
            if self._digest(model) != state["sha256"]:
                raise ValueError("its model was changed")
            return SavedRun(
                step=step,
                model=model,
                lineage=state["lineage"],
                baseline=self._path(state["baseline"]),
                stats=Stats.from_json(state["stats"]),
                steps=[Step.from_json(step) for step in state["steps"]],
            )
        except _NO_STATE as error:
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
        if name is None:
            return None
        text: object = name
        if not isinstance(text, str) or Path(name).name != name or "\0" in name:
            raise ValueError("it names a file elsewhere")
        return self.folder / name

    def _digest(self, path: Path | None) -> str | None:
        """Return the digest of a model here; one elsewhere is part of the run."""
        is_here = path is not None and path.parent == self.folder
        return digest(path) if path is not None and is_here else None


class Workspace:
    """A private folder beside the output, which one run at a time holds.

    It outlives an interrupted run that can be continued, and nothing else. A run that
    was killed leaves it behind; the next one with this output takes it over.
    """

    def __init__(self, target: Path, *, resume: bool) -> None:
        """Name it.

        Args:
            target: The output; its folder exists.
            resume: Whether what an interrupted run left is kept.
        """
        place = followed(target)
        self.target, self._resume = target, resume
        self.folder = place.with_name(f".{place.name[:200]}.onnxshrink")
        self._lock = -1

    def __enter__(self) -> Path:
        """Take the folder.

        Raises:
            OutputError: Another run holds it, it cannot be made, or it is not ours.
        """
        try:
            self._take()
        except OSError as error:
            self._let_go()
            raise OutputError(
                f"cannot write {self.folder}: {error.strerror or error}"
            ) from error
        except BaseException:
            self._let_go()
            raise
        _HELD.add(self)
        return self.folder

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: object
    ) -> None:
        """Delete the folder, unless the run can be continued."""
        _HELD.discard(self)
        if kind is None or self._is_over(error):
            self.remove()
        self._let_go()

    def _is_over(self, error: BaseException | None) -> bool:
        if isinstance(error, Cancelled) or not isinstance(error, OnnxshrinkError):
            return not self.can_be_continued
        # The same run would end the same way; but a request that does not fit an
        # interrupted run must not cost that run its state.
        return not (self._resume and isinstance(error, UsageError))

    @property
    def can_be_continued(self) -> bool:
        """Whether a pass was accepted, or one keeps a part of its work."""
        with suppress(OSError, ValueError, TypeError, KeyError, RecursionError):
            state = json.loads((self.folder / "state.json").read_text())
            kept = any(p.is_file() for p in self.folder.glob("step-*/**/*"))
            return bool(state["next"] > 0 or kept)
        return False

    def remove(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _take(self) -> None:
        for _ in range(100):
            with suppress(FileExistsError):
                self.folder.mkdir(mode=0o700)
            self._check()
            if self._locked():
                break
        else:
            raise OutputError(f"cannot take {self.folder}: it comes and goes")
        if self._resume:
            self._check_inside()
            return
        for entry in self.folder.iterdir():
            if entry.name == _LOCK:
                continue
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()
        # No other run holds this output, so that these are of runs that were killed.
        for stale in self.folder.parent.glob(f"{glob.escape(self.folder.name)}-*"):
            if re.fullmatch(r"-[0-9a-f]{12}", stale.name[len(self.folder.name) :]):
                with suppress(OSError):
                    stale.unlink()

    def _check(self) -> None:
        """Refuse a folder that is a link, or of somebody else."""
        found = os.lstat(self.folder)
        if stat.S_ISLNK(found.st_mode):
            raise OutputError(
                f"{self.folder} is a link, and state is never kept through one; "
                "remove it"
            )
        if not stat.S_ISDIR(found.st_mode):
            raise OutputError(f"{self.folder} is no folder; remove it")
        if hasattr(os, "getuid"):
            if found.st_uid != os.getuid():
                raise OutputError(
                    f"{self.folder} belongs to another user; remove it, or choose "
                    "another output"
                )
            if self._resume and found.st_mode & 0o022:
                raise UsageError(
                    f"others may write to the state in {self.folder}, so that it is "
                    "not trusted; run without --resume"
                )
            os.chmod(self.folder, 0o700)

    def _check_inside(self) -> None:
        """Refuse state that leads elsewhere."""
        for where, folders, names in os.walk(self.folder):
            for name in (*folders, *names):
                mode = os.lstat(os.path.join(where, name)).st_mode
                if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                    raise UsageError(
                        f"the state in {self.folder} holds {name!r}, which is no file "
                        "of a run; run without --resume"
                    )

    def _locked(self) -> bool:
        """Take the lock; ``False``: the folder went away meanwhile."""
        path = self.folder / _LOCK
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
        try:
            handle = os.open(path, flags | getattr(os, "O_NONBLOCK", 0), 0o600)
        except FileNotFoundError:
            return False
        try:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise OutputError(f"{path} is no file of a run; remove it")
            holder = os.read(handle, 32).decode("ascii", "replace").strip()
            if not _flock(handle, holder):
                raise OutputError(
                    f"another run (process {holder or 'unknown'}) is writing "
                    f"{self.target}; wait for it, or choose another output"
                )
            try:
                if os.stat(path).st_ino != os.fstat(handle).st_ino:
                    raise FileNotFoundError
            except FileNotFoundError:
                os.close(handle)
                return False
            os.ftruncate(handle, 0)
            os.lseek(handle, 0, os.SEEK_SET)
            os.write(handle, f"{os.getpid()}\n".encode())
        except BaseException:
            with suppress(OSError):
                os.close(handle)
            raise
        self._lock = handle
        return True

    def _let_go(self) -> None:
        if self._lock >= 0:
            with suppress(OSError):
                os.close(self._lock)
            self._lock = -1


_LOCK = "lock"
_HELD: set[Workspace] = set()


def abandon() -> None:
    """Delete what runs of this process keep and nothing can continue."""
    for workspace in list(_HELD):
        if not workspace.can_be_continued:
            workspace.remove()


def _flock(handle: int, holder: str) -> bool:
    """Lock a file for this process, as long as it lives; whether that worked."""
    try:
        import fcntl
    except ImportError:  # Windows: the pid inside has to do
        return not (holder.isdigit() and int(holder) != os.getpid()) or not is_alive(
            int(holder)
        )
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return not (holder.isdigit() and is_alive(int(holder)))
    return True


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
