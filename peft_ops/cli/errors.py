"""What the user can put right."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec


class UserError(Exception):
    """Printed as one line, without a traceback; the command exits with 2."""


class InterruptedRunError(Exception):
    """A run stopped by the user, its state saved; the message says how to go on. The command exits with 130."""


@contextmanager
def as_user_error(prefix: str = "") -> Iterator[None]:
    """Around calls that refuse what the user gave: their message is the user's."""
    try:
        yield
    except (TypeError, ValueError, OSError) as error:
        raise UserError(f"{prefix}{error}") from error


def require(*packages: str) -> None:
    """Raises UserError naming the packages that are not installed."""
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise UserError(f"this command needs {', '.join(missing)}: pip install 'peft-ops[cli]'")
