"""Opens and decodes the file of a film: the only place where an image is read. Files are untrusted,
so formats, size, and the cost of decoding in time and memory are limited before a pixel is decoded.
"""

import mmap
import os
import re
import struct
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

# Pillow knows forty formats, and for one of them (EPS) starts another program. These are what films
# are stored in; PPM is PGM, too.
FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "WEBP", "PPM")
MOST_PIXELS = 100_000_000  # a mammogram has 20 million; a small file can claim billions
MOST_STRETCHED = 200  # longer side over shorter: Qwen3-VL's processor refuses more, in mid-run
# Each scan of a JPEG passes over the whole image, and costs as little as 30 bytes. A progressive
# one has 10.
MOST_SCANS, MOST_SCANNED = 100, 2_000_000_000  # scans; scans times pixels
MOST_TILES = 100_000  # of a TIFF: each costs Pillow 600 bytes and 30 us, whatever it holds
MOST_SLOW = 4_000_000  # pixels of a PPM that Pillow decodes in Python: 6 s
LARGE = 16_000_000  # pixels; larger images are decoded one at a time, so that threads don't add up
BLOCK = 1 << 20  # pixels that are scaled at a time
DEPTHS = (8, 10, 12, 14, 16)  # bits of detectors; whatever they give is stored in 8 or 16
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # EXIF's orientations
MARKER = re.compile(rb"\xff+([^\x00\xff])")  # of a JPEG; ff 00 is a byte of the image
_one_at_a_time = threading.Lock()


def load_image(path: str | os.PathLike) -> Image.Image:
    """The image as 8-bit RGB, the right way up. ValueError names the file and says why it cannot be
    read."""
    with _named(path):
        return _rgb(_read(path)[0])


def read_film(path: str | os.PathLike) -> tuple[Image.Image, str]:
    """(`load_image`'s image, as "L" where it is grey; how many bits its values have, in words)."""
    with _named(path):
        image, depth = _read(path)
        if image.mode != "L":
            image = _rgb(image)
            if all((pixels == pixels[..., :1]).all() for _, pixels in blocks(image)):
                image = image.getchannel(0)
        return image, depth


def _rgb(image: Image.Image) -> Image.Image:
    return image if image.mode == "RGB" else image.convert("RGB")  # which would copy it


def header(path: str | os.PathLike) -> tuple[str, bool]:
    """(Pillow's mode, whether the image is stored the right way up) of a file that passes the
    checks."""
    with _named(path), _opened(path) as (image, _):
        return image.mode, _orientation(image) == 1


@contextmanager
def _named(path: str | os.PathLike) -> Iterator[None]:
    """A context: any error inside becomes a ValueError that names the image, since decoders raise a
    dozen kinds.
    """
    try:
        yield
    except Exception as error:
        said = error.strerror if isinstance(error, OSError) else None
        reason = said or str(error) or type(error).__name__
        raise ValueError(f"image {path} cannot be read ({reason})") from error


@contextmanager
def _opened(path: str | os.PathLike) -> Iterator[tuple[Image.Image, BinaryIO]]:
    """An image whose header has been read and checked; no pixel is decoded yet."""
    if not os.path.isfile(path):  # a pipe would be waited for, a device has no end
        raise ValueError("no such file" if not os.path.exists(path) else "it is not a file")
    with open(path, "rb") as file:
        if tiles_of(file) > MOST_TILES:
            raise ValueError(f"a TIFF of more than {MOST_TILES:,} strips or tiles: convert it")
        try:
            image = Image.open(file, formats=FORMATS)
        except UnidentifiedImageError:
            raise ValueError(
                f"it is not a {', '.join(FORMATS[:-1])} or PGM image, or its header is damaged:"
                " convert it to one"
            ) from None
        with image:
            check_image(image)
            if image.format in ("JPEG", "MPO"):
                with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                    check_scans(data, image.width * image.height)
            slow = any(tile[0] in ("ppm", "ppm_plain") for tile in image.tile)
            if slow and image.width * image.height > MOST_SLOW:
                raise ValueError(
                    "a large PPM that is text, or whose white is neither 255 nor 65535, takes"
                    " minutes to decode: convert it to PNG"
                )
            yield image, file


def check_image(image: Image.Image) -> None:
    """Before any pixel is decoded: ValueError for an image that no run can take."""
    check_size(image.width, image.height)
    if image.mode == "F":
        raise ValueError(
            "its pixels are floats, so it is not known which value is white: convert it to 8 or 16"
            " bits"
        )


def check_size(width: int, height: int) -> None:
    """ValueError for a film that is too large to decode, or not a film."""
    size = f"{width} x {height} pixels"
    if width * height > MOST_PIXELS:
        raise ValueError(f"{size}, more than {MOST_PIXELS // 10**6} million: make it smaller")
    if max(width, height) > MOST_STRETCHED * min(width, height):
        raise ValueError(
            f"{size}: one side is more than {MOST_STRETCHED} times the other, so it is not a film:"
            " crop it"
        )


def check_scans(data: bytes | mmap.mmap, pixels: int) -> None:
    """ValueError for a JPEG that would take minutes to decode."""
    scans = count_scans(data)
    if scans > MOST_SCANS or scans * pixels > MOST_SCANNED:
        raise ValueError(
            f"a JPEG of {pixels:,} pixels in more than {min(scans - 1, MOST_SCANS)} "
            "scans, which takes minutes to decode: convert it"
        )


def count_scans(data: bytes | mmap.mmap) -> int:
    """The scans of a JPEG that a decoder would go through: up to its end mark, thumbnails left
    out."""
    scans, place = 0, 2
    while (marker := MARKER.search(data, place)) and scans <= MOST_SCANS:
        kind, place = marker[1][0], marker.end()
        scans += kind == 0xDA
        if kind == 0xD9:
            break
        if not 0xD0 <= kind <= 0xD8 and kind != 0x01:
            # All others have a length, and may hold what looks like a marker.
            place += int.from_bytes(data[place : place + 2], "big")
    return scans


def tiles_of(file: BinaryIO) -> int:
    """Strips or tiles of a TIFF's first image, 0 for another file: Pillow makes a list of them
    before it tells the size."""
    head = file.read(16).ljust(16, b"\0")
    order, version = {b"II": "<", b"MM": ">"}.get(head[:2]), head[2:4]
    most = 0
    if order and version in (struct.pack(order + "H", 42), struct.pack(order + "H", 43)):
        big = version == struct.pack(order + "H", 43)  # BigTIFF
        (start,) = struct.unpack(order + ("Q" if big else "I"), head[8:16] if big else head[4:8])
        file.seek(min(start, 2**62))
        (count,) = struct.unpack(
            order + ("Q" if big else "H"), file.read(8 if big else 2).ljust(8 if big else 2, b"\0")
        )
        for _ in range(min(count, 4096)):
            entry = file.read(20 if big else 12)
            if len(entry) < 12:
                break
            tag, _, values = struct.unpack(
                order + ("HHQ" if big else "HHI"), entry[: 12 if big else 8]
            )
            most = max(most, values if tag in (273, 324) else 0)  # where each strip, or tile, lies
    file.seek(0)
    return most


def _read(path: str | os.PathLike) -> tuple[Image.Image, str]:
    """(8-bit image, upright, not yet RGB; its depth in words)."""
    with _opened(path) as (image, file):
        with _one_at_a_time if image.width * image.height > LARGE else nullcontext():
            deep = image.mode.startswith("I")
            stated = stated_white(image, file) if deep else None
            # Pillow inverts a TIFF whose zero is white if it has 8 bits, and no other.
            negative = deep and image.format == "TIFF" and _number(image.tag_v2.get(262, 1)) == 0
            halved = any("16" in str(tile[3]) for tile in image.tile)  # 16-bit colour
            image.load()
            orientation = _orientation(image)
            if deep:
                image, depth = to_8_bits(image, stated)
                image = ImageOps.invert(image) if negative else image
            else:
                depth = "the upper 8 of 16 bits" if halved else "8 bits"
            check_image(image)  # a TIFF may turn on loading
            return (image.transpose(TURNS[orientation]) if orientation != 1 else image), depth


def _orientation(image: Image.Image) -> int:
    """EXIF's orientation: 1 for upright. Viewers show the image upright, and boxes were drawn on it
    so.

    `ImageOps.exif_transpose` would rewrite all other tags, and fails on a broken one."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # the notes may be broken in many ways, and are then none
        return 1
    return orientation if isinstance(orientation, int) and orientation in TURNS else 1


def to_8_bits(image: Image.Image, stated: int | None = None) -> tuple[Image.Image, str]:
    """Grey of more than 8 bits as "L", and its depth in words. Pillow alone would clip it at 255: a
    white film.

    Values that are negative, or above 16 bits, do not tell what is black and white: then the film's
    own range is shown.
    """
    counts = histogram(image)
    bits = depth_of(counts, stated)
    if bits:
        black, white, depth = 0, 2**bits - 1, f"{bits} bits in 16"
    else:
        black, white, *_ = robust_range(pixels for _, pixels in blocks(image))
        black, depth = (black, "signed values") if black < 0 else (0, "more than 16 bits")
    grey = Image.new("L", image.size)
    for top, pixels in blocks(image):
        scaled = (pixels.astype(np.float64) - black) * (255 / max(white - black, 1))
        grey.paste(Image.fromarray(scaled.round().clip(0, 255).astype(np.uint8)), (0, top))
    return grey, depth


def depth_of(counts: np.ndarray, stated: int | None = None) -> int | None:
    """The bits of the detector, from `histogram`'s counts [65538]; None where there are more, or a
    sign.

    The fewest that fit the film, and the `stated` white of its tags, if it has one. Not every pixel
    needs to fit: a single hot one in a film of 12 bits would reduce it to a sixteenth of its
    brightness. So one in a thousand, at most a hundred, may lie beyond, or one in a hundred if all
    of these are at least four times as bright (burnt-in white letters).
    """
    pixels = int(counts.sum())
    defects = min(pixels // 1000, 100)
    if counts[0] > defects:
        return None
    for bits in DEPTHS:
        beyond = counts[1 + 2**bits :]
        burnt_in = beyond.sum() <= pixels // 100 and not beyond[: 3 * 2**bits].any() and bits <= 12
        if 2**bits > (stated or 0) and (beyond.sum() <= defects or burnt_in):
            return bits
    return None


def histogram(image: Image.Image) -> np.ndarray:
    """[65538]: how many pixels are below 0, at each of 0..65535, and above."""
    counts = np.zeros(65538, np.int64)
    for _, pixels in blocks(image):
        counts += np.bincount(pixels.ravel().astype(np.int64).clip(-1, 65536) + 1, minlength=65538)
    return counts


def robust_range(parts: Iterable[np.ndarray]) -> tuple[float, float, float, float]:
    """(low, high, least, most) of the values of all parts: the extremes, and what they are without
    one value in a thousand, at most a hundred, at either end. Zeros where there is no value."""
    low = high = np.zeros(0)
    count = 0
    for values in parts:
        count += values.size
        low, high = (np.concatenate((kept, values.ravel())) for kept in (low, high))
        keep = min(100, len(low) - 1)
        if keep > 0:
            low = np.partition(low, keep)[: keep + 1]
            high = np.partition(high, -1 - keep)[-1 - keep :]
    if not count:
        return 0, 0, 0, 0
    spare = min(count // 1000, 100)
    low, high = np.sort(low), np.sort(high)
    return low[spare], high[-1 - spare], low[0], high[-1]


def blocks(image: Image.Image) -> Iterator[tuple[int, np.ndarray]]:
    """(first row, pixels [rows, width]) of some rows at a time, so that no copy of the whole image
    is made."""
    rows = max(1, BLOCK // image.width)
    for top in range(0, image.height, rows):
        yield top, np.asarray(image.crop((0, top, image.width, min(top + rows, image.height))))


def stated_white(image: Image.Image, file: BinaryIO) -> int | None:
    """The largest value that the file's tags state: PNG's sBIT, TIFF's BitsPerSample or
    (S)MaxSampleValue. None if they only say that there are 16 bits. (A PNG whose bits were shifted
    up, as the standard says, has larger values, and these count.)"""
    if image.format == "PNG":
        bits = significant_bits(file)
        return 2**bits - 1 if 0 < bits < 16 else None
    if image.format != "TIFF":
        return None
    bits, *values = (_number(image.tag_v2.get(tag)) for tag in (258, 281, 341))
    known = [value for value in (2**bits - 1 if 0 < bits < 16 else 0, *values) if 0 < value < 65535]
    return max(known, default=None)


def _number(value) -> int:
    """The first number of a tag, 0 for none: tags may hold anything."""
    try:
        return int(value[0] if isinstance(value, tuple) else value)
    except (TypeError, ValueError, IndexError, ArithmeticError):
        return 0


def significant_bits(file: BinaryIO) -> int:
    """sBIT of a PNG, 0 without one. Pillow leaves it out."""
    before, place = file.tell(), 8
    try:
        while place < 2**31:
            file.seek(place)
            length, kind = struct.unpack(">I4s", file.read(8).ljust(8, b"\0"))
            if kind == b"sBIT":
                return max(file.read(1), default=0)
            if kind in (b"IDAT", b"IEND", b"\0\0\0\0"):
                return 0
            place += length + 12
        return 0
    finally:
        file.seek(before)
