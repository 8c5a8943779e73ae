"""The checkpoint of a run, which lets it go on after an interruption as if there had been none."""

import signal
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from types import FrameType
from typing import Any, Protocol
from zipfile import BadZipFile, ZipFile

import torch

from .errors import InterruptedRunError, UserError
from .files import write_file

CHECKPOINT = "checkpoint.pt"
_FORMAT = 2


class Options(Protocol):
    """Of a run."""

    @property
    def steps(self) -> int: ...

    @property
    def checkpoint_every(self) -> int: ...


class Resumable(Protocol):
    """A run that is a pure function of its state."""

    @property
    def options(self) -> Options: ...

    @property
    def done(self) -> int: ...

    def state(self) -> dict[str, Any]: ...

    def load_state(self, state: dict[str, Any], source: object) -> None: ...


class RunFolder:
    """Saves a trainer every `checkpoint_every` steps, at the end, and where the user stops it.

    identity: everything that the losses depend on; a checkpoint with another one is refused.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        self.file, self.identity = folder / CHECKPOINT, identity
        self._stop = False

    def resume(self, trainer: Resumable) -> bool:
        """Go on from the checkpoint, if there is one.

        Raises UserError: it is corrupt, or of a run with other arguments.
        """
        if not self.file.exists():
            return False
        state = _read(self.file)
        theirs = state["identity"]
        differ = [
            f"{name} was {theirs.get(name)}, is {self.identity.get(name)}"
            for name in sorted(theirs.keys() | self.identity.keys())
            if theirs.get(name) != self.identity.get(name)
        ]
        if differ:
            raise UserError(
                f"{self.file.parent} holds another run ({'; '.join(differ)}): "
                "--restart starts over there, --out keeps it and runs elsewhere"
            )
        trainer.load_state(state, self.file)
        return True

    def after_step(self, trainer: Resumable) -> None:
        """For Trainer.run."""
        every, done, last = trainer.options.checkpoint_every, trainer.done, trainer.options.steps
        if done % every == 0 or done == last or self._stop:
            state = {"format": _FORMAT, "identity": self.identity} | trainer.state()
            write_file(self.file, lambda partial: torch.save(state, partial))
        if self._stop and done < last:
            raise InterruptedRunError(
                f"stopped after step {done} of {last}, saved in {self.file}; the same command goes on"
            )

    @contextmanager
    def stopping_cleanly(self) -> Iterator[None]:
        """The first Ctrl-C (or SIGTERM) ends the run after its current step, the second one at once."""

        def stop(number: int, frame: FrameType | None) -> None:
            self._stop = True
            signal.signal(signal.SIGINT, signal.default_int_handler)

        previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def _read(file: Path) -> dict[str, Any]:
    try:
        with ZipFile(file) as archive:
            damaged = archive.testzip()  # torch.load does not look at the checksums
        if damaged is not None:
            raise BadZipFile(f"wrong checksum of {damaged}")
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (BadZipFile, RuntimeError, UnpicklingError, zlib.error) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{file} is corrupt or truncated ({reason}); --restart starts over") from error
    if not isinstance(state, dict) or state.get("format") != _FORMAT:
        raise UserError(f"{file} is not a checkpoint of this version of peft-ops; --restart starts over")
    return state
