"""Device code in a shared library: containers in one section of it, each with an image of code a compute capability.

A 64-bit ELF file. A container has a header (magic number, version, its length, the length of what follows), and so has
each image (kind, its length, the length of the code, capability).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

SECTION = b".nv_fatbin"
CONTAINER = struct.Struct("<IHHQ")  # magic, version, bytes of header, bytes of images
IMAGE = struct.Struct("<HHIQ12xI")  # kind, version, bytes of header, bytes of code; capability
MAGIC = 0xBA55ED50
ALIGNED = 8


@dataclass(frozen=True, slots=True)
class Image:
    """Code for one capability, such as 90, at ``start`` in the file; its container at ``address`` when it is loaded."""

    address: int
    capability: int
    start: int
    size: int


def images(library: bytes | bytearray) -> Iterator[Image]:
    """All device code, in order. Raises ValueError for a file that is not as described."""
    address, start, size = section(library)
    at, end = start, start + size
    while at + CONTAINER.size <= end:
        magic, _, header, length = CONTAINER.unpack_from(library, at)
        if magic != MAGIC:  # room between two of them
            at += ALIGNED
            continue
        container, at, after = address + at - start, at + header, at + header + length
        if after > end:
            raise ValueError(f"device code at {at} is not as expected: {length} bytes, and {end - at} are left")
        while at + IMAGE.size <= after:
            _, _, header, code, capability = IMAGE.unpack_from(library, at)
            if header < IMAGE.size or at + header + code > after:
                raise ValueError(f"device code at {at} is not as expected: {header} and {code} bytes before {after}")
            yield Image(container, capability, at + header, code)
            at += header + code
        at = after + -after % ALIGNED


def section(library: bytes | bytearray) -> tuple[int, int, int]:
    """(address, start in the file, size) of the section that holds device code. Raises ValueError if there is none."""
    if library[:5] != b"\x7fELF\x02":
        raise ValueError("this is no 64-bit ELF file")
    (table,) = struct.unpack_from("<Q", library, 40)
    size, count, names = struct.unpack_from("<HHH", library, 58)
    headers = [struct.unpack_from("<I12xQQQ", library, table + k * size) for k in range(count)]
    strings = headers[names][2]
    for name, *place in headers:
        if library[strings + name : strings + name + len(SECTION) + 1] == SECTION + b"\0":
            return place[0], place[1], place[2]
    raise ValueError(f"this library has no {SECTION.decode()}: no device code is in it")


def blank(library: bytearray, capability: int, containers: set[int]) -> int:
    """Fill with zeros what is not for ``capability``, or not in these containers. Returns the bytes of code left."""
    left = 0
    for image in list(images(library)):
        if image.capability == capability and image.address in containers:
            left += image.size
        else:
            library[image.start : image.start + image.size] = bytes(image.size)
    return left
