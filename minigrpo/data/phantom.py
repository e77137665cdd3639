"""Drawn chest films with true boxes, reports and questions, so that everything runs before any real
data is granted.

    python -m minigrpo.data.phantom --output_dir data/phantom --train 2000 --test 200

A film is a sum of what the beam passes (body, heart, bones) minus the air of the lungs. A finding
is drawn as a mask; its box is that mask's bounding box and the report is written from the same list
of findings, so labels are true even where the drawing is too faint for a reader to be sure. THE
PATIENT'S RIGHT IS ON THE IMAGE'S LEFT, as on a real film.

Body coordinates (u, v): u from the midline, positive towards the image's right, v downwards, both
in film widths. They reach the image by a small rotation and shift. Within a lung, t runs from 0
(apex) to 1 (top of the diaphragm's dome).
"""

import json
import multiprocessing
import os
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from scipy import ndimage
from tqdm import tqdm

from minigrpo.data import templates
from minigrpo.data.boxes import format_boxes
from minigrpo.run.files import aside, sync_all, write_aside
from minigrpo.run.terminal import Parser, fail

SPLITS = ("train", "test")
SIDES = {"right": -1, "left": 1}  # sign of u
COUNTS = (0.06, 0.12, 0.24, 0.32, 0.26)  # chance of 0, 1, 2, 3, 4 kinds of finding on a film
HEART_RATIOS = {
    "": (0.40, 0.49),
    "mild": (0.515, 0.56),
    "moderate": (0.56, 0.61),
    "severe": (0.61, 0.68),
}
STEPS = 4  # points drawn from one point of an outline to the next

# (u in lung widths, t), from the apex down the lateral wall, along the dome, up the middle
LUNG_OUTLINE = np.array([
    (0.42, -0.01), (0.62, 0.05), (0.80, 0.19), (0.91, 0.40), (0.97, 0.62), (1.00, 0.85),
    (1.00, 1.05), (0.985, 1.17), (0.90, 1.08), (0.76, 1.025), (0.54, 1.0), (0.34, 1.005),
    (0.15, 1.03), (0.13, 0.85), (0.15, 0.62), (0.16, 0.42), (0.18, 0.24), (0.24, 0.08),
])  # fmt: skip
WALL, DOME = slice(0, 8), slice(7, 13)
# (u in heart widths, height) from the top left on the image, counter-clockwise
HEART_OUTLINE = np.array([
    (0.22, 1.0), (0.10, 0.80), (0.01, 0.52), (0.0, 0.30), (0.06, 0.08), (0.25, -0.03),
    (0.55, -0.08), (0.86, -0.06), (0.99, 0.08), (0.99, 0.26), (0.87, 0.52), (0.68, 0.80),
    (0.52, 1.0),
])  # fmt: skip


@dataclass
class Patient:
    """Body and exposure of one patient; lengths in film widths."""

    centre: float
    tilt: float  # radians in the image plane
    turn: float  # how far rotation about the spine moves the front of the chest
    width: float  # midline to the lateral lung wall
    asymmetry: float
    apex: float
    dome: dict[str, float]  # v of the diaphragm's top, per side
    heart_ratio: float  # heart width over chest width
    heart_shift: float
    habitus: float  # 0 slim .. 1 heavy
    bone: float
    breast: float  # 0 none
    contrast: float
    brightness: float
    noise: float
    blur: float  # film widths
    # where the collimated field lies on the film: left, top, side length
    field: tuple[float, float, float]

    def lung(self, side: str, outline: np.ndarray = LUNG_OUTLINE) -> np.ndarray:
        """Lung coordinates (n, 2) of `outline` to body coordinates (n, 2)."""
        sign = SIDES[side]
        u = sign * outline[:, 0] * self.width * (1 + sign * self.asymmetry)
        return np.stack([u, self.apex + outline[:, 1] * (self.dome[side] - self.apex)], 1)

    def level(self, side: str, t: float) -> float:
        return self.apex + t * (self.dome[side] - self.apex)


@dataclass
class Finding:
    label: str
    side: str | None
    zone: str | None  # upper, mid, lower third of that lung
    severity: str | None
    mask: np.ndarray  # (size, size) bool, what was drawn
    box: list[float]  # of the mask, in 0..1


@dataclass
class Film:
    pixels: np.ndarray  # (size, size) uint8
    findings: list[Finding]
    regions: dict[str, np.ndarray]  # anatomy name -> (size, size) bool


@dataclass
class Statement:
    text: str
    findings: list[Finding]  # what it states and locates; empty for a negative and a remark


def box_of(mask: np.ndarray) -> list[float]:
    """Bounding box [x1, y1, x2, y2] in 0..1 of the true pixels of `mask` (size, size), outer edges
    of the pixels.
    """
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    x1, y1, x2, y2 = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
    return [round(float(x / mask.shape[0]), 4) for x in (x1, y1, x2, y2)]


def smooth_curve(points, closed=True) -> np.ndarray:
    """Catmull-Rom curve through `points` (n, 2)."""
    p = np.asarray(points, float)
    p = np.concatenate([p[-1:], p, p[:2]]) if closed else np.concatenate([p[:1], p, p[-1:]])
    a, b, c, d = p[:-3], p[1:-2], p[2:-1], p[3:]
    s = np.linspace(0, 1, STEPS, endpoint=not closed)[:, None, None]
    curve = 0.5 * (
        2 * b + (c - a) * s + (2 * a - 5 * b + 4 * c - d) * s**2 + (3 * b - a - 3 * c + d) * s**3
    )
    return curve.transpose(1, 0, 2).reshape(-1, 2)


def ellipse(u, v, radius_u, radius_v) -> np.ndarray:
    angle = np.linspace(0, 2 * np.pi, 32, endpoint=False)
    return np.stack([u + radius_u * np.cos(angle), v + radius_v * np.sin(angle)], 1)


class Pen:
    """Draws body coordinates into (size, size) images, at twice the size and reduced, since PIL has
    no soft edges.
    """

    def __init__(self, patient: Patient, size: int):
        self.patient, self.size = patient, size
        self.centres = (np.arange(size, dtype=np.float32) + 0.5) / size  # of the pixels
        x, y = self.centres - np.float32(patient.centre), self.centres[:, None] - np.float32(0.5)
        tilt = np.float32(patient.tilt)
        self.u, self.v = x + tilt * y, y - tilt * x + np.float32(0.5)  # (size, size) each

    def pixels(self, points) -> list[tuple]:
        (u, v), (centre, tilt) = (
            np.asarray(points, float).T,
            (self.patient.centre, self.patient.tilt),
        )
        scale = 2 * self.size
        x, y = scale * (u - tilt * (v - 0.5) + centre), scale * (v + tilt * u)
        return list(zip(x.tolist(), y.tolist(), strict=True))

    def canvas(self):
        image = Image.new("L", (2 * self.size, 2 * self.size))
        return image, ImageDraw.Draw(image)

    def fill(self, *outlines) -> Image.Image:
        image, draw = self.canvas()
        for outline in outlines:
            draw.polygon(self.pixels(outline), fill=255)
        return image.reduce(2)

    def stroke(self, *lines) -> Image.Image:
        """Each line is (points, width in film widths, level 0..1); a later line covers an earlier
        one.
        """
        image, draw = self.canvas()
        for points, width, level in lines:
            draw.line(
                self.pixels(points),
                fill=round(255 * level),
                width=max(1, round(2 * self.size * width)),
            )
        return image.reduce(2)

    def soft(self, image: Image.Image, blur: float = 0.0) -> np.ndarray:
        """(size, size) in 0..1, blurred by `blur` film widths. A broad blur is done on a smaller
        image, which is faster.
        """
        if blur:
            small = max(1, int(blur * self.size / 0.7))
            image = image.reduce(small).filter(ImageFilter.GaussianBlur(blur * self.size / small))
            # reduce() rounds up, so the last small pixel may reach beyond the film
            part = self.size / small
            image = image.resize(
                (self.size, self.size), Image.Resampling.BILINEAR, box=(0, 0, part, part)
            )
        return np.asarray(image, np.float32) * np.float32(1 / 255)

    def blob(self, u, v, radius_u, radius_v) -> np.ndarray:
        """A Gaussian spot, (size, size); upright, so that it is a product of a row and a column."""
        x, y = (pixel / (2 * self.size) for pixel in self.pixels([(u, v)])[0])
        row, column = (
            np.exp(-(((self.centres - at) / float(r)) ** 2))
            for at, r in ((x, radius_u), (y, radius_v))
        )
        return column[:, None] * row


def smooth_noise(rng, size: int, cells: int) -> np.ndarray:
    """(size, size) noise of unit spread and `cells` bumps a side."""
    coarse = Image.fromarray(rng.standard_normal((cells, cells), dtype=np.float32))
    return np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC))


def solid(image: Image.Image) -> np.ndarray:
    return np.asarray(image) > 127


def draw_patient(rng, enlarged: str) -> Patient:
    """A patient whose heart is `enlarged` ("mild", "moderate", "severe") or normal ("")."""
    right, side = rng.uniform(0.69, 0.79), rng.uniform(0.72, 1.0)
    return Patient(
        centre=0.5 + rng.normal(0, 0.012),
        tilt=float(np.clip(rng.normal(0, 0.018), -0.05, 0.05)),
        turn=rng.normal(0, 0.010),
        width=rng.uniform(0.345, 0.405),
        asymmetry=rng.normal(0, 0.015),
        apex=rng.uniform(0.085, 0.13),
        dome={"right": right, "left": right + rng.uniform(0.015, 0.045)},
        heart_ratio=rng.uniform(*HEART_RATIOS[enlarged]),
        heart_shift=rng.uniform(0.62, 0.70),
        habitus=rng.beta(2, 3),
        bone=rng.uniform(0.7, 1.2),
        breast=rng.uniform(0.4, 1.0) if rng.random() < 0.45 else 0.0,
        contrast=rng.uniform(0.85, 1.15),
        brightness=rng.normal(0, 0.03),
        noise=rng.uniform(0.008, 0.026),
        blur=rng.uniform(0.0006, 0.003),
        field=(rng.uniform(0, 1 - side), rng.uniform(0, 1 - side), side),
    )


def draw_regions(pen: Pen) -> dict[str, np.ndarray]:
    """Anatomy that one may ask for: name -> (size, size) bool. A lung is its whole field, whatever
    hides in it later.
    """
    p = pen.patient
    covers = {"cardiac silhouette": pen.fill(heart_outline(p))}
    covers["upper mediastinum"] = pen.fill(mediastinum_outline(p, 0.45))
    covers["trachea"] = pen.stroke((trachea_line(p), 0.036, 1.0))
    covers["aortic arch"] = pen.fill(aortic_arch(p))
    for side in SIDES:
        dome = smooth_curve(p.lung(side, LUNG_OUTLINE[DOME]), closed=False)
        covers[f"{side} lung"] = pen.fill(smooth_curve(p.lung(side)))
        covers[f"{side} clavicle"] = pen.stroke((clavicle_line(p, side), 0.026, 1.0))
        covers[f"{side} hemidiaphragm"] = pen.stroke((dome, 0.012, 1.0))
    return {name: solid(cover) for name, cover in covers.items()}


def heart_outline(p: Patient) -> np.ndarray:
    width = p.heart_ratio * 2 * p.width
    height = min(0.82 * width, 0.9 * (p.dome["left"] - p.apex) - 0.12)
    u = (HEART_OUTLINE[:, 0] - 1 + p.heart_shift) * width + 0.6 * p.turn
    return smooth_curve(np.stack([u, p.dome["left"] + 0.022 - HEART_OUTLINE[:, 1] * height], 1))


def mediastinum_outline(p: Patient, t: float) -> np.ndarray:
    """Down to lung height `t`."""
    w, turn = p.width, p.turn
    right = [
        (-0.12 * w, p.apex - 0.02),
        (-0.16 * w + turn, p.level("right", 0.2)),
        (-0.19 * w + turn, p.level("right", t)),
    ]
    left = [
        (0.19 * w + turn, p.level("left", t)),
        (0.17 * w + turn, p.level("left", 0.12)),
        (0.12 * w, p.apex - 0.02),
    ]
    return smooth_curve(right + left)


def aortic_arch(p: Patient) -> np.ndarray:
    return ellipse(0.19 * p.width + p.turn, p.level("left", 0.27), 0.085 * p.width, 0.042)


def trachea_line(p: Patient) -> list[tuple[float, float]]:
    return [
        (0.3 * p.turn, -0.02),
        (0.5 * p.turn, p.level("right", 0.15)),
        (p.turn - 0.008, p.level("right", 0.40)),
    ]


def clavicle_line(p: Patient, side: str) -> np.ndarray:
    across, t = (
        np.array([0.10, 0.34, 0.66, 1.02]) * SIDES[side] * p.width,
        (0.13, 0.10, 0.005, -0.03),
    )
    across[0] += 1.5 * p.turn
    return smooth_curve(
        [(u, p.level(side, k)) for u, k in zip(across, t, strict=True)], closed=False
    )


def draw_vessels(pen: Pen, rng) -> Image.Image:
    """Branching from each hilum, thinner and fainter outwards."""
    p, lines = pen.patient, []
    for side, sign in SIDES.items():
        start = np.linspace(-0.06, 0.07, 9)
        points = np.stack(
            [np.full(9, sign * 0.2 * p.width + p.turn), p.level(side, 0.47) + start], 1
        )
        angles = np.linspace(-1.25, 1.3, 9) + rng.normal(0, 0.15, 9)  # 0 points to the side
        length, width, level = 0.09, 0.013, 0.9
        for generation in range(4):
            steps = length * rng.uniform(0.35, 0.65, (2, len(angles), 1))
            middle = points + steps[0] * np.stack([sign * np.cos(angles), np.sin(angles)], 1)
            angles = angles + rng.normal(0, 0.3, len(angles))
            ends = middle + steps[1] * np.stack([sign * np.cos(angles), np.sin(angles)], 1)
            lines += [(curve, width, level) for curve in np.stack([points, middle, ends], 1)]
            keep = rng.random(2 * len(ends)) < (1.0, 0.8, 0.5, 0.0)[generation]
            points, angles = (
                np.repeat(ends, 2, 0)[keep],
                (np.repeat(angles, 2) + np.tile([-0.38, 0.38], len(ends)))[keep],
            )
            length, width, level = 0.85 * length, 0.62 * width, 0.75 * level
    return pen.stroke(*lines)


def draw_bones(pen: Pen, rng) -> np.ndarray:
    """Ribs, vertebrae, clavicles and shoulders as brightness (size, size)."""
    p, back, edges, front, thick = pen.patient, [], [], [], []
    for side, sign in SIDES.items():
        wall = smooth_curve(p.lung(side, LUNG_OUTLINE[WALL]), closed=False)
        spacing = (p.dome[side] + 0.10 - p.apex) / 9.5
        for k in range(11):
            v, fall, drop = (
                p.apex - 0.012 + k * spacing + rng.normal(0, 0.002),
                0.055 + 0.006 * k,
                0.10 + 0.012 * k,
            )
            # just outside the lung
            end = float(np.interp(v + fall, wall[:, 1], np.abs(wall[:, 0]))) + 0.012
            rib = [(0.1 * p.width, v), (0.42 * end, v - 0.018), (0.78 * end, v + 0.2 * fall),
                   (0.95 * end, v + 0.7 * fall), (end, v + 1.25 * fall)]  # fmt: skip
            rib = smooth_curve(np.array(rib) * [sign, 1], closed=False)
            back.append((rib, 0.026, 0.5))
            edges += [(rib - [0, 0.012], 0.004, 0.75), (rib + [0, 0.012], 0.006, 1.0)]
            if 0 < k < 8:
                v += fall
                cartilage = [
                    (end, v),
                    (0.86 * end, v + 0.6 * drop),
                    (0.62 * end, v + drop),
                    (0.42 * p.width, v + drop + 0.012),
                ]
                front.append(
                    (smooth_curve(np.array(cartilage) * [sign, 1], closed=False), 0.030, 0.35)
                )
        thick.append((clavicle_line(p, side), 0.026, 0.8))
        u = sign * (p.width + 0.03)
        # the scapula's inner border
        thick += [([(u * 0.86, 0.17), (u * 0.80, 0.28), (u * 0.98, 0.46)], 0.009, 0.35)]
        thick += [
            ([(u * 0.86, 0.17), (u * 1.16, 0.13)], 0.022, 0.5),
            (ellipse(u * 1.19, 0.155, 0.055, 0.055), 0.014, 0.5),
        ]
    u = p.turn / 2
    # between vertebrae
    edges += [([(u - 0.042, v), (u + 0.042, v)], 0.010, 0.22) for v in np.arange(0.02, 1.0, 0.052)]
    pedicles = [(u + side, v) for v in np.arange(0.04, 0.75, 0.052) for side in (-0.027, 0.027)]
    edges += [([(u, v), (u, v + 0.012)], 0.009, 0.45) for u, v in pedicles]
    back, front, thick = pen.stroke(*back, *edges), pen.stroke(*front), pen.stroke(*thick)
    return 0.095 * pen.soft(back) + 0.10 * pen.soft(front, 0.004) + 0.15 * pen.soft(thick)


# Findings. Each function changes the layers of a drawing and notes what it drew.


@dataclass
class Drawing:
    """The layers of a film that findings act on, each (size, size)."""

    pen: Pen
    rng: np.random.Generator
    regions: dict[str, np.ndarray]  # bool; those that a finding hides are taken out
    lung: np.ndarray  # coverage 0..1 of lung tissue, both lungs
    air: np.ndarray  # what is left of them, 0..1 and a little more where a lung has collapsed
    vessels: np.ndarray
    added: np.ndarray  # brightness
    free: np.ndarray  # bool: a spot here can be seen, away from lung edge, heart and other findings
    findings: list[Finding]

    def side_of(self, side: str) -> np.ndarray:
        return np.sign(self.pen.u) == SIDES[side]

    def found(self, label: str, mask: np.ndarray, side=None, severity=None) -> None:
        box, zone = box_of(mask), None
        if side:
            _, top, _, bottom = box_of(self.regions[f"{side} lung"])
            middle = ((box[1] + box[3]) / 2 - top) / (bottom - top)
            zone = ("upper", "mid", "lower")[int(np.clip(3 * middle, 0, 2))]
        self.findings.append(Finding(label, side, zone, severity, mask, box))

    def block(self, mask: np.ndarray, margin: float) -> None:
        """Keep later spots off the box of `mask`, `margin` film widths around."""
        x1, y1, x2, y2 = (round(edge * self.pen.size) for edge in box_of(mask))
        m = round(margin * self.pen.size)
        self.free[max(0, y1 - m) : y2 + m, max(0, x1 - m) : x2 + m] = False

    def spots(self, chances, margin: float = 0.0):
        """Yields (side, u, v) of one to three places in free lung, `margin` film widths inside, as
        long as there is room.
        """
        for _ in range(1 + self.rng.choice(len(chances), p=chances)):
            room = self.free
            if margin:
                room = (
                    ndimage.minimum_filter1d(
                        room.astype(np.uint8), 2 * round(margin * self.pen.size) + 1, axis=1
                    )
                    > 0
                )
                room &= self.pen.v > self.pen.patient.level("right", 0.5)
            places = np.flatnonzero(room)
            if len(places) < 30:
                return
            k = self.rng.choice(places)
            u, v = self.pen.u.flat[k], self.pen.v.flat[k]
            yield ("left" if u > 0 else "right"), float(u), float(v)


def draw(rng, chances: dict[str, float]) -> str:
    return str(rng.choice(list(chances), p=list(chances.values())))


def visibility(rng) -> float:
    """0 barely visible .. 1 plain."""
    return rng.beta(3.0, 1.5)


def add_cardiomegaly(d: Drawing) -> None:
    severity = next(
        name
        for name, (_, high) in HEART_RATIOS.items()
        if d.pen.patient.heart_ratio < high and name
    )
    d.found("cardiomegaly", d.regions["cardiac silhouette"], severity=severity)


def add_pneumothorax(d: Drawing) -> None:
    """The lung shrinks towards its lower inner corner; outside it, air without vessels behind a
    thin white line.
    """
    side, severity = (
        draw(d.rng, {"right": 0.5, "left": 0.5}),
        draw(d.rng, {"small": 0.45, "moderate": 0.35, "large": 0.2}),
    )
    shrink, reach = {"small": (0.13, 0.6), "moderate": (0.21, 1.0), "large": (0.36, 1.7)}[severity]
    p, outline = d.pen.patient, LUNG_OUTLINE.copy()
    pull = shrink * d.rng.uniform(0.9, 1.25) * np.clip(1.15 * (1 - outline[:, 1] / reach), 0, 1)
    outline[:, 0] -= pull * (outline[:, 0] - 0.14)
    outline[:, 1] += 0.55 * pull * np.clip(1 - outline[:, 1], 0, 1)
    collapsed = smooth_curve(p.lung(side, outline))
    gap = d.regions[f"{side} lung"] & ~solid(d.pen.fill(collapsed))
    # The gap narrows to nothing: keep what is wider than a few pixels, or the box would follow an
    # invisible sliver.
    gap = ndimage.binary_opening(gap, iterations=max(1, round(0.006 * d.pen.size)))
    pleura = collapsed[: STEPS * WALL.stop]
    pleura = pleura[pleura[:, 1] < p.level(side, min(0.9 * reach, 1.05))]
    soft, plain = d.pen.soft(Image.fromarray(255 * gap.astype(np.uint8)), 0.002), visibility(d.rng)
    denser = (
        {"small": 0.0, "moderate": 0.05, "large": 0.14}[severity] * (1 - soft) * d.side_of(side)
    )
    d.air *= 1 + (0.14 + 0.16 * plain) * soft - denser
    d.vessels *= 1 - soft
    d.lung *= 1 - soft
    d.added += (0.10 + 0.12 * plain) * d.pen.soft(d.pen.stroke((pleura, 0.007, 1.0)))
    d.free &= ~gap
    d.found("pneumothorax", gap, side, severity)


def add_effusion(d: Drawing) -> None:
    """Fluid below a surface that climbs towards the wall, on one side or both."""
    p = d.pen.patient
    # not under a pneumothorax
    sides = [side for side in SIDES if all(f.side != side for f in d.findings)]
    if len(sides) == 2 and d.rng.random() < 0.5:
        sides = [draw(d.rng, {"right": 0.5, "left": 0.5})]
    for side in sides:
        severity, plain = (
            draw(d.rng, {"small": 0.5, "moderate": 0.35, "large": 0.15}),
            visibility(d.rng),
        )
        height = {"small": (0.84, 0.92), "moderate": (0.64, 0.78), "large": (0.38, 0.56)}[severity]
        across = np.clip(np.abs(d.pen.u) / p.width, 0, 1.1)
        surface = p.level(side, d.rng.uniform(*height)) + d.rng.uniform(0.06, 0.08) * (
            0.7 - 1.5 * across**3
        )
        fluid = np.clip((d.pen.v - surface) / 0.03 + 0.5, 0, 1) * d.side_of(side)
        mask = (fluid > 0.5) & d.regions[f"{side} lung"]
        d.air *= 1 - (0.70 + 0.30 * plain) * fluid
        d.vessels *= 1 - fluid
        d.added += 0.08 * fluid * d.lung
        d.free &= fluid < 0.01
        d.found("pleural effusion", mask, side, severity)
        del d.regions[f"{side} hemidiaphragm"]  # hidden by the fluid


def add_consolidation(d: Drawing) -> None:
    """Part of a lobe from the hilum to the wall, in one zone or two."""
    pen = d.pen
    for _ in range(1 + (d.rng.random() < 0.25)):
        places = [
            place
            for place in ((side, t) for side in SIDES for t in (0.24, 0.52, 0.8))
            if room(d, *place, 0.13) > 0.6
        ]
        if not places:
            return
        side, t = places[d.rng.integers(len(places))]
        severity, plain = (
            draw(d.rng, {"mild": 0.4, "moderate": 0.4, "severe": 0.2}),
            visibility(d.rng),
        )
        half = {"mild": 0.10, "moderate": 0.135, "severe": 0.17}[severity]
        depth = np.abs(
            height_in_lung(pen, side)
            - t
            - d.rng.uniform(-0.04, 0.04)
            + 0.02 * smooth_noise(d.rng, pen.size, 14)
        )
        grain = 0.16 * smooth_noise(d.rng, pen.size, 24) + 0.12 * smooth_noise(d.rng, pen.size, 55)
        cloud = (
            np.clip((half - depth) / 0.08 + 0.5, 0, 1)
            * (1 + np.clip(grain, -0.4, 0.4))
            * d.lung
            * d.side_of(side)
        )
        mask = (depth < half) & d.regions[f"{side} lung"] & ~d.regions["cardiac silhouette"]
        d.air *= 1 - (0.65 + 0.3 * plain) * np.clip(cloud, 0, 1)
        d.free &= cloud < 0.1
        d.found("consolidation", mask, side, severity)


def height_in_lung(pen: Pen, side: str) -> np.ndarray:
    """t of every pixel (size, size): 0 at that lung's apex, 1 at its dome."""
    return (pen.v - pen.patient.apex) / (pen.patient.dome[side] - pen.patient.apex)


def room(d: Drawing, side: str, t: float, half: float) -> float:
    """Share of the lung around height t in which nothing was drawn yet."""
    band = (
        d.regions[f"{side} lung"]
        & (np.abs(height_in_lung(d.pen, side) - t) < half)
        & ~d.regions["cardiac silhouette"]
    )
    return float(d.free[band].mean()) / 0.75  # its rim is never free


def add_atelectasis(d: Drawing) -> None:
    """Plate-like: one to three nearly level bands above a dome."""
    p = d.pen.patient
    sides = [side for side in SIDES if room(d, side, 0.82, 0.13) > 0.6]
    if len(sides) == 2 and d.rng.random() < 0.75:
        sides = [draw(d.rng, {"right": 0.5, "left": 0.5})]
    for side in sides:
        severity, plain = (
            draw(d.rng, {"mild": 0.4, "moderate": 0.4, "severe": 0.2}),
            visibility(d.rng),
        )
        u, v = (
            SIDES[side] * p.width * d.rng.uniform(0.58, 0.66),
            p.level(side, d.rng.uniform(0.86, 0.92)),
        )
        slope, bands = d.rng.uniform(-0.25, 0.25), []
        for k in range({"mild": 1, "moderate": 2, "severe": 3}[severity]):
            centre = np.array([u + d.rng.normal(0, 0.008), v - 0.04 * k])
            half = d.rng.uniform(0.08, 0.10) * np.array([1.0, slope + d.rng.normal(0, 0.08)])
            band = smooth_curve([centre - half, centre + [0, 0.007], centre + half], closed=False)
            bands.append((band, d.rng.uniform(0.020, 0.026), 1.0))
        cover = d.pen.stroke(*bands)
        mask = solid(cover) & d.regions[f"{side} lung"]
        d.added += (0.14 + 0.10 * plain) * d.pen.soft(cover, 0.003) * d.lung
        d.block(mask, 0.04)
        d.found("atelectasis", mask, side, severity)


def add_nodule(d: Drawing) -> None:
    """One to three slightly lobed discs."""
    for side, u, v in d.spots((0.7, 0.3)):
        severity, plain = (
            draw(d.rng, {"small": 0.4, "moderate": 0.35, "large": 0.25}),
            visibility(d.rng),
        )
        radius = d.rng.uniform(
            *{"small": (0.040, 0.048), "moderate": (0.054, 0.064), "large": (0.072, 0.085)}[
                severity
            ]
        )
        angle, distance = np.arctan2(d.pen.v - v, d.pen.u - u), np.hypot(d.pen.u - u, d.pen.v - v)
        lobes = 0.09 * np.cos(2 * angle + d.rng.uniform(0, 6)) + 0.05 * np.cos(
            5 * angle + d.rng.uniform(0, 6)
        )
        depth = distance / (radius * (1 + lobes))
        mask = depth <= 1
        d.added += (0.16 + 0.16 * plain) * np.clip((1.12 - depth) / 0.4, 0, 1)
        d.block(mask, 0.04)
        d.found("nodule", mask, side, severity)


def add_pacemaker(d: Drawing) -> None:
    """The box is the generator's; its lead runs through the upper vein into the heart."""
    p, pen = d.pen.patient, d.pen
    side, mid = draw(d.rng, {"left": 0.85, "right": 0.15}), p.turn - 0.13 * p.width
    u, v = (
        SIDES[side] * p.width * d.rng.uniform(0.62, 0.74),
        p.level(side, d.rng.uniform(0.14, 0.22)),
    )
    shape = np.array([(-0.05, -0.03), (0.05, -0.035), (0.052, 0.02), (0, 0.045), (-0.052, 0.02)])
    generator = pen.fill(smooth_curve(shape + [u, v]))
    lead = [(u, v - 0.03), (SIDES[side] * 0.35 * p.width, v - 0.06), (mid + 0.03, v + 0.05),
            (mid, p.level("right", 0.6)), (0.0, p.dome["left"] - 0.06),
            (0.18 * p.width, p.dome["left"] - 0.03)]  # fmt: skip
    wire = pen.stroke((smooth_curve(lead, closed=False), 0.005, 1.0))
    header = pen.fill(ellipse(u - 0.02, v - 0.012, 0.018, 0.008))
    d.added += 0.40 * pen.soft(generator) + 0.15 * pen.soft(header) + 0.20 * pen.soft(wire)
    d.found("pacemaker", solid(generator), side)


def add_endotracheal_tube(d: Drawing) -> None:
    p, tip = d.pen.patient, d.pen.patient.level("right", d.rng.uniform(0.22, 0.34))
    bend = d.rng.choice([-1, 1]) * d.rng.uniform(0.006, 0.014)
    line = [(bend, -0.05), (0.3 * p.turn - 0.5 * bend, 0.6 * tip), (0.7 * p.turn, tip)]
    line = smooth_curve(line, closed=False)
    walls = d.pen.stroke(
        (line, 0.017, 0.45), (line + [0.007, 0], 0.004, 1.0), (line - [0.007, 0], 0.004, 0.7)
    )
    d.added += (0.16 + 0.14 * visibility(d.rng)) * d.pen.soft(walls)
    d.found("endotracheal tube", solid(d.pen.stroke((line, 0.019, 1.0))))


def add_nasogastric_tube(d: Drawing) -> None:
    p, v = d.pen.patient, d.pen.patient.dome["left"]
    line = [
        (0.01, -0.05),
        (0.012 + 0.5 * p.turn, p.level("left", 0.3)),
        (0.0, p.level("left", 0.7)),
        (0.03, v + 0.02),
        (d.rng.uniform(0.09, 0.13), v + 0.10),
        (d.rng.uniform(0.17, 0.22), v + d.rng.uniform(0.06, 0.12)),
    ]
    cover = d.pen.stroke((smooth_curve(line, closed=False), 0.009, 1.0))
    d.added += (0.16 + 0.12 * visibility(d.rng)) * d.pen.soft(cover)
    d.found("nasogastric tube", solid(cover))


# label: (chance before "no kind twice", function), in drawing order: what needs room comes after
# what fills it
KINDS = {
    "cardiomegaly": (0.16, add_cardiomegaly),
    "pneumothorax": (0.12, add_pneumothorax),
    "pleural effusion": (0.18, add_effusion),
    "consolidation": (0.12, add_consolidation),
    "atelectasis": (0.05, add_atelectasis),
    "nodule": (0.05, add_nodule),
    "pacemaker": (0.10, add_pacemaker),
    "endotracheal tube": (0.11, add_endotracheal_tube),
    "nasogastric tube": (0.11, add_nasogastric_tube),
}


def draw_film(seed: int, split: int, index: int, size: int = 320) -> Film:
    """Film `index` of split 0 (train) or 1 (test), `size` pixels a side. Depends on nothing but its
    arguments.
    """
    rng = np.random.default_rng([seed, split, index, 0])
    chance = np.array([chance for chance, _ in KINDS.values()])
    chosen = rng.choice(
        list(KINDS), rng.choice(len(COUNTS), p=COUNTS), replace=False, p=chance / chance.sum()
    )
    enlarged = (
        draw(rng, {"mild": 0.45, "moderate": 0.35, "severe": 0.2})
        if "cardiomegaly" in chosen
        else ""
    )
    p = draw_patient(rng, enlarged)
    pen = Pen(p, size)
    regions = draw_regions(pen)
    outlines = [smooth_curve(p.lung(side)) for side in SIDES]
    centre = pen.soft(
        pen.fill(heart_outline(p), mediastinum_outline(p, 0.75), aortic_arch(p)), 0.006
    )
    centre *= np.clip((pen.v - p.apex) / 0.10 + 0.6, 0, 1)  # fades into the neck
    lungs = pen.fill(*outlines)
    lung = pen.soft(lungs, 0.006)
    free = (pen.soft(lungs, 0.02) > 0.9) & (pen.soft(pen.fill(heart_outline(p)), 0.02) < 0.1)
    drawing = Drawing(
        pen,
        rng,
        regions,
        lung,
        lung * (1 - 0.86 * centre),
        pen.soft(draw_vessels(pen, rng)) * lung,
        np.zeros((size, size), np.float32),
        free,
        [],
    )
    for label, (_, add) in KINDS.items():
        if label in chosen:
            add(drawing)
    pixels = expose(p, rng, on_film(p, render(drawing, centre), Image.Resampling.BICUBIC))
    for finding in drawing.findings:
        finding.mask = on_film(p, finding.mask, Image.Resampling.NEAREST)
        finding.box = box_of(finding.mask)
    return Film(
        pixels,
        drawing.findings,
        {name: on_film(p, mask, Image.Resampling.NEAREST) for name, mask in regions.items()},
    )


def on_film(p: Patient, layer: np.ndarray, resample: Image.Resampling) -> np.ndarray:
    """A layer (size, size) shrunk into the collimated field; the film around it was not exposed.
    This is what makes a chest lie elsewhere on every film, so that no fixed box fits.
    """
    left, top, side = p.field
    size, step = len(layer), 1 / side
    image = Image.fromarray(layer.astype(np.float32))
    placed = image.transform(
        (size, size),
        Image.Transform.AFFINE,
        (step, 0, -left * size * step, 0, step, -top * size * step),
        resample,
        fillcolor=0,
    )
    return np.asarray(placed).astype(layer.dtype)


def render(d: Drawing, centre: np.ndarray) -> np.ndarray:
    """The sum of the layers (size, size): about 0 for air around the body, 0.2 for lung, 0.7 for
    the heart.
    """
    pen, rng, p, size = d.pen, d.rng, d.pen.patient, d.pen.size
    half = p.width + 0.05 + 0.05 * p.habitus
    trunk = [(-0.13, -0.1), (-0.14, 0.0), (-0.20, 0.045), (-0.36, 0.075), (-half - 0.07, 0.14),
             (-half - 0.10, 0.3), (-half - 0.01, 0.42), (-half, 0.7),
             (-half - 0.01, 1.15)]  # fmt: skip
    body = pen.soft(pen.fill(trunk + [(-u, v) for u, v in reversed(trunk)]), 0.006)
    thickness = (
        0.44 + 0.06 * p.habitus + 0.06 * pen.v + 0.10 * np.clip(1 - (pen.u / half) ** 2, 0, 1)
    )
    film = body * (thickness + 0.02 * smooth_noise(rng, size, 9))
    domes = [smooth_curve(p.lung(side, LUNG_OUTLINE[DOME]), closed=False) for side in SIDES]
    abdomen = pen.fill(np.concatenate([domes[0], domes[1][::-1], [(0.6, 1.2), (-0.6, 1.2)]]))
    film += 0.09 * pen.soft(abdomen, 0.006) * body

    # lungs are thin at the rim
    depth = 0.70 + 0.32 * pen.soft(pen.fill(*[smooth_curve(p.lung(side)) for side in SIDES]), 0.05)
    film -= 0.41 * (1 - 0.18 * p.habitus) * d.air * depth
    aerated = np.clip(d.air, 0, 1)
    texture = (
        0.012 * smooth_noise(rng, size, 70)
        + 0.012 * smooth_noise(rng, size, 20)
        + 0.02 * smooth_noise(rng, size, 6)
    )
    film += aerated * ((0.10 + 0.08 * pen.v) * d.vessels + texture)  # vessels are wider below

    film += 0.165 * centre + 0.05 * pen.blob(0.5 * p.turn, 0.5, 0.08, 2.0) * body  # the spine
    carina = trachea_line(p)[-1]
    bronchi = [
        ([carina, (carina[0] + u, carina[1] + v)], 0.022, 0.6)
        for u, v in ((-0.07, 0.06), (0.08, 0.07))
    ]
    film -= 0.11 * pen.soft(pen.stroke(*bronchi, (trachea_line(p), 0.036, 1.0)), 0.004)
    for side, sign in SIDES.items():
        v = p.level(side, 0.47 if side == "right" else 0.44)  # the left hilum lies higher
        film += 0.12 * aerated * pen.blob(sign * 0.21 * p.width + p.turn, v, 0.035, 0.075)
    if p.breast:
        breasts = [
            ellipse(sign * 0.58 * p.width, p.level(side, 0.78), 0.15, 0.17)
            for side, sign in SIDES.items()
        ]
        film += 0.07 * p.breast * pen.soft(pen.fill(*breasts), 0.012) * np.clip(5 * pen.v - 2, 0, 1)
    stomach = ellipse(
        0.45 * p.width, p.dome["left"] + 0.055, rng.uniform(0.04, 0.09), rng.uniform(0.015, 0.035)
    )
    film -= rng.uniform(0.0, 0.2) * pen.soft(pen.fill(stomach), 0.006)
    film += p.bone * draw_bones(pen, rng) * body
    return film + confusers(pen, rng) + d.added


def confusers(pen: Pen, rng) -> np.ndarray:
    """(size, size) to add: nipple shadows that are no nodules, a skin fold that is no
    pneumothorax.
    """
    p, extra = pen.patient, np.zeros((pen.size, pen.size), np.float32)
    if rng.random() < 0.25:
        strength, t = rng.uniform(0.05, 0.10), rng.uniform(0.78, 0.9)
        for side, sign in SIDES.items():
            if rng.random() < 0.8:
                extra += strength * pen.blob(sign * 0.62 * p.width, p.level(side, t), 0.011, 0.011)
    if rng.random() < 0.2:  # grey up to the fold, then a step: no white line, and vessels cross it
        sign, lean, start = (
            int(rng.choice([-1, 1])),
            rng.uniform(-0.25, 0.1),
            rng.uniform(0.6, 0.85) * p.width,
        )
        across = sign * pen.u - start - lean * (pen.v - 0.4)
        ends = np.clip((0.28 - np.abs(pen.v - 0.45)) / 0.06, 0, 1)
        extra += (
            rng.uniform(0.04, 0.07) * np.exp(np.clip(across, -1, 0) / 0.05) * (across < 0) * ends
        )
    return extra


def expose(p: Patient, rng, film: np.ndarray) -> np.ndarray:
    """Summed layers (size, size) to uint8: exposure, blur, grain and the side marker."""
    size = len(film)
    # a film saturates at both ends
    film = 1 / (1 + np.exp(-4.4 * p.contrast * (film - 0.46) - 4 * p.brightness))
    film = np.clip((film - 0.115) / 0.82, 0.015, 1)
    image = Image.fromarray((255 * film).astype(np.uint8)).filter(
        ImageFilter.GaussianBlur(p.blur * size)
    )
    grain = rng.standard_normal((size, size), dtype=np.float32) * (1.3 - 0.6 * film)
    pixels = np.asarray(image, np.float32) / 255 + p.noise * grain
    if rng.random() < 0.6:  # a marker, drawn as strokes; placed on the image and not on the body
        right = rng.random() < 0.5
        letter = (
            [(0, 1), (0, 0), (0.6, 0.1), (0.6, 0.45), (0, 0.55), (0.6, 1)]
            if right
            else [(0, 0), (0, 1), (0.6, 1)]
        )
        x, y = (0.04 if right else 0.92) + rng.uniform(-0.02, 0.01), rng.uniform(0.02, 0.06)
        marker = Image.new("L", (2 * size, 2 * size))
        points = [(2 * size * (x + 0.035 * a), 2 * size * (y + 0.04 * b)) for a, b in letter]
        ImageDraw.Draw(marker).line(
            points, fill=230, width=max(1, round(0.012 * size)), joint="curve"
        )
        pixels = np.maximum(pixels, np.asarray(marker.reduce(2), np.float32) / 255)
    return (255 * np.clip(pixels, 0, 1) + 0.5).astype(np.uint8)


# The report. Every sentence is wholly positive or wholly negative.

NUMBERS = {2: "two", 3: "three"}
# where the severity's name sounds odd
WORDS = {("nodule", "moderate"): "medium-sized", ("consolidation", "severe"): "extensive"}
LUNGS = ("consolidation", "nodule", "atelectasis")  # denied when there is none of them
DEVICES = ("endotracheal tube", "nasogastric tube", "pacemaker")
# Some readers stop when the question is answered; the others go on to remarks in no fixed order:
# one that fits every film, and a detail of each finding of these kinds. So where there is such a
# finding, the likeliest report is a short one although most are long: greedy SFT falls for it, and
# a reward for overlap does not.
BRIEF = 0.35
REMARKS = ("Bones are intact.",)
DETAILS = {
    "cardiomegaly": "Cardiothoracic ratio exceeds one half.",
    "pleural effusion": "Costophrenic angle is blunted {where}.",
    "pacemaker": "Lead ends in the heart.",
    "endotracheal tube": "Airway is intubated.",
    "nasogastric tube": "Gastric tube crosses the diaphragm.",
}
# What real reports hold beside findings, and no scorer of findings counts: none of these words is
# an entity of `minigrpo.rewards.phantom_entities`. Nothing of it is to be seen on the film.
TECHNIQUE = (
    "A single frontal view was obtained at the bedside.",
    "This study consists of one frontal view taken while standing.",
    "One view was acquired, and its quality is adequate for interpretation.",
)
VARIANTS = (
    "Degenerative changes of the spine are as expected for age.",
    "Nipple shadows should not be mistaken for a lesion.",
    "An azygos fissure is present as a common variant.",
)
ADVICE = (
    "Please correlate with the clinical history and any prior imaging.",
    "Follow-up should be arranged as the referring team sees fit.",
    "These results were discussed with the ward by telephone.",
)
PROSE = ((TECHNIQUE, 0.8), (VARIANTS, 0.5), (ADVICE, 0.7))  # each with its chance


def choose(rng, *options: str) -> str:
    """The first phrasing more often than not, as a department has its habits."""
    return options[0] if rng.random() < 0.9 else options[rng.integers(len(options))]


def noun_phrase(group: list[Finding]) -> tuple[str, bool]:
    """(phrase, is it a plural) for findings that words do not tell apart."""
    f, many = group[0], len(group) > 1
    severity = WORDS.get((f.label, f.severity), f.severity)
    place = f"in the {f.side} {f.zone} zone"
    phrases = {
        "nodule": (
            f"{NUMBERS.get(len(group))} {severity} nodules {place}"
            if many
            else f"a {severity} nodule {place}"
        ),
        "consolidation": f"{severity} consolidation {place}",
        "atelectasis": f"{severity} linear atelectasis {place}",
        "pleural effusion": (
            f"{severity} bilateral pleural effusions"
            if many
            else f"a {severity} {f.side} pleural effusion"
        ),
        "pneumothorax": f"a {severity} {f.side} pneumothorax",
        "pacemaker": f"a pacemaker over the {f.side} chest",
        "endotracheal tube": "an endotracheal tube with its tip above the carina",
        "nasogastric tube": "a nasogastric tube with its tip in the stomach",
    }
    return phrases[f.label], many and f.label in ("nodule", "pleural effusion")


def positive(rng, findings: list[Finding], together: bool) -> list[Statement]:
    """Findings of one label: one sentence for all, or one for each noun phrase."""
    groups: dict[tuple, list[Finding]] = {}
    for f in findings:
        place = () if f.label == "pleural effusion" else (f.side, f.zone)
        groups.setdefault((f.severity, *place), []).append(f)
    statements = []
    for part in [list(groups.values())] if together else [[group] for group in groups.values()]:
        phrases = [noun_phrase(group) for group in part]
        words = [phrase for phrase, _ in phrases]
        text = " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))
        # goes with what follows it: "there is a nodule here and a nodule there"
        there = "are" if phrases[0][1] else "is"
        verb = "are" if len(words) > 1 or phrases[0][1] else "is"
        text = choose(
            rng,
            f"there {there} {text}.",
            f"{text} {verb} seen.",
            f"{text} {verb} present.",
            f"{text} {verb} noted.",
        )
        statements.append(
            Statement(text[0].upper() + text[1:], [f for group in part for f in group])
        )
    return statements


def negative(rng, *options: str) -> Statement:
    return Statement(choose(rng, *options), [])


def report(findings: list[Finding], rng) -> list[Statement]:
    """The findings paragraph as statements, in the order in which they are read."""
    of = {kind: [f for f in findings if f.label == kind] for kind in KINDS}
    together = sum(map(bool, of.values())) > 1 or rng.random() < 0.5
    stated = {
        kind: positive(rng, of[kind], together)
        for kind in KINDS
        if of[kind] and kind != "cardiomegaly"
    }

    if of["cardiomegaly"]:
        severity = of["cardiomegaly"][0].severity
        adverb = {"mild": "mildly", "moderate": "moderately", "severe": "severely"}[severity]
        text = choose(
            rng,
            f"There is {severity} cardiomegaly.",
            f"The heart is {adverb} enlarged.",
            f"The cardiac silhouette is {adverb} enlarged.",
        )
        heart = Statement(text, of["cardiomegaly"])
    else:
        heart = negative(
            rng,
            "The heart size is normal.",
            "The cardiac silhouette is normal in size.",
            "The heart is not enlarged.",
            "The heart size is within normal limits.",
        )
    lungs = [s for kind in LUNGS for s in stated.get(kind, [])]
    lungs = lungs or [
        negative(
            rng,
            "The lungs are clear.",
            "Both lungs are clear without consolidation, nodule or atelectasis.",
            "There is no consolidation, nodule or atelectasis.",
            "No consolidation, nodule or atelectasis is seen.",
        )
    ]
    pleura = [s for kind in ("pleural effusion", "pneumothorax") for s in stated.get(kind, [])]
    pleura = pleura or [
        negative(
            rng,
            "There is no pleural effusion or pneumothorax.",
            "No pleural effusion or pneumothorax is seen.",
            "There is no pneumothorax or effusion.",
        )
    ]
    devices = [s for kind in DEVICES for s in stated.get(kind, [])]
    if not devices:
        devices = [
            negative(
                rng,
                "There are no lines or tubes.",
                "No support devices are seen.",
                "There are no support devices.",
            )
        ]
    sections = [[heart], lungs, pleura, devices]
    order = choose(rng, "0123", "1203", "3012")
    statements = [statement for k in order for statement in sections[int(k)]]
    if rng.random() < BRIEF:
        return statements
    remarks = list(REMARKS)
    for kind in filter(of.get, DETAILS):
        sides = {f.side for f in of[kind]}
        remarks.append(
            DETAILS[kind].format(
                where="on both sides" if len(sides) > 1 else f"on the {sides.pop()}"
            )
        )
    return statements + [Statement(text, []) for text in rng.permutation(remarks).tolist()]


def with_prose(statements: list[Statement], rng) -> list[Statement]:
    """The report with unscored text: technique before it, a variant and advice behind it."""
    technique, *rest = (
        [Statement(templates.draw_template(options, rng), [])] if rng.random() < chance else []
        for options, chance in PROSE
    )
    return [*technique, *statements, *(s for part in rest for s in part)]


def film_samples(
    film: Film, patient: str, image: str, rng, *, presence: float = 0.0, prose=None
) -> list[dict]:
    """The samples about a film, as lines of the JSONL file: its report, the boxes of all findings,
    and for a film without findings and every second other the boxes of one part of the anatomy, of
    one abnormality or of one phrase of the report. `presence` is the chance of one more question,
    after a kind of finding that is on the film as often as not. `prose`, a Generator of its own,
    adds unscored text to the report and changes nothing else.
    """
    statements = report(film.findings, rng)
    if prose is not None:
        statements = with_prose(statements, prose)
    findings = [
        {key: value for key, value in vars(f).items() if key != "mask"} for f in film.findings
    ]
    all_boxes = [f.box for f in film.findings]
    samples = [
        {
            "task": "report",
            "question": templates.report_question(rng),
            "answer": " ".join(s.text for s in statements),
            "boxes": all_boxes,
            "findings": findings,
        }
    ]

    def ground(kind, label, boxes, words, turn):
        boxes = sorted(boxes)  # reading order: the image's left to its right
        question, answer = turn(words, format_boxes(boxes), rng)
        samples.append(
            {
                "task": "grounding",
                "kind": kind,
                "label": label,
                "question": question,
                "answer": answer,
                "boxes": boxes,
            }
        )

    kind = "anatomy"
    if film.findings:
        listed = [
            (f"{f.side} {f.label}" if f.side else f.label, format_boxes([f.box]))
            for f in film.findings
        ]
        # in the order in which they were drawn, each with its name
        question, answer = templates.detection_turn(listed, rng)
        samples.append(
            {
                "task": "grounding",
                "kind": "abnormality",
                "label": "all findings",
                "question": question,
                "answer": answer,
                "boxes": all_boxes,
            }
        )
        kind = rng.choice(["anatomy", "abnormality", "phrase"]) if rng.random() < 0.5 else None
    if kind == "anatomy":
        name = rng.choice(list(film.regions)).item()
        ground("anatomy", name, [box_of(film.regions[name])], name, templates.region_turn)
    elif kind == "abnormality":
        label = film.findings[rng.integers(len(film.findings))].label
        ground(
            "abnormality",
            label,
            [f.box for f in film.findings if f.label == label],
            label,
            templates.region_turn,
        )
    elif kind == "phrase":
        stated = [s for s in statements if s.findings]
        s = stated[rng.integers(len(stated))]
        ground(
            "phrase",
            s.findings[0].label,
            [f.box for f in s.findings],
            s.text.rstrip("."),
            templates.phrase_turn,
        )
    if presence and rng.random() < presence:
        there = [kind for kind in KINDS if any(f.label == kind for f in film.findings)]
        absent = [kind for kind in KINDS if kind not in there]
        label = rng.choice(there if there and rng.random() < 0.5 else absent).item()
        boxes = [f.box for f in film.findings if f.label == label]
        ground("abnormality", label, boxes, label, templates.presence_turn)
    common = {"image": image, "source": "phantom", "patient": patient}
    return [
        {"id": f"{patient}-{k or 'report'}"} | common | sample for k, sample in enumerate(samples)
    ]


def write_film(job: tuple[str, int], *, arguments: "Arguments", folder: Path) -> list[dict]:
    (split, index), seed = job, arguments.seed
    number, patient = SPLITS.index(split), f"phantom-{split}-{index:05d}"
    film = draw_film(seed, number, index, arguments.size)
    with aside(folder / "films" / f"{patient}.png", durable=False) as part:
        Image.fromarray(film.pixels).save(part, "PNG", compress_level=3)
    rng = np.random.default_rng([seed, number, index, 1])
    prose = np.random.default_rng([seed, number, index, 4]) if arguments.prose else None
    image, presence = f"films/{patient}.png", arguments.presence
    return film_samples(film, patient, image, rng, presence=presence, prose=prose)


@dataclass
class Arguments:
    train: int
    test: int
    seed: int
    size: int
    presence: float = 0.0  # share of films with a question after a finding that may be absent
    prose: bool = False  # unscored text in the reports


def write_phantom(output_dir: str | Path, arguments: Arguments, workers: int | None = None) -> bool:
    """Draw the data set into `output_dir`; False if the same arguments made it before. Another's
    folder is an error.
    """
    folder = Path(output_dir)
    done = folder / "phantom.json"
    # a folder of an earlier version says nothing of what it could not do
    new = {"presence": 0.0, "prose": False}
    if done.exists() and new | json.loads(done.read_text()) == asdict(arguments):
        return False
    if (folder / "train.jsonl").exists():
        before = done.read_text().strip() if done.exists() else "a run that did not finish"
        raise SystemExit(
            f"{folder} already holds films made by {before}, not by"
            f" {json.dumps(asdict(arguments))}: remove {folder} or choose another --output_dir."
        )
    (folder / "films").mkdir(parents=True, exist_ok=True)
    jobs = [(split, k) for split in SPLITS for k in range(getattr(arguments, split))]
    write = partial(write_film, arguments=arguments, folder=folder)
    lines: dict[str, list[str]] = {split: [] for split in SPLITS}
    with multiprocessing.Pool(workers or os.cpu_count()) as pool:
        results = tqdm(
            pool.imap(write, jobs, chunksize=8), total=len(jobs), desc="films", unit="film"
        )
        for (split, _), samples in zip(jobs, results, strict=True):
            lines[split] += [json.dumps(sample) + "\n" for sample in samples]
    sync_all(folder / "films")
    for split in SPLITS:
        write_aside(folder / f"{split}.jsonl", "".join(lines[split]))
    # last: a killed run leaves no phantom.json
    write_aside(done, json.dumps(asdict(arguments)) + "\n")
    return True


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--output_dir", type=Path, required=True, help="folder to make")
    parser.add_argument("--train", type=int, required=True, help="training films, one patient each")
    parser.add_argument("--test", type=int, required=True, help="test films, of other patients")
    parser.add_argument("--seed", type=int, default=0, help="the same seed draws the same films")
    parser.add_argument("--size", type=int, default=320, help="pixels a side")
    parser.add_argument(
        "--presence",
        type=float,
        default=0.0,
        help="share of films with one more question, about a finding that half of them have",
    )
    parser.add_argument(
        "--prose",
        action="store_true",
        help="reports also hold what no scorer of findings counts: technique, variants, advice",
    )
    options = vars(parser.parse_args())
    output_dir = options.pop("output_dir")
    for name, least in (("train", 0), ("test", 0), ("seed", 0), ("size", 32)):
        if options[name] < least:
            parser.error(f"--{name} must be at least {least}, got {options[name]}")
    if not 0 <= options["presence"] <= 1:
        parser.error(
            f"--presence must be between 0 and 1, a share of the films, got {options['presence']}"
        )
    if any(place.exists() and not place.is_dir() for place in (output_dir, *output_dir.parents)):
        parser.error(f"--output_dir {output_dir} is, or lies below, a file: give another")
    try:
        new = write_phantom(output_dir, Arguments(**options))
    except (ValueError, OSError) as error:
        fail(error)
    if new:
        print(f"wrote {options['train']} + {options['test']} films to {output_dir}")
    else:
        print(f"{output_dir} was already made with the same arguments")


if __name__ == "__main__":
    main()
