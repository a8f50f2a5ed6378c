"""Damage: bits flipped, the end cut off, or what a file says replaced by what no honest file says. All by a seed."""

from __future__ import annotations

import io
import json
import struct
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np

Dice = np.random.Generator
Damage = Callable[[bytes, Dice], bytes]
ABSURD: tuple[Any, ...] = (
    -1, 0, 1, 2, 3, 16_000, 2**31, 2**62, 2**63, 2**64, 10**30, 0.5, 1e160, 1e308, -1e308, float("nan"), float("inf"),
    True, None, "", "x", "\ud800", "../../etc/passwd", "\0", [], {}, [[]], [1, 2, 3], {"x": 1}, "x" * 5000,
    [0] * 10_000,
)  # fmt: skip
TEXTS = ("1e999", "[" * 100_000, '{"a":' * 100_000, "-0", "9" * 5000, "1e-400", "'x'", "")


def flipped(content: bytes, dice: Dice, head: int | None = None) -> bytes:
    """A bit flipped, or up to eight; every other time all of them among the first ``head`` bytes."""
    damaged = bytearray(content)
    end = head if head and dice.random() < 0.5 else len(content)
    for place in dice.integers(0, end, min(dice.geometric(0.5), 8)):
        damaged[place] ^= 1 << dice.integers(8)
    return bytes(damaged)


def cut(content: bytes, dice: Dice, head: int | None = None) -> bytes:
    """The end cut off; every other time within the first ``head`` bytes."""
    end = head if head and dice.random() < 0.5 else len(content)
    return content[: dice.integers(0, end)]


def absurd_json(content: bytes, dice: Dice) -> bytes:
    """One value of a document replaced, removed, or put twice under other names."""
    document = json.loads(content)
    holder, key = _place(document, dice)
    choice = dice.integers(10)
    if choice == 0 and isinstance(holder, dict):
        del holder[key]
    elif choice == 1:  # what json.dumps does not write
        holder[key] = "HERE"
        return json.dumps(document).replace('"HERE"', TEXTS[dice.integers(len(TEXTS))], 1).encode()
    else:
        holder[key] = ABSURD[dice.integers(len(ABSURD))]
    return json.dumps(document).encode()


def _place(document: Any, dice: Dice) -> tuple[Any, Any]:
    """Some value of a document, as its holder and its key there."""
    places: list[tuple[Any, Any]] = []
    open_: list[Any] = [document]
    while open_:
        holder = open_.pop()
        for key, value in list(holder.items() if isinstance(holder, dict) else enumerate(holder)):
            places.append((holder, key))
            if isinstance(value, (dict, list)):
                open_.append(value)
    return places[dice.integers(len(places))]


# --- safetensors: 8 bytes of length, a header in JSON, tensors ----------------------------------------------------


def tensors_head(content: bytes) -> int:
    """Where the tensors begin."""
    return 8 + int(struct.unpack("<Q", content[:8])[0])


def with_header(content: bytes, header: bytes) -> bytes:
    """The same tensors behind another header."""
    padded = header + b" " * (-len(header) % 8)
    return struct.pack("<Q", len(padded)) + padded + content[tensors_head(content) :]


def absurd_tensors(content: bytes, dice: Dice) -> bytes:
    """One value of the header, or of the configuration in it, replaced; or its length."""
    if dice.random() < 0.1:
        absurd = (0, 1, 7, 8, 2**31, 2**40, 2**62, 2**63, 2**64 - 1, len(content), len(content) - 8)
        return struct.pack("<Q", absurd[dice.integers(len(absurd))]) + content[8:]
    header = content[8 : tensors_head(content)]
    said = json.loads(header)
    about = said.get("__metadata__", {})
    if "tarflow.config" in about and dice.random() < 0.5:
        about["tarflow.config"] = absurd_json(about["tarflow.config"].encode(), dice).decode()
        return with_header(content, json.dumps(said).encode())
    return with_header(content, absurd_json(header, dice))


# --- .npy: a header in Python's syntax -----------------------------------------------------------------------------


def absurd_array(content: bytes, dice: Dice) -> bytes:
    """Another header: shapes, types and orders that the numbers behind it do not have."""
    sizes = ("0", "1", "-1", "True", "1.5", "10**9", "2147483648", "4611686018427387904", "1" + "0" * 30, "None", "'x'")
    shape = ", ".join(sizes[k] for k in dice.integers(0, len(sizes), dice.integers(0, 6)))
    types = (
        "<f4",
        "<f8",
        "<f2",
        "|u1",
        "<i8",
        "|O",
        "<U1000000",
        "|V4",
        ">f4",
        "<c16",
        "|b1",
        "<M8[s]",
        "x",
        "",
        "<f3",
    )
    order = ("False", "True", "None", "1")[dice.integers(4)]
    header = f"{{'descr': '{types[dice.integers(len(types))]}', 'fortran_order': {order}, 'shape': ({shape},), }}"
    if dice.random() < 0.2:
        header = header[: dice.integers(len(header))]
    if dice.random() < 0.1:
        header = ("(" * 10_000, "-" * 10_000 + "1", "[" * 3000 + "]" * 3000, "{}", "")[dice.integers(5)]
    text = header.encode() + b" " * (-(len(header) + 11) % 64) + b"\n"
    version = (1, 2, 3, 0, 9)[dice.integers(5)] if dice.random() < 0.2 else 1
    size = struct.pack("<H" if version < 2 else "<I", len(text))
    return b"\x93NUMPY" + bytes([version, 0]) + size + text + content[128:]


# --- .pth: a zip archive --------------------------------------------------------------------------------------------


def in_zip(content: bytes, dice: Dice, damage: Damage) -> bytes:
    """One member damaged, its checksum made right again; its pickle every other time."""
    archive = zipfile.ZipFile(io.BytesIO(content))
    names = archive.namelist()
    pickles = [name for name in names if name.endswith("data.pkl")]
    chosen = (pickles if dice.random() < 0.5 else names)[0 if dice.random() < 0.5 else -1]
    made = io.BytesIO()
    squeezed = zipfile.ZIP_DEFLATED if dice.random() < 0.1 else zipfile.ZIP_STORED
    with zipfile.ZipFile(made, "w", squeezed) as writer:
        for name in names:
            member = archive.read(name)
            writer.writestr(name, damage(member, dice) if name == chosen and member else member)
    return made.getvalue()


def absurd_zip(content: bytes, dice: Dice) -> bytes:
    """Sizes in the directory that no member has; or, of the whole pickle, numbers replaced by larger ones."""
    if dice.random() < 0.5:
        return in_zip(content, dice, _larger)
    damaged, end = bytearray(content), content.rfind(b"PK\x05\x06")
    start = struct.unpack("<I", content[end + 16 : end + 20])[0]
    places = [k for k in range(start, end - 46) if content[k : k + 4] == b"PK\x01\x02"]
    place = places[dice.integers(len(places))] + (20, 24, 32, 42)[dice.integers(4)]
    damaged[place : place + 4] = struct.pack("<I", (0, 1, 2**31, 2**32 - 1, len(content))[dice.integers(5)])
    return bytes(damaged)


def _larger(pickled: bytes, dice: Dice) -> bytes:
    """A small number of a pickle becomes a huge one: K, one byte, to J, four."""
    places = [k for k in range(len(pickled) - 1) if pickled[k : k + 1] == b"K"]
    if not places:
        return pickled
    place = places[dice.integers(len(places))]
    huge = struct.pack("<i", (2**31 - 1, 2**24, -1, 10**6, -(2**31))[dice.integers(5)])
    return pickled[:place] + b"J" + huge + pickled[place + 2 :]
