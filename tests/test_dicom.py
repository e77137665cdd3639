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
    found = load(tmp_path, RescaleSlope=2, RescaleIntercept=-1000, WindowCenter=2000, WindowWidth=1000)
    assert np.abs(found - window(RAMP * 2 - 1000, 2000, 1000)).max() <= 1


def test_a_window_that_shows_part_of_the_film_is_not_stretched(tmp_path):
    """All values lie in the upper half of the window: stretching to the film's own extremes would undo it."""
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


def test_without_pydicom_the_message_says_what_to_install(tmp_path, monkeypatch):
    import sys
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(ImportError, match=r"pip install -e '.\[dicom\]'"):
        load_dicom(tmp_path / "film.dicom")
    Image.new("L", (4, 4)).save(tmp_path / "film.png")
    from minigrpo.data import load_image
    assert load_image(tmp_path / "film.png").size == (4, 4)  # everything else works
