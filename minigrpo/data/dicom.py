"""A DICOM film as a radiologist's screen shows it. Needs `pip install minigrpo[dicom]`."""

import os

import numpy as np
from PIL import Image


def _pydicom():
    try:
        import pydicom
    except ImportError:
        raise ImportError("DICOM films need pydicom: pip install -e '.[dicom]'") from None
    return pydicom


def dicom_size(path: str | os.PathLike) -> tuple[int, int]:
    """(width, height) from the header alone."""
    header = _pydicom().dcmread(path, stop_before_pixels=True, specific_tags=["Rows", "Columns"])
    return int(header.Columns), int(header.Rows)


def load_dicom(path: str | os.PathLike) -> Image.Image:
    """The film as 8-bit RGB, aspect as stored, bone white.

    The order is the standard's (DICOM PS3.3 C.11): modality LUT or rescale; then the window (or VOI LUT) if the file has one, else
    the range of its own values; then MONOCHROME1, whose small values are white, is inverted.
    """
    pydicom = _pydicom()
    from pydicom.pixels import apply_modality_lut, apply_voi_lut
    film = pydicom.dcmread(path)
    pixels = film.pixel_array
    if pixels.ndim != 2:
        raise ValueError(f"{path} holds {pixels.shape}, not one grey film")
    values = apply_modality_lut(pixels, film)
    shown = apply_voi_lut(values, film).astype(np.float64)  # the first window, where there are several
    low, high = shown_range(film, shown)
    grey = ((shown - low) * (255 / max(high - low, 1e-9))).clip(0, 255)
    if film.PhotometricInterpretation == "MONOCHROME1":
        grey = 255 - grey
    return Image.fromarray(grey.round().astype(np.uint8)).convert("RGB")


def shown_range(film, shown: np.ndarray) -> tuple[float, float]:
    """What is black and what is white: the window's output range if there is a window, else the film's own extremes.

    pydicom maps a window onto the range of the stored bits (after the rescale), so that range, not the film's, is black to white.
    """
    if not film.get("WindowWidth") or "VOILUTSequence" in film or "ModalityLUTSequence" in film:
        return float(shown.min()), float(shown.max())
    bits = int(film.BitsStored)
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if film.PixelRepresentation else (0, 2**bits - 1)
    slope, intercept = float(film.get("RescaleSlope", 1)), float(film.get("RescaleIntercept", 0))
    return low * slope + intercept, high * slope + intercept
