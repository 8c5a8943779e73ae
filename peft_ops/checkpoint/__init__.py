"""Reading and writing other projects' formats."""

from .peft_format import load_adapter as load_adapter
from .peft_format import save_adapter as save_adapter
