"""The native CPU library and its launchers. Importing it raises ImportError where the library is not built."""

from . import nf4 as nf4
from . import nf4_linear as nf4_linear
