"""A DICOM film as a radiologist's screen shows it. Needs `pip install minigrpo[dicom]`."""

import math
import os
from collections.abc import Iterator, MutableSequence

import numpy as np
from PIL import Image

from minigrpo.packages import need

from .film import BLOCK, check_scans, check_size, robust_range

FUNCTIONS = ("LINEAR", "LINEAR_EXACT", "SIGMOID")  # of a window


def _read(path: str | os.PathLike, **settings):
    """The DICOM data set. A deflated one is refused: a few megabytes of it can unpack to fill all
    memory.
    """
    need("a DICOM film", "pydicom")
    import pydicom

    syntax = pydicom.filereader.read_file_meta_info(path).get("TransferSyntaxUID")
    if syntax == pydicom.uid.DeflatedExplicitVRLittleEndian:
        raise ValueError(f"{path} is deflated: store it in another transfer syntax")
    return pydicom.dcmread(path, **settings)


def dicom_size(path: str | os.PathLike) -> tuple[int, int]:
    """(width, height) from the header alone."""
    header = _read(path, stop_before_pixels=True, specific_tags=["Rows", "Columns"])
    return int(header.Columns), int(header.Rows)


def load_dicom(path: str | os.PathLike) -> Image.Image:
    """The film as 8-bit RGB, aspect as stored, bone white.

    The order is the standard's (DICOM PS3.3 C.11): modality LUT or rescale; then the window (or VOI
    LUT) if the file has one, else the range of its own values; then MONOCHROME1, whose small values
    are white, is inverted. Padding is black and not part of the range. A tag without a usable value
    counts as absent.
    """
    film = _read(path)
    check_film(film, path)
    drop_unusable(film)
    pixels = film.pixel_array
    if pixels.ndim != 2:
        raise ValueError(f"{path} holds {pixels.shape}, not one grey-scale film")
    low, high = shown_range(film, pixels)
    grey = np.empty(pixels.shape, np.uint8)
    for rows, shown, padding in shown_blocks(film, pixels):
        scaled = ((shown - low) * (255 / max(high - low, 1e-9))).clip(0, 255)
        if film.PhotometricInterpretation == "MONOCHROME1":
            scaled = 255 - scaled
        grey[rows] = np.where(padding, 0, scaled.round())
    return Image.fromarray(grey).convert("RGB")


def check_film(film, path: str | os.PathLike) -> None:
    """Before any pixel is decoded: ValueError for anything that is not a film, or too large."""
    check_size(int(film.Columns), int(film.Rows))
    frames, samples = (int(film.get(name) or 1) for name in ("NumberOfFrames", "SamplesPerPixel"))
    if frames != 1 or samples != 1:
        raise ValueError(
            f"{path} holds {frames} frames of {samples} colours, not one grey-scale film"
        )
    if film.file_meta.TransferSyntaxUID.is_encapsulated:
        from pydicom.encaps import generate_frames

        for frame in generate_frames(film.PixelData, number_of_frames=1):
            if frame.startswith(b"\xff\xd8"):
                check_scans(frame, film.Columns * film.Rows)


def numbers(film, name: str) -> list[float]:
    """The values of a tag, NaN for each that is not a number; [] if it is absent or empty."""
    try:
        value = film.get(name)
        values = value if isinstance(value, MutableSequence) else [value]
        if value in (None, ""):
            values = []
        return [math.nan if each in (None, "") else float(each) for each in values]
    except (TypeError, ValueError):  # pydicom reads a tag when it is asked for
        return [math.nan]


def drop_unusable(film) -> None:
    """Repair what pydicom would stop at: an empty slope becomes 1, a window of width 0 and an empty
    table are removed.
    """
    for name, default in (("RescaleSlope", 1), ("RescaleIntercept", 0)):
        value = (numbers(film, name) or [math.nan])[0]
        rescaled = "RescaleSlope" in film or "RescaleIntercept" in film
        if rescaled and (not math.isfinite(value) or value == 0 and name == "RescaleSlope"):
            setattr(film, name, default)
    for name in ("ModalityLUTSequence", "VOILUTSequence"):
        if name in film and not is_table(film[name].value):
            delattr(film, name)
    if "VOILUTFunction" in film and film.VOILUTFunction not in FUNCTIONS:
        del film.VOILUTFunction
    least = 1 if film.get("VOILUTFunction", "LINEAR") == "LINEAR" else 1e-9
    pairs = zip(numbers(film, "WindowCenter"), numbers(film, "WindowWidth"))
    windows = [
        (centre, width)
        for centre, width in pairs
        if math.isfinite(centre) and least <= width < math.inf
    ]
    first = windows[0] if windows else (None, None)
    for name, value in zip(("WindowCenter", "WindowWidth"), first):
        if name in film:
            del film[name]
        if value is not None:
            setattr(film, name, value)


def is_table(sequence) -> bool:
    """Whether a sequence's first item is a look-up table."""
    names = ("LUTDescriptor", "LUTData")
    return bool(sequence) and None not in [sequence[0].get(name) for name in names]


def shown_blocks(film, pixels: np.ndarray) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
    """(rows, their values as shown [rows, width], which of them are padding) of some rows at a
    time: a float copy of a whole film takes eight times its file."""
    from pydicom.pixels import apply_modality_lut, apply_voi_lut

    stored = stored_values(film, pixels)
    step = max(1, BLOCK // pixels.shape[1])
    for top in range(0, len(pixels), step):
        rows = slice(top, top + step)
        shown = apply_voi_lut(apply_modality_lut(pixels[rows], film), film)
        yield rows, shown.astype(np.float64), is_padding(film, stored[rows])


def stored_values(film, pixels: np.ndarray) -> np.ndarray:
    """The pixels including the bits beyond the stored ones, which pydicom clears together with
    padding such as 65535 in 12 bits.
    """
    syntax = film.file_meta.TransferSyntaxUID
    if syntax.is_encapsulated or film.BitsAllocated != 8 * pixels.dtype.itemsize:
        return pixels
    kind = pixels.dtype.newbyteorder("<" if syntax.is_little_endian else ">")
    return np.frombuffer(film.PixelData, kind, pixels.size).reshape(pixels.shape)


def is_padding(film, stored: np.ndarray) -> np.ndarray:
    """Which pixels are padding: those of PixelPaddingValue (up to its limit), or with all bits set
    where fewer are stored.
    """
    bits = stored.dtype.itemsize * 8
    around = np.zeros(stored.shape, bool)
    if stored.dtype.kind == "u" and film.BitsStored < bits:
        around = stored == 2**bits - 1
    if ends := numbers(film, "PixelPaddingValue")[:1]:
        ends += numbers(film, "PixelPaddingRangeLimit")[:1]
        around |= (stored >= min(ends)) & (stored <= max(ends))
    return around


def stored_range(film) -> tuple[int, int]:
    """The least and the largest value of the stored bits."""
    bits = int(film.BitsStored)
    signed = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    return signed if film.PixelRepresentation else (0, 2**bits - 1)


def shown_range(film, pixels: np.ndarray) -> tuple[float, float]:
    """What is black and what is white: the window's output range if there is a window, else the
    film's own extremes.

    pydicom maps a window onto the range of the stored bits (after the rescale), so that range, not
    the film's, is black to white.
    """
    if "WindowWidth" not in film or "VOILUTSequence" in film or "ModalityLUTSequence" in film:
        return own_range(shown[~padding] for _, shown, padding in shown_blocks(film, pixels))
    slope, intercept = float(film.get("RescaleSlope", 1)), float(film.get("RescaleIntercept", 0))
    low, high = stored_range(film)
    return low * slope + intercept, high * slope + intercept


def own_range(parts: Iterator[np.ndarray]) -> tuple[float, float]:
    """The extremes of all parts, or, if a few (hot) pixels lie far beyond all others, those of the
    others.
    """
    low, high, least, most = robust_range(parts)
    near = (high - low) / 4
    return (least if low - least <= near else low), (most if most - high <= near else high)
