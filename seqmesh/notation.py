"""Masks as text, for command lines: the calls that a program would write, read without running anything.

    causal(64)
    documents([30, 3, 17]) & sliding_window(50, window=7)
    Mask(40, 40, [Band(0, 40, 0, 40, lo=-6, hi=-1)])

A text is parsed as Python and then walked: the families of `seqmesh.masks`, `Mask` and `Band`, whole numbers,
True, False, None, lists, and `&`. Anything else is refused, so a text from a stranger can do nothing. What
`repr` prints of a mask is such a text too.
"""

import ast
import inspect
from collections.abc import Callable, Iterator
from typing import Any

from seqmesh import masks
from seqmesh.masks import Band, Mask

LONGEST = 20_000
"""Characters of a text: documents of a few thousand lengths."""


def families() -> dict[str, Callable[..., Mask]]:
    """The functions of `seqmesh.masks` that make a mask, by name."""
    found: dict[str, Callable[..., Mask]] = {}
    for name, function in vars(masks).items():
        is_public = inspect.isfunction(function) and not name.startswith("_")
        # The class, or its name where annotations are kept as text.
        if is_public and function.__annotations__.get("return") in (Mask, "Mask"):
            found[name] = function
    return found


def mask_of(text: str) -> Mask:
    """The mask that a text spells out.

    Raises:
        ValueError: what in the text is no mask, or what the family itself refuses.
    """
    made = _value(_tree(text), text)
    if not isinstance(made, Mask):
        raise ValueError(f"{_quoted(text)} is a {type(made).__name__}, not a mask; {_remedy()}")
    return made


def family_of(text: str) -> str:
    """What a mask text is called in a table: its families without their numbers, joined by `&`.

    Raises:
        ValueError: the text is no expression.
    """
    return " & ".join(_outer_names(_tree(text)))


def _outer_names(tree: ast.expr) -> Iterator[str]:
    if isinstance(tree, ast.BinOp):
        yield from _outer_names(tree.left)
        yield from _outer_names(tree.right)
    elif isinstance(tree, ast.Call):
        yield ast.unparse(tree.func)


def _tree(text: str) -> ast.expr:
    if len(text) > LONGEST:
        raise ValueError(f"a mask of {len(text):,} characters; use {LONGEST:,} at most, or Python")
    try:
        return ast.parse(text.strip(), mode="eval").body
    # Deep nesting ends in one of the last two, whatever the interpreter.
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ValueError(f"{_quoted(text)} cannot be read as a mask; {_remedy()}") from None


def _value(tree: ast.expr, text: str) -> Any:
    """What a part of the text stands for."""
    match tree:
        case ast.Constant(value=None | bool() | int() as number):
            return number
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() as number)):
            return -number
        case ast.List(elts=parts) | ast.Tuple(elts=parts):
            return tuple(_value(part, text) for part in parts)
        case ast.BinOp(left=left, op=ast.BitAnd(), right=right):
            return _both(_value(left, text), _value(right, text), text)
        case ast.Call(func=ast.Name(id=name)):
            return _called(name, tree, text)
    raise ValueError(f"{_quoted(ast.unparse(tree))} has no place in a mask; {_remedy()}")


def _both(left: Any, right: Any, text: str) -> Mask:
    if not isinstance(left, Mask) or not isinstance(right, Mask):
        raise ValueError(f"{_quoted(text)} joins what is no mask by &; {_remedy()}")
    return left & right


def _called(name: str, call: ast.Call, text: str) -> Any:
    known: dict[str, Callable[..., Any]] = {**families(), "Mask": Mask, "Band": Band}
    if name not in known:
        raise ValueError(f"{name!r} is no family of masks; {_remedy()}")
    positional = [_value(argument, text) for argument in call.args]
    named: dict[str, Any] = {}
    for keyword in call.keywords:
        if keyword.arg is None:
            raise ValueError(f"{_quoted(ast.unparse(call))} unpacks with **; write the arguments out")
        named[keyword.arg] = _value(keyword.value, text)
    try:
        inspect.signature(known[name]).bind(*positional, **named)
        return known[name](*positional, **named)
    except (TypeError, AttributeError) as error:
        takes = f"{name}{inspect.signature(known[name])}"
        raise ValueError(f"{_quoted(ast.unparse(call))}: {error}; the family is {takes}") from None


def _quoted(text: str) -> str:
    short = text if len(text) <= 60 else f"{text[:57]}..."
    return repr(short)


def _remedy() -> str:
    return (
        f"write a family ({', '.join(sorted(families()))}) with whole numbers and lists of them,"
        " such as 'documents([700, 300]) & sliding_window(1000, 256)'"
    )
