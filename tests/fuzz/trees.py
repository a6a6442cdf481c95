"""Mutations of JSON documents: of their values, of their text, and of their spelling alone."""

from __future__ import annotations

import copy
import json
import random
import re
from collections.abc import Callable
from typing import Any

Tree = Any
Note = Callable[[str], None]

NUMBERS = (
    *(0, 1, -1, 2, 7, 2**31, 2**53, 2**53 + 1, 2**63 - 1, 2**63, -(2**63), 2**64, 10**30, 10**400),
    *(0.5, -0.0, 1.5, 1e-320, 1e-9, 3.5e38, 1e308, float("inf"), float("-inf"), float("nan")),
)
TEXTS = (
    *(
        "",
        " ",
        "0",
        "1",
        "-1",
        "7",
        " 7 ",
        "1.5",
        "1e3",
        "0x10",
        "1_000",
        "١٢",
        "NaN",
        "inf",
        "true",
        "false",
        "None",
    ),
    *(
        "no",
        "\ud800",
        "\0",
        "a\nb",
        "a" * 5000,
        "é",
        "e\u0301",
        "../x",
        "/",
        "C:\\x.jpg",
        "https://host/x.jpg?a=1",
    ),
)
OTHERS: tuple[Tree, ...] = (None, True, False, [], {}, [[]], [1], [None], {"a": 1}, [[[[[[1]]]]]])


def mutate_values(tree: Tree, rng: random.Random, note: Note, times: int = 1) -> Tree:
    """A copy with some values replaced, respelt, removed, repeated, renamed, exchanged or
    nested.
    """
    root = [copy.deepcopy(tree)]  # so that the whole document, too, has a place
    for _ in range(times):
        container, key, path = _any_place(root, rng)
        mutation = rng.choice(_MUTATIONS)
        before = _short(container[key])
        mutation(root, container, key, rng)
        now = _short(container[key]) if _has(container, key) else "nothing"
        note(f"{mutation.__name__.strip('_')} at {path or 'the root'}: {before} -> {now}")
    return root[0]


def respell(tree: Tree, rng: random.Random) -> Tree:
    """A copy that says the same in other types: numbers as text, whole floats, 0 and 1 for
    booleans, keys reordered.
    """
    style = rng.choice(("text", "float", "mixed", "order"))

    def one(value: Tree) -> Tree:
        if isinstance(value, dict):
            items = [(key, one(item)) for key, item in value.items()]
            rng.shuffle(items)
            return dict(items)
        if isinstance(value, list):
            return [one(item) for item in value]
        if style == "order" or (style == "mixed" and rng.random() < 0.7):
            return value
        if isinstance(value, bool):
            return rng.choice((value, int(value), str(int(value)), str(value).lower()))
        if isinstance(value, int):
            return float(value) if style == "float" and value == float(value) else str(value)
        if isinstance(value, float):
            return int(value) if value == int(value) else str(value)
        return value

    return one(tree)


def encode(tree: Tree, rng: random.Random, note: Note, damage: bool) -> bytes:
    """The document as a file; with `damage` its text is changed as well."""
    text = json.dumps(tree, ensure_ascii=rng.random() < 0.5, indent=rng.choice((None, None, 1)))
    if damage:
        mutation = rng.choice(_TEXT_MUTATIONS)
        note(mutation.__name__.strip("_"))
        text = mutation(text, rng)
    encoding = "utf-8"
    if rng.random() < (0.2 if damage else 0.05):
        encoding = rng.choice(("utf-8-sig", "utf-16", "utf-16-le", "utf-32", "latin-1", "cp1252"))
        note(f"saved as {encoding}")
    content = text.encode(
        encoding, errors="surrogatepass" if encoding.startswith("utf") else "replace"
    )
    if damage and rng.random() < 0.3:
        note("bytes changed")
        content = mutate_bytes(content, rng)
    return content


def mutate_bytes(content: bytes, rng: random.Random, head: int = 0) -> bytes:
    """Bits flipped, a part cut, repeated or made of other bytes; half of all changes are in the
    first `head` bytes.
    """
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        if not data:
            break
        limit = head if head and rng.random() < 0.5 else len(data)
        at = rng.randrange(max(min(limit, len(data)), 1))
        length = rng.choice((1, 2, 4, 8, 100))
        choice = rng.randrange(6)
        if choice <= 1:
            data[at] ^= 1 << rng.randrange(8)
        elif choice == 2:
            number = rng.choice((0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF))
            data[at : at + 4] = number.to_bytes(4, rng.choice(("little", "big")))
        elif choice == 3:
            data[at:at] = data[at : at + length]
        elif choice == 4:
            del data[at : at + length]
        else:
            data[at : at + length] = rng.randbytes(length)
    return bytes(data)


def numbers_of(text: str) -> list[tuple[int, int]]:
    """Where the number literals of a JSON text begin and end."""
    return [match.span() for match in re.finditer(r"-?\d+(\.\d+)?([eE][-+]?\d+)?", text)]


def strange_value(rng: random.Random) -> Tree:
    return copy.deepcopy(rng.choice(rng.choice((NUMBERS, TEXTS, OTHERS))))


def for_yaml(tree: Tree) -> Tree:
    """PyYAML can write neither surrogates nor numbers of thousands of digits."""
    if isinstance(tree, dict):
        return {for_yaml(key): for_yaml(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [for_yaml(value) for value in tree]
    if isinstance(tree, str):
        return tree.encode("utf-8", "replace").decode()
    return 0 if isinstance(tree, int) and abs(tree) > 10**100 else tree


def _any_place(root: list[Tree], rng: random.Random) -> tuple[Any, Any, str]:
    """A container, a key of it and the way to it. Goes down at random: small lists are met as often
    as large.
    """
    container, key, path = root, 0, ""
    while isinstance(container[key], (dict, list)) and container[key] and rng.random() < 0.9:
        container = container[key]
        key = (
            rng.choice(list(container))
            if isinstance(container, dict)
            else rng.randrange(len(container))
        )
        path += f"[{key!r}]"
    return container, key, path


def _replace(root: list[Tree], container: Any, key: Any, rng: random.Random) -> None:
    container[key] = strange_value(rng)


def _change_number(root: list[Tree], container: Any, key: Any, rng: random.Random) -> None:
    value = container[key]
    if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300:
        changes: tuple[Callable[[], Tree], ...] = (
            lambda: -value,
            lambda: value + 0.5,
            lambda: value * 10**6,
            lambda: value + 1,
            lambda: value / 1000,
        )
        container[key] = rng.choice(changes)()
    else:
        container[key] = rng.choice(NUMBERS)


def _change_type(root: list[Tree], container: Any, key: Any, rng: random.Random) -> None:
    value = container[key]
    changes: tuple[Callable[[], Tree], ...] = (
        lambda: str(value),
        lambda: [value],
        lambda: {"value": value},
        lambda: json.dumps(value),
        lambda: float(value) if isinstance(value, int) and abs(value) < 1e300 else value,
        lambda: list(value.values()) if isinstance(value, dict) else value,
        lambda: dict(enumerate(value)) if isinstance(value, list) else value,
    )
    container[key] = rng.choice(changes)()


def _remove(root: list[Tree], container: Any, key: Any, rng: random.Random) -> None:
    if container is root:
        container[key] = None
    else:
        del container[key]


def _repeat(root: list[Tree], container: Any, key: Any, rng: random.Random) -> None:
    if isinstance(container, list) and container is not root:
        container.insert(rng.randrange(len(container) + 1), copy.deepcopy(container[key]))
    elif isinstance(container[key], list):
        container[key] *= 2


def _rename(root: list[Tree], container: Any, key: Any, rng: random.Random) -> None:
    if isinstance(container, dict):
        new = rng.choice((str(key).upper(), f"{key} ", f"{key}s", "id", "bbox", "image_id", "name"))
        container[new] = container.pop(key)


def _exchange(root: list[Tree], container: Any, key: Any, rng: random.Random) -> None:
    other, other_key, _ = _any_place(root, rng)
    if other is not root and container is not root:
        container[key], other[other_key] = (
            copy.deepcopy(other[other_key]),
            copy.deepcopy(container[key]),
        )


def _copy_sibling(root: list[Tree], container: Any, key: Any, rng: random.Random) -> None:
    """Two entries of a list get one value for a key: one id, one file name, one category."""
    other, other_key, _ = _any_place(root, rng)
    if (
        container is not root
        and other is not root
        and type(container[key]) is type(other[other_key])
    ):
        container[key] = copy.deepcopy(other[other_key])


_MUTATIONS = (
    _replace,
    _replace,
    _change_number,
    _change_type,
    _remove,
    _repeat,
    _rename,
    _exchange,
    _copy_sibling,
)


def _cut(text: str, rng: random.Random) -> str:
    return text[: rng.randrange(len(text) + 1)]


def _double_key(text: str, rng: random.Random) -> str:
    """An object names a key twice, with another value."""
    keys = list(re.finditer(r'"(\w+)": ([-\d.]+)', text))
    if not keys:
        return text
    match = rng.choice(keys)
    value = rng.choice(("0", "1", "99", "null"))
    return f'{text[: match.start()]}"{match[1]}": {value}, {text[match.start() :]}'


def _number_literal(text: str, rng: random.Random) -> str:
    spans = numbers_of(text)
    if not spans:
        return text
    start, stop = rng.choice(spans)
    literals = (
        "1e999",
        "-1e999",
        "NaN",
        "Infinity",
        "-Infinity",
        "-0",
        "1E5",
        "00",
        "+1",
        "1.",
        ".5",
        "9" * 5000,
    )
    return text[:start] + rng.choice(literals) + text[stop:]


def _nest(text: str, rng: random.Random) -> str:
    depth = rng.choice((50, 2000, 100_000))
    start, stop = rng.choice(numbers_of(text) or [(0, 0)])
    return text[:start] + "[" * depth + text[start:stop] + "]" * depth + text[stop:]


def _append(text: str, rng: random.Random) -> str:
    return text + rng.choice(("\n", "\0", text, "}", "\n[]", " // end", "\x1a"))


def _swap_quotes(text: str, rng: random.Random) -> str:
    return text.replace('"', "'")


def _trailing_comma(text: str, rng: random.Random) -> str:
    return text.replace("}", ",}", 1)


_TEXT_MUTATIONS = (
    _cut,
    _double_key,
    _number_literal,
    _number_literal,
    _nest,
    _append,
    _swap_quotes,
    _trailing_comma,
)


def _has(container: Any, key: Any) -> bool:
    return key in container if isinstance(container, dict) else 0 <= key < len(container)


def _short(value: Tree) -> str:
    text = (
        ascii(value)
        if not isinstance(value, int) or abs(value) < 10**50
        else "a number of many digits"
    )
    return text if len(text) <= 60 else f"{text[:57]}..."
