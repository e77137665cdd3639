"""DICOM films as a screen shows them: window, rescale, inversion, aspect."""

import numpy as np
import pytest
from PIL import Image

from minigrpo.data.dicom import dicom_size, load_dicom
from tests.fake_sets import dicom_film

pytest.importorskip("pydicom", reason="the optional extra: pip install -e '.[dicom]'")
RAMP = np.linspace(0, 4095, 60 * 40).reshape(60, 40).round()


def load(tmp_path, pixels=RAMP, **options) -> np.ndarray:
    dicom_film(tmp_path / "film.dicom", pixels, **options)
    image = load_dicom(tmp_path / "film.dicom")
    assert image.mode == "RGB" and image.size == dicom_size(tmp_path / "film.dicom") == (40, 60)
    return np.asarray(image)[..., 0].astype(int)


def window(values, centre, width):
    """DICOM PS3.3 C.11.2.1.2.1, written as the standard does, onto 0..255."""
    out = np.empty(values.shape)
    for place, x in np.ndenumerate(values):
        if x <= centre - 0.5 - (width - 1) / 2:
            out[place] = 0
        elif x > centre - 0.5 + (width - 1) / 2:
            out[place] = 255
        else:
            out[place] = ((x - (centre - 0.5)) / (width - 1) + 0.5) * 255
    return out


def test_without_a_window_the_film_s_own_range_is_shown(tmp_path):
    assert np.abs(load(tmp_path, 1000 + RAMP / 4) - RAMP * 255 / 4095).max() <= 1


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_window_is_applied(tmp_path, photometric):
    found = load(tmp_path, photometric=photometric, WindowCenter=1500, WindowWidth=1000)
    expected = window(RAMP, 1500, 1000)
    assert np.abs(found - (255 - expected if photometric == "MONOCHROME1" else expected)).max() <= 1


def test_first_of_several_windows_counts(tmp_path):
    found = load(tmp_path, WindowCenter=[1500, 3000], WindowWidth=[1000, 200])
    assert np.abs(found - window(RAMP, 1500, 1000)).max() <= 1


def test_window_is_in_rescaled_values(tmp_path):
    found = load(
        tmp_path, RescaleSlope=2, RescaleIntercept=-1000, WindowCenter=2000, WindowWidth=1000
    )
    assert np.abs(found - window(RAMP * 2 - 1000, 2000, 1000)).max() <= 1


def test_a_window_that_shows_part_of_the_film_is_not_stretched(tmp_path):
    """All values lie in the upper half of the window: stretching to the film's own extremes would
    undo it.
    """
    found = load(tmp_path, 2000 + RAMP / 8, WindowCenter=2048, WindowWidth=4096)
    assert found.min() > 110


def test_a_constant_film_is_black_and_no_error(tmp_path):
    assert (load(tmp_path, np.full((60, 40), 700.0)) == 0).all()


def test_lossless_jpeg_2000_is_read(tmp_path):
    """VinDr's films are compressed; pylibjpeg comes with the extra."""
    import pydicom
    from pydicom.uid import JPEG2000Lossless

    pytest.importorskip("openjpeg")
    dicom_film(tmp_path / "film.dicom", RAMP)
    plain = np.asarray(load_dicom(tmp_path / "film.dicom"))
    film = pydicom.dcmread(tmp_path / "film.dicom")
    film.compress(JPEG2000Lossless)
    film.save_as(tmp_path / "packed.dicom")
    assert np.array_equal(np.asarray(load_dicom(tmp_path / "packed.dicom")), plain)


def test_a_file_that_is_no_film_is_refused(tmp_path):
    (tmp_path / "text.dicom").write_text("no film")
    with pytest.raises(Exception, match="DICOM"):
        load_dicom(tmp_path / "text.dicom")


@pytest.mark.parametrize(
    "tags",
    [
        dict(WindowCenter=1500, WindowWidth=0),
        dict(WindowCenter=1500, WindowWidth=-1),
        dict(WindowCenter=None, WindowWidth=None),
        dict(WindowCenter=1500),
        dict(WindowWidth=100),
        dict(RescaleSlope=None, RescaleIntercept=0),
        dict(RescaleSlope=None, RescaleIntercept=None),
        dict(RescaleSlope=1, RescaleIntercept=None),
        dict(RescaleSlope=0, RescaleIntercept=0),
        dict(VOILUTSequence=[]),
        dict(ModalityLUTSequence=[]),
        dict(WindowCenter=[1500, 2048], WindowWidth=[0, 4096]),
        dict(WindowCenter=2048, WindowWidth=4096, VOILUTFunction="ODD"),
        dict(PixelPaddingValue=None),
    ],
)
def test_a_tag_without_a_usable_value_is_none(tmp_path, tags):
    """Bug: a window of width 0 or an empty slope lost the film."""
    assert np.abs(load(tmp_path, **tags) - RAMP * 255 / 4095).max() <= 1


def test_an_empty_slope_leaves_the_intercept_and_the_window(tmp_path):
    found = load(
        tmp_path, RescaleSlope=None, RescaleIntercept=-1000, WindowCenter=500, WindowWidth=1000
    )
    assert np.abs(found - window(RAMP - 1000, 500, 1000)).max() <= 1


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize(
    "value, bits, tags",
    [
        (65535, 16, dict(PixelPaddingValue=65535)),
        (65535, 12, dict(PixelPaddingValue=65535)),
        (65535, 12, {}),
        (0, 12, dict(PixelPaddingValue=0)),
        (5000, 16, dict(PixelPaddingValue=4990, PixelPaddingRangeLimit=5010)),
        (65535, 12, dict(WindowCenter=2000, WindowWidth=2000)),
    ],
)
def test_padding_around_a_film_is_black_and_darkens_nothing(
    tmp_path, photometric, value, bits, tags
):
    """Bug: a padding value of 65535 was the film's white."""
    film, whole = (
        1000 + RAMP / 2,
        load(
            tmp_path,
            1000 + RAMP / 2,
            photometric=photometric,
            **{k: v for k, v in tags.items() if "Window" in k},
        ),
    )
    padded = film.copy()
    padded[-10:] = value  # the film's brightest rows go, so its own range does, too
    padded[0, 0], padded[20, 20] = film.min(), film.max()
    found = load(tmp_path, padded, bits=bits, photometric=photometric, **tags)
    same = np.ones_like(film, bool)
    same[-10:], same[20, 20] = False, False
    assert (found[-10:] == 0).all() and np.abs(found - whole)[same].max() <= 1


def test_a_hot_pixel_does_not_darken_a_film(tmp_path):
    pixels = RAMP / 4
    pixels[30, 20] = 4095
    assert np.abs(load(tmp_path, pixels) - RAMP * 255 / 4095)[RAMP < 2000].max() <= 2


@pytest.mark.parametrize(
    "tags, message",
    [
        (dict(Rows=12_000, Columns=12_000), "more than 100 million"),
        (dict(NumberOfFrames=10**9), "1000000000 frames"),
        (dict(SamplesPerPixel=3), "3 colours"),
        (dict(Rows=2400, Columns=1), "more than 200 times"),
        (dict(Rows=0), "more than 200 times"),
    ],
)
def test_dicom_files_that_claim_too_much(tmp_path, tags, message):
    """Bug: only the decoder looked at the size."""
    dicom_film(tmp_path / "film.dicom", RAMP, **tags)
    with pytest.raises(ValueError, match=message):
        load_dicom(tmp_path / "film.dicom")


def test_a_deflated_dicom_file_is_not_unpacked(tmp_path):
    """Bug: 100 kB of zeros, deflated, are 100 MB, and so on without a bound."""
    import pydicom

    dicom_film(tmp_path / "film.dicom", RAMP)
    film = pydicom.dcmread(tmp_path / "film.dicom")
    film.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
    film.save_as(tmp_path / "deflated.dicom")
    for read in (load_dicom, dicom_size):
        with pytest.raises(ValueError, match="deflated.dicom is deflated"):
            read(tmp_path / "deflated.dicom")


def test_a_jpeg_of_thousands_of_scans_in_a_dicom_file(tmp_path):
    import pydicom
    from pydicom.encaps import encapsulate

    from tests.test_film import progressive

    dicom_film(tmp_path / "film.dicom", RAMP)
    film = pydicom.dcmread(tmp_path / "film.dicom")
    film.file_meta.TransferSyntaxUID = pydicom.uid.JPEGBaseline8Bit
    film.PixelData = encapsulate([progressive(5000)])
    film["PixelData"].VR, film["PixelData"].is_undefined_length = "OB", True
    film.save_as(tmp_path / "bomb.dicom")
    with pytest.raises(ValueError, match="more than 100 scans"):
        load_dicom(tmp_path / "bomb.dicom")


def test_without_pydicom_the_message_says_what_to_install(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(ImportError, match=r"pip install -e '.\[dicom\]'"):
        load_dicom(tmp_path / "film.dicom")
    Image.new("L", (4, 4)).save(tmp_path / "film.png")
    from minigrpo.data import load_image

    assert load_image(tmp_path / "film.png").size == (4, 4)  # everything else works
