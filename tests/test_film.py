"""A film is decoded in one place: at its own bit depth, by a known format alone, within bounds of
time and memory."""

import io
import os
import random
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image

import minigrpo
from minigrpo.data import DataError, load_image, read_jsonl
from minigrpo.data.check import look
from tests.test_sample import REPORT, write  # noqa: F401  a fixture

RAMP = np.linspace(0, 1, 200 * 150).reshape(150, 200)  # dark to bright; its mean is 127.5 of 255


def grey(path) -> np.ndarray:
    return np.asarray(load_image(path))[..., 0].astype(float)


def saved(path, pixels, **settings):
    Image.fromarray(pixels).save(path, **settings)
    return path


def spotted(peak: int, spots: int, value: int) -> np.ndarray:
    """A film of values up to `peak`, some pixels of which have another value."""
    pixels = (RAMP * peak).round().astype(np.int64)
    pixels.ravel()[np.random.default_rng(0).choice(pixels.size, spots, replace=False)] = value
    return pixels


# ---- bit depth ----------------------------------------------------------------


@pytest.mark.parametrize(
    "peak, bits",
    [(255, 8), (200, 8), (1023, 10), (900, 10), (2047, 12), (4095, 12), (16383, 14), (65535, 16)],
)
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_values_of_any_depth_in_a_16_bit_file_keep_their_brightness(tmp_path, peak, bits, suffix):
    """Bug: a film of 8 or 10 bits in a 16-bit PNG came out at a mean of 6 or 25 grey levels."""
    path = saved(tmp_path / f"film.{suffix}", (RAMP * peak).round().astype(np.uint16))
    assert np.abs(grey(path) - RAMP * 255 * peak / (2**bits - 1)).max() <= 1
    assert look(str(path)).depth == f"{bits} bits in 16"


@pytest.mark.parametrize("peak", [4095, 16383, 65535])
def test_true_films_are_read_as_ever(tmp_path, peak):
    """Bit for bit: figures of earlier versions hold. Noise, and films of a few pixels, which allow
    no outlier."""
    for shape in ((64, 64), (300, 200), (3, 4)):
        pixels = np.random.default_rng(0).integers(0, peak + 1, shape)
        pixels[0, :2] = 0, peak
        expected = (pixels.astype(np.float64) * (255 / peak)).round().clip(0, 255).astype(np.uint8)
        for name, kind in {
            "film.png": np.uint16,
            "film.tif": np.uint16,
            "big-endian.tif": ">u2",
            "film32.tif": np.int32,
        }.items():
            image = load_image(saved(tmp_path / name, pixels.astype(kind)))
            assert image.mode == "RGB" and all(
                (np.asarray(image)[..., c] == expected).all() for c in range(3)
            ), name


@pytest.mark.parametrize("spots, value", [(1, 65535), (1, 5000), (25, 30_000), (250, 65535)])
def test_hot_pixels_and_burnt_in_letters_do_not_darken_a_film(tmp_path, spots, value):
    """Bug: one hot pixel in a film of 12 bits left it at a sixteenth, or a quarter, of its
    brightness."""
    found = grey(saved(tmp_path / "film.png", spotted(4095, spots, value).astype(np.uint16)))
    assert np.abs(found - RAMP * 255).mean() < 1.5 and found.max() == 255


@pytest.mark.parametrize("spots, value", [(400, 65535), (250, 9000)])
def test_what_may_be_film_is_not_cut_off(tmp_path, spots, value):
    """More than a hundredth of the film, or near the rest: then the file is one of more bits."""
    path = saved(tmp_path / "film.png", spotted(4095, spots, value).astype(np.uint16))
    assert look(str(path)).depth == ("16 bits in 16" if value == 65535 else "14 bits in 16")


@pytest.mark.parametrize(
    "low, high", [(-1000, 1000), (-2048, 2047), (-500_000, 500_000), (-5, 250)]
)
def test_negative_values_are_no_black_area(tmp_path, low, high):
    """Bug: everything below 0 became black: half of a signed film."""
    path = saved(tmp_path / "film.tif", (low + RAMP * (high - low)).round().astype(np.int32))
    assert np.abs(grey(path) - RAMP * 255).max() <= 1 and look(str(path)).depth == "signed values"


def test_one_negative_pixel_makes_no_film_signed(tmp_path):
    found = grey(saved(tmp_path / "film.tif", spotted(4095, 1, -2000).astype(np.int32)))
    assert np.abs(found - RAMP * 255).mean() < 1


def png_with_sbit(path, bits: int) -> None:
    data = path.read_bytes()
    chunk = b"sBIT" + bytes([bits])
    path.write_bytes(
        data[:33] + struct.pack(">I", 1) + chunk + struct.pack(">I", zlib.crc32(chunk)) + data[33:]
    )


@pytest.mark.parametrize(
    "peak, bits, full",
    [
        (900, 12, 4095),
        (900, 10, 1023),
        (4000, 10, 4095),
        (65535, 12, 65535),
        (900, 0, 1023),
        (900, 16, 1023),
    ],
)
def test_the_bits_that_a_png_states(tmp_path, peak, bits, full):
    """A dark film of 12 bits is dark where its file says 12; one whose bits were moved up, as the
    standard has it, is not made white."""
    path = saved(tmp_path / "film.png", (RAMP * peak).round().astype(np.uint16))
    png_with_sbit(path, bits)
    assert np.abs(grey(path) - RAMP * 255 * peak / full).max() <= 1


@pytest.mark.parametrize(
    "tag, value, full", [(281, 4095, 4095), (341, 16000, 16383), (281, 65535, 1023), (281, 0, 1023)]
)
def test_the_largest_value_that_a_tiff_states(tmp_path, tag, value, full):
    path = saved(
        tmp_path / "film.tif", (RAMP * 900).round().astype(np.uint16), tiffinfo={tag: value}
    )
    assert np.abs(grey(path) - RAMP * 255 * 900 / full).max() <= 1


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_a_tiff_whose_zero_is_white(tmp_path, kind):
    """Bug: Pillow inverts such a film of 8 bits and leaves one of 16 a negative."""
    peak = 4095 if kind is np.uint16 else 255
    path = saved(tmp_path / "film.tif", (RAMP * peak).round().astype(kind))
    data = bytearray(path.read_bytes())
    place = data.index(struct.pack("<HHIH", 262, 3, 1, 1))  # PhotometricInterpretation
    data[place + 8] = 0
    path.write_bytes(data)
    assert np.abs(grey(path) - (255 - RAMP * 255)).max() <= 1


def test_16_bit_colour_of_which_pillow_reads_half_is_counted(tmp_path):
    """12-bit values in a 16-bit colour PNG come out at a sixteenth; `check` calls them dark."""
    values = np.repeat((RAMP * 4095).astype(">u2")[..., None], 3, 2)
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    path = saved(tmp_path / "film.png", np.zeros((150, 200, 3), np.uint8))
    data = path.read_bytes()[:8]
    for kind, content in {
        b"IHDR": struct.pack(">IIBBBBB", 200, 150, 16, 2, 0, 0, 0),
        b"IDAT": zlib.compress(rows),
        b"IEND": b"",
    }.items():
        data += struct.pack(">I", len(content)) + kind + content
        data += struct.pack(">I", zlib.crc32(kind + content))
    path.write_bytes(data)
    seen = look(str(path))
    assert seen.depth == "the upper 8 of 16 bits" and seen.faults == ("dark",)


# ---- orientation ----------------------------------------------------------------


def jpeg_with_notes(path, entries: list[tuple[int, int, int, bytes]]) -> None:
    """A JPEG of 9 x 6 with EXIF entries (tag, type, count, 4 bytes), unchecked."""
    ifd = (
        struct.pack(">H", len(entries))
        + b"".join(struct.pack(">HHI", *entry[:3]) + entry[3] for entry in entries)
        + bytes(4)
    )
    Image.new("L", (9, 6), 77).save(path, exif=b"Exif\0\0MM\0*\0\0\0\x08" + ifd)


@pytest.mark.parametrize(
    "note",
    [
        (0x0100, 2, 4, b"wid\0"),
        (0x0111, 2, 4, b"abc\0"),
        (0x0128, 2, 2, b"a\0\0\0"),
        (0x0100, 9, 1, b"\xff\xff\xff\xff"),
        (0x0100, 11, 1, b"\x7f\x80\0\0"),
        (0x8769, 4, 1, b"\0\0\xff\xff"),
        (0x9286, 99, 1, b"abcd"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_wrong_notes_of_a_camera(write, tmp_path, note):  # noqa: F811
    """Bug: `exif_transpose` writes all notes anew, so that one of a wrong type stopped a run in its
    middle; the reader did not turn the film, and found nothing wrong."""
    jpeg_with_notes(tmp_path / "film.jpg", sorted([(0x0112, 3, 1, b"\0\6\0\0"), note]))
    (sample,) = read_jsonl(write(REPORT | {"image": "film.jpg"}))
    assert load_image(sample.image).size == look(sample.image).size == (6, 9)


# ---- hostile files ----------------------------------------------------------------


@pytest.mark.parametrize("name", ["film.png", "film.jpg", "film.eps", "film"])
def test_no_program_is_started_for_an_eps(tmp_path, monkeypatch, name):
    """Bug: Pillow runs ghostscript on EPS text, whatever the file is called."""
    ghost = tmp_path / "bin/gs"
    ghost.parent.mkdir()
    ghost.write_text(f"#!/bin/sh\ntouch {tmp_path}/HARMED\n")
    ghost.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    (tmp_path / name).write_text(
        "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"
    )
    for read in (lambda: look(str(tmp_path / name)), lambda: load_image(tmp_path / name)):
        try:
            assert "is not a PNG, JPEG, TIFF" in read().error
        except ValueError as error:
            assert "is not a PNG, JPEG, TIFF" in str(error)
    assert not (tmp_path / "HARMED").exists()


@pytest.mark.parametrize("suffix", ["gif", "ico", "tga", "pcx", "jp2", "avif"])
def test_formats_of_no_film_are_refused_with_what_to_do(tmp_path, suffix):
    try:
        Image.new("RGB", (32, 32), "grey").save(tmp_path / f"film.{suffix}")
    except (OSError, KeyError):
        pytest.skip(f"this Pillow writes no {suffix}")
    (tmp_path / f"film.{suffix}").rename(tmp_path / "film.png")
    with pytest.raises(
        ValueError,
        match="film.png cannot be read .*is not a PNG, JPEG, TIFF, BMP, WEBP or PGM "
        "image.*convert it to one",
    ):
        load_image(tmp_path / "film.png")


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "bmp", "webp", "ppm"])
def test_formats_of_films_are_read(tmp_path, suffix):
    Image.fromarray((RAMP * 255).astype(np.uint8)).convert("RGB").save(tmp_path / f"film.{suffix}")
    assert np.abs(grey(tmp_path / f"film.{suffix}") - RAMP * 255).mean() < 2


def progressive(scans: int, size: int = 64) -> bytes:
    """A progressive JPEG in which one of its ten scans stands so many times more; each costs some
    30 bytes."""
    Image.new("RGB", (size, size), "grey").save(stream := io.BytesIO(), "JPEG", progressive=True)
    data = stream.getvalue()
    starts = [place for place in range(len(data)) if data[place : place + 2] == b"\xff\xda"]
    return data[:-2] + data[starts[-2] : starts[-1]] * scans + b"\xff\xd9"


def test_a_jpeg_of_thousands_of_scans(write, tmp_path):  # noqa: F811
    """Bug: 58 kB took 15 s to decode, 353 kB over 45 s."""
    (tmp_path / "bomb.jpg").write_bytes(progressive(5000))
    for read in (load_image, lambda path: read_jsonl(write(REPORT | {"image": str(path)}))):
        with pytest.raises(
            ValueError, match="bomb.jpg cannot be read .*more than 100 scans.*convert it"
        ):
            read(tmp_path / "bomb.jpg")


def test_scans_of_honest_jpegs(tmp_path):
    """Ten scans, a thumbnail of its own scans, and what cameras write behind the image."""
    # as bulk of a note: not decoded
    note = b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0" + progressive(300)
    data = progressive(0)
    with_note = data[:2] + b"\xff\xe1" + struct.pack(">H", len(note) + 2) + note + data[2:]
    for name, content in {
        "plain": data,
        "note": with_note,
        "behind": data + progressive(5000),
    }.items():
        (tmp_path / f"{name}.jpg").write_bytes(content)
        assert load_image(tmp_path / f"{name}.jpg").size == (64, 64)


def test_many_scans_of_a_large_film(monkeypatch, tmp_path):
    """What counts is how often a pixel is passed over: fewer scans of more pixels."""
    from minigrpo.data import film

    monkeypatch.setattr(film, "MOST_SCANNED", 64 * 64 * 50)
    (tmp_path / "film.jpg").write_bytes(progressive(20))
    assert load_image(tmp_path / "film.jpg").size == (64, 64)
    (tmp_path / "film.jpg").write_bytes(progressive(60))
    with pytest.raises(ValueError, match="scans"):
        load_image(tmp_path / "film.jpg")


@pytest.mark.parametrize("big", [False, True])
def test_a_tiff_of_a_million_tiles(tmp_path, big):
    """A tile a pixel: 8 MB took half a minute and 600 MB."""
    side, count = 1000, 1_000_000
    tags = [
        (256, 4, 1, side),
        (257, 4, 1, side),
        (258, 3, 1, 8),
        (259, 3, 1, 1),
        (262, 3, 1, 1),
        (322, 4, 1, 1),
        (323, 4, 1, 1),
        (324, 4, count, 16),
    ]
    if big:  # BigTIFF, big-endian
        head, number, entry = struct.pack(">2sHHHQ", b"MM", 43, 8, 0, 16 + 4 * count), ">Q", ">HHQQ"
    else:
        head, number, entry = struct.pack("<2sHIQ", b"II", 42, 16 + 4 * count, 0), "<H", "<HHII"
    table = struct.pack(number, len(tags)) + b"".join(struct.pack(entry, *tag) for tag in tags)
    (tmp_path / "film.tif").write_bytes(head + bytes(4 * count) + table + bytes(8))
    with pytest.raises(ValueError, match="a TIFF of more than 100,000 strips or tiles"):
        load_image(tmp_path / "film.tif")


def test_films_in_tiles_and_strips_are_read(tmp_path):
    for name, settings in {"strips.tif": {278: 1}, "one.tif": {278: 150}}.items():
        saved(
            tmp_path / name,
            (RAMP * 255).astype(np.uint8),
            tiffinfo=settings,
            compression="tiff_lzw",
        )
        assert np.abs(grey(tmp_path / name) - RAMP * 255).max() <= 1


@pytest.mark.parametrize(
    "head", [b"P2\n2100 2000\n255\n", b"P5\n2100 2000\n4095\n", b"P3\n2100 2000\n255\n"]
)
def test_a_large_ppm_that_python_would_decode(tmp_path, head):
    (tmp_path / "film.pgm").write_bytes(head + b"0 " * 100)
    with pytest.raises(ValueError, match="takes minutes to decode: convert it to PNG"):
        load_image(tmp_path / "film.pgm")
    (tmp_path / "small.pgm").write_bytes(b"P2\n3 2\n4095\n0 1 2 4095 4 5\n")
    assert grey(tmp_path / "small.pgm")[1, 0] == 255


def test_a_large_16_bit_film_makes_no_large_copies(tmp_path):
    """Bug: 100 million pixels took 2.2 GB, since all were copied as float64, three times."""
    Image.new("I;16", (3000, 2500), 1000).save(tmp_path / "film.png")
    tracemalloc.start()
    load_image(tmp_path / "film.png")
    look(str(tmp_path / "film.png"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 60e6  # it was 180 MB; a block of a million pixels takes 8


@pytest.mark.filterwarnings("ignore")
def test_damaged_images_are_named_and_nothing_else(tmp_path):
    """Bits, lengths and bytes at random: decoders raise a dozen kinds of errors, all of which must
    be one that a program catches."""
    rng, refused = random.Random(0), 0
    kinds = {
        "png": np.uint16,
        "tif": np.uint16,
        "jpg": np.uint8,
        "bmp": np.uint8,
        "webp": np.uint8,
        "pgm": np.uint8,
    }
    for suffix, kind in kinds.items():
        whole = saved(
            tmp_path / f"whole.{suffix}", (RAMP[::5, ::5] * 255).astype(kind)
        ).read_bytes()
        for _ in range(60):
            data = bytearray(whole)
            for _ in range(rng.randint(1, 6)):
                place = rng.randrange(min(len(data), rng.choice([40, 10_000])))
                data[place : place + rng.choice([0, 1, 1, 4])] = rng.randbytes(
                    rng.choice([0, 1, 1, 4])
                )
            path = tmp_path / f"film.{suffix}"
            path.write_bytes(data)
            try:
                load_image(path)
                assert look(str(path)).error is None
            except ValueError as error:
                refused += 1
                assert f"image {path} cannot be read (" in str(error)
                assert look(str(path)).error.startswith(f"image {path} cannot be read (")
    assert refused > 100


def test_every_image_is_opened_with_a_list_of_formats():
    """Each of Pillow's forty formats is a way in, and a film's only door is film.py."""
    root = Path(minigrpo.__file__).parent.parent
    files = [*root.glob("*.py"), *(root / "minigrpo").rglob("*.py")]
    lines = [line for file in files for line in file.read_text().splitlines()]
    calls = [line for line in lines if "Image.open(" in line]
    assert calls and all("formats=" in line for line in calls)


def test_a_film_that_vanishes_in_a_run(policy, write, tmp_path):  # noqa: F811
    """Bug: a FileNotFoundError from within Pillow named neither the JSONL file nor the line."""
    (sample,) = read_jsonl(write("", REPORT))
    (tmp_path / "film.png").unlink()
    with pytest.raises(
        DataError,
        match=r"data.jsonl:2: image .*film.png cannot be read \(no such file\): restore it",
    ):
        policy.encode([sample])
