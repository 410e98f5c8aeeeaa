"""Damage to files, the same for the same seed: bytes flipped, cut, doubled and spliced; in JSON and YAML values of other kinds,
keys dropped, renamed and moved, numbers out of all bounds, brackets a thousand deep."""

import copy
import json
import random
from typing import Any

VALUES = (
    None, True, False, 0, 1, 2, 3, -1, 7, 2**31, 2**63, 10**30, -(10**18), 0.0, 0.5, -0.5, 1e-300, 1e308, float("nan"), float("inf"),
    "", "x", "3", "null", "auto", "../../x", "a\nb", "\0", "\ud800", "\u2028", "\x1b[31m", "äöü", "x" * 5000, "9" * 5000, [], {},
    [[]], [1, 2], {"a": {}}, [None, "x", {}], {"": 0},
)  # fmt: skip
PIECES = (
    b"\0", b"\xff", b"\xff\xfe", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\r\n", b"\n", b" ", b"\t", b"[", b"]", b"{", b"}", b'"', b":", b",",
    b"NaN", b"-Infinity", b"1e999", b"null", b"9" * 5000, b"[" * 3000, b'{"a":' * 3000, b"!!int x", b"!!timestamp x", b"!!bool x",
    b"!!python/name:os.system", b"&a [*a]", b"<<: 3", b"? [a]", b"%YAML 9.9", b"2001-99-99", b"\\ud800", b"#", b"=", b"../",
    b"\xff" * 8, b"\0" * 8, b"\x7f" + b"\xff" * 7,
)  # fmt: skip


def damaged_bytes(whole: bytes, rng: random.Random) -> bytes:
    """One to three damages; the beginning, where headers lie, is hit as often as all the rest."""
    data = bytearray(whole)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        place = rng.randrange(len(data) + 1)
        if rng.random() < 0.5:
            place = min(place, rng.randrange(64))
        other = rng.randrange(len(data) + 1)
        first, last = sorted((place, min(other, place + rng.choice((1, 8, 64, len(data))))))
        match rng.randrange(7):
            case 0 if place < len(data):
                data[place] ^= 1 << rng.randrange(8)
            case 1:
                del data[place:]
            case 2:
                del data[first:last]
            case 3:
                data[last:last] = data[first:last]
            case 4:
                data[place : place + last - first] = data[first:last]
            case 5:
                data[place:place] = rng.choice(PIECES)
            case _:
                piece = rng.choice(PIECES)
                data[place : place + len(piece)] = piece
    return bytes(data)


def places_in(tree: Any, path: tuple = ()) -> list[tuple]:
    """The paths of all values within nested lists and dicts, the whole one's first."""
    inside = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [path, *(place for key, value in inside for place in places_in(value, (*path, key)))]


def damaged_tree(whole: Any, rng: random.Random) -> Any:
    """One or two values changed, dropped, renamed, doubled, wrapped or put where another was."""
    tree = [copy.deepcopy(whole)]  # so that the whole has a place too
    for _ in range(rng.choice((1, 1, 2))):
        *above, key = rng.choice(places_in(tree)[1:])
        holder = tree
        for step in above:
            holder = holder[step]
        value = holder[key]
        match rng.randrange(8):
            case 0 if above:
                del holder[key]
            case 1 if isinstance(holder, dict):
                holder[rng.choice(("", "x", str(key).upper(), f"{key}s", "../x"))] = holder.pop(key)
            case 2 if isinstance(holder, list) and above:
                holder.insert(key, copy.deepcopy(value))
            case 3:
                holder[key] = rng.choice(([value], {"a": value}))
            case 4 if isinstance(value, int | float):
                holder[key] = rng.choice((-value, value * 10**9, value + 1, value / 3, str(value), float(value)))
            case 5:
                other = tree
                for step in rng.choice(places_in(tree)[1:]):
                    other = other[step]
                holder[key] = copy.deepcopy(other)
            case _:
                holder[key] = copy.deepcopy(rng.choice(VALUES))
    return tree[0] if tree else None


def damaged_json(whole: bytes, rng: random.Random) -> bytes:
    """Of a JSON file's content, in its values or in its bytes."""
    if rng.random() < 0.3:
        return damaged_bytes(whole, rng)
    return json.dumps(damaged_tree(json.loads(whole), rng)).encode()


def damaged_lines(whole: bytes, rng: random.Random) -> bytes:
    """Of a .jsonl: one line of it."""
    lines = whole.splitlines()
    place = rng.randrange(len(lines))
    lines[place] = damaged_json(lines[place], rng)
    return b"\n".join(lines) + b"\n"


def damaged_safetensors(whole: bytes, rng: random.Random) -> bytes:
    """In what its header says, in the header's length, or anywhere."""
    if rng.random() < 0.4:
        return damaged_bytes(whole, rng)
    length = int.from_bytes(whole[:8], "little")
    header = json.dumps(damaged_tree(json.loads(whole[8 : 8 + length]), rng)).encode()
    return len(header).to_bytes(8, "little") + header + whole[8 + length :]
