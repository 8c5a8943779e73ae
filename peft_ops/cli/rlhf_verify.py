"""A reward that can be checked: how much of a completion is Python that parses where it stands. Nothing is executed."""

import ast
import warnings

LENGTH_FLOOR = 20  # bytes: a shorter completion is scored as if it had so many


def verified_share(prompt: str, completion: str) -> float:
    """How much of a completion is Python where it stands, 0 to 1: the mean of `reach` and of `stated`, per byte.

    The first grades what is nearly right, the second can only be had for whole statements. Both are over the bytes of
    the completion, or LENGTH_FLOOR where it has fewer, so the empty completion has reward 0.
    """
    size = max(LENGTH_FLOOR, len(completion.encode()))
    return (reach(prompt, completion) + stated(prompt, completion)) / (2 * size)


def reach(prompt: str, completion: str) -> int:
    """Bytes of the completion before the first syntax error after the prompt, without blank lines and comments."""
    end = _first_error(f"{prompt}{completion}")
    before = completion if end is None else completion[: max(0, end - len(prompt))]
    lines = (line for line in before.splitlines(keepends=True) if line.strip() and not line.strip().startswith("#"))
    return sum(len(line.encode()) for line in lines)


def stated(prompt: str, completion: str) -> int:
    """Bytes of the completion in lines that count.

    Lines are taken one after another. One counts if it is whole (ends with a line break) and parses as what follows the
    prompt and the lines that counted before it, `pass` standing in for the body that a line ending in a colon opens.
    What parses without saying anything does not count: blank lines and comments, expressions without a call in them (a
    lone name, a docstring), `pass` and its like, and a line that is there already. Nor does a statement over several
    lines.
    """
    kept, counted = prompt, 0
    seen = {line.strip() for line in prompt.splitlines()}
    *lines, _ = completion.split("\n")
    for line in lines:
        if line.strip() in seen or not _says_something(line) or not parses(f"{kept}{line}\n"):
            continue
        kept += f"{line}\n"
        seen.add(line.strip())
        counted += len(line.encode()) + 1
    return counted


def parses(text: str) -> bool:
    """Whether the text is Python up to where it stops: the last block may lack its body."""
    text = text.rstrip("\n")
    return _first_error(f"{text} pass" if text.endswith(":") else text) is None


def _first_error(text: str) -> int | None:
    """The character at which the parser gives up; None where it does not."""
    try:
        with warnings.catch_warnings():  # of escapes and of `is` with a literal
            warnings.simplefilter("ignore")
            ast.parse(text)
    except SyntaxError as error:
        lines = text.splitlines(keepends=True)[: max(0, (error.lineno or 1) - 1)]
        return min(len(text), sum(map(len, lines)) + max(0, (error.offset or 1) - 1))
    except (ValueError, RecursionError, MemoryError):  # a null character, deep nesting
        return 0
    return None


def _says_something(line: str) -> bool:
    """Not a comment, nor a statement that does nothing; the header of a block does something."""
    code = line.strip()
    if not code or code.startswith("#"):
        return False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            body = ast.parse(code).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return True  # a header, `else:` or an error: the whole decides
    return any(not _is_idle(node) for node in body)


def _is_idle(node: ast.stmt) -> bool:
    if isinstance(node, ast.Expr):
        return not any(isinstance(part, (ast.Call, ast.Await, ast.Yield, ast.YieldFrom)) for part in ast.walk(node))
    return isinstance(node, (ast.Pass, ast.Break, ast.Continue))
