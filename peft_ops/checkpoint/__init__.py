"""Reading and writing other projects' formats."""

from .adapter import load_adapter as load_adapter
from .adapter import save_adapter as save_adapter
