"""Pictures of the built-in set: jointed figures in front of photographic texture, each with its exact mask."""

from functools import cache
from typing import NamedTuple

import cv2
import numpy as np
import skimage.data

from utils.images import resize_image

DRAWING = 1  # raised when the same seed no longer gives the same pictures
SHARE = (0.04, 0.55)  # foreground of a picture
VIVID = 0.08  # saturation of the scenes, as a share of the photographs'
THINGS = 4  # that stand about, at most
DYED = 0.99  # chance that a garment has a warm, strong colour,
LURE = 0.03  # and that a thing has
CAMOUFLAGE = 0.015  # chance that a garment takes texture and colour of the background

# All of these are files of the scikit-image wheel. The two that show people serve as cloth only.
SCENES = ("brick", "grass", "gravel", "coffee", "chelsea", "rocket", "stereo_motorcycle", "immunohistochemistry")
CLOTHS = (*SCENES, "astronaut", "camera", "coins", "clock", "hubble_deep_field")
GROUNDS = ("brick", "grass", "gravel")
SKIN = ((241, 206, 180), (224, 178, 145), (198, 144, 108), (151, 103, 72), (98, 66, 48))  # RGB


class Part(NamedTuple):
    """One convex piece of a figure: corner points (N, 2) in pixels, what covers it, and its brightness."""

    points: np.ndarray
    garment: str
    shade: float


# Lengths of a limb's three pieces, radii at their four ends, and the degrees that the last piece is bent by.
ARM = (1.3, 1.1, 0.25), (0.29, 0.21, 0.14, 0.16), 0
LEG = (1.85, 1.7, 0.5), (0.44, 0.28, 0.18, 0.13), 80


def draw(seed: int, index: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Picture `index` of the set `seed`: (size, size, 3) uint8 RGB and its (size, size) uint8 mask of 0 and 1.

    A pure function of its arguments. Between 4 and 55 % of the mask are foreground.
    """
    rng = np.random.default_rng([seed, index])
    canvas, scene = _background(rng, size)
    cover = np.zeros((size, size), np.uint8)
    for parts in _figures(rng, size):
        wardrobe = _wardrobe(rng, canvas, scene)
        for part in parts:
            _paint(canvas, part.points, wardrobe[part.garment], part.shade, cover)
    return _photograph(rng, canvas), (cover >= 128).astype(np.uint8)


@cache
def photos() -> dict[str, np.ndarray]:
    """The photographs that the textures are cut from, (H, W, 3) uint8 RGB; none is fetched from the network."""
    found = {}
    for name in CLOTHS:
        photo = getattr(skimage.data, name)()
        photo = photo[0] if isinstance(photo, tuple) else photo
        found[name] = np.ascontiguousarray(photo if photo.ndim == 3 else np.repeat(photo[..., None], 3, axis=2))
    return found


def _crop(rng, name: str, size: int, low: float, high: float) -> np.ndarray:
    """A random square of a photo, `low` to `high` of its short side, as (size, size, 3) float32."""
    photo = photos()[name]
    side = int(min(photo.shape[:2]) * rng.uniform(low, high))
    top, left = (int(rng.integers(length - side + 1)) for length in photo.shape[:2])
    crop = photo[top : top + side, left : left + side]
    crop = crop[:, ::-1] if rng.random() < 0.5 else crop
    return resize_image(np.ascontiguousarray(crop), size).astype(np.float32)


def _scene(rng, name: str, size: int) -> np.ndarray:
    """A crop in the photograph's own colours, paler and with a tint."""
    crop = _crop(rng, name, size, 0.4, 1.0)
    tint = rng.uniform(0.85, 1.1, 3)
    mix = np.full((3, 3), (1 - VIVID) / 3) + VIVID * np.eye(3)
    return cv2.transform(crop, (tint * rng.uniform(0.5, 1.0))[:, None] * mix)


def _cloth(rng, name: str, size: int, colour, contrast: float) -> np.ndarray:
    """The pattern of a photo in shades of `colour`, with part of the photo's own colours left in."""
    crop = _crop(rng, name, size, 0.3, 1.0)
    own = rng.uniform(0, 1)
    mix = np.full((3, 3), (1 - own) / 3) + own * np.eye(3)
    mean, spread = cv2.meanStdDev(crop)
    mix *= contrast * 45 / (spread.mean() + 5)
    return cv2.transform(crop, np.hstack((mix, np.reshape(colour, (3, 1)) - mix @ mean)))


def _colour(rng, dyed: bool) -> np.ndarray:
    """An RGB colour: of dyed cloth, warm and strong, or of stone, wood and paint, mostly dull."""
    hue = rng.normal(0, 22) % 180 if dyed else rng.uniform(0, 180)
    strength, value = (rng.beta(6, 3), rng.uniform(130, 240)) if dyed else (rng.beta(1, 4), rng.uniform(50, 200))
    hsv = np.uint8([[[hue, 255 * strength, value]]])
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)[0, 0].astype(np.float32)


def _wardrobe(rng, canvas: np.ndarray, scene: str) -> dict[str, np.ndarray]:
    """A texture (size, size, 3) for everything that a figure shows."""
    size, texture = len(canvas), {}
    for garment in ("shirt", "trousers", "bag"):
        name, colour = str(rng.choice(CLOTHS)), _colour(rng, dyed=rng.random() < DYED)
        if rng.random() < CAMOUFLAGE:
            name, colour = scene, cv2.mean(canvas)[:3]
        texture[garment] = _cloth(rng, name, size, colour, rng.uniform(0.05, 0.4))
    skin = np.float32(SKIN[rng.integers(len(SKIN))]) * rng.uniform(0.8, 1.05)
    texture["skin"] = _cloth(rng, "gravel", size, skin, 0.15)
    texture["hair"] = _cloth(rng, "grass", size, rng.uniform(0.1, 0.8) * np.float32((160, 115, 80)), 0.3)
    texture["shoes"] = _cloth(rng, "gravel", size, _colour(rng, dyed=True) * 0.6, 0.3)
    texture["face"] = np.full((size, size, 3), 35, np.float32)
    return texture


def _background(rng, size: int) -> tuple[np.ndarray, str]:
    """A scene with a ground and things that stand about; also the name of its photograph."""
    scene = str(rng.choice(SCENES))
    canvas = _scene(rng, scene, size)
    if rng.random() < 0.6:
        horizon, tilt = size * rng.uniform(0.5, 0.85), size * rng.normal(0, 0.03)
        ground = [(0, horizon - tilt), (size, horizon + tilt), (size, 2 * size), (0, 2 * size)]
        _paint(canvas, np.float32(ground), _scene(rng, str(rng.choice(GROUNDS)), size), 1.0)
    for _ in range(rng.integers(THINGS + 1)):
        _thing(rng, canvas, scene)
    return canvas, scene


def _thing(rng, canvas: np.ndarray, scene: str) -> None:
    """A post, a board or a ball, now and then in the colours of clothes."""
    size = len(canvas)
    name = scene if rng.random() < 0.3 else str(rng.choice(CLOTHS))
    texture = _cloth(rng, name, size, _colour(rng, dyed=rng.random() < LURE), rng.uniform(0.4, 1.2))
    at, long = rng.uniform(0, size, 2), size * rng.uniform(0.08, 0.5)
    turn, thick = rng.normal(0, 25) + (90 if rng.random() < 0.3 else 0), size * rng.uniform(0.01, 0.05)
    end, across = at + long * _towards(turn), rng.uniform(0.2, 0.6) * long * _towards(turn + 90)
    board = [(corner, 1) for corner in (at, end, at + across, end + across)]
    shapes = [[(at, thick), (end, 1.3 * thick)], board, [(at, 0.3 * long)]]
    _paint(canvas, _hull(*shapes[rng.integers(3)]), texture, rng.uniform(0.7, 1.1))


def _figures(rng, size: int) -> list[list[Part]]:
    """One person or two, the farther first, posed again until they cover a sensible share of the frame."""
    pair = rng.random() < 0.25
    while True:
        figures = [_place(rng, size, far=pair)] + [_place(rng, size, far=False)] * pair
        cover = np.zeros((size, size), np.uint8)
        for parts in figures:
            for part in parts:
                _fill(cover, part.points)
        if SHARE[0] < (cover >= 128).mean() < SHARE[1]:
            return figures


def _place(rng, size: int, far: bool) -> list[Part]:
    """A figure in the frame: far away, or whole, or cut off by the frame."""
    parts = _figure(rng, facing=rng.choice((-1, 1)))
    corners = np.concatenate([part.points for part in parts])
    low, high = corners.min(0), corners.max(0)
    near = not far and rng.random() < 0.45
    scale = size * rng.uniform(*((0.55, 0.8) if far else (1.0, 1.8) if near else (0.75, 0.98))) / (high[1] - low[1])
    x = size * rng.uniform(0.3, 0.7) - scale * (low[0] + high[0]) / 2
    head, feet = size * rng.uniform(0.02, 0.15), size * rng.uniform(0.85, 1.04)
    y = head - scale * low[1] if near else feet - scale * high[1]
    return [part._replace(points=part.points * np.float32(scale) + np.float32((x, y))) for part in parts]


def _figure(rng, facing: int) -> list[Part]:
    """A person from back to front, in units of a head's height from the hips, y downwards."""
    width, girth = rng.uniform(0.6, 1.0), rng.uniform(0.95, 1.35)
    up = -_towards(rng.normal(-3, 6))
    across, neck = width * np.array((-up[1], up[0])), 2.35 * up
    legs, arms = _pose(rng, frontal=width > 0.8)
    sleeve = ("shirt", "shirt" if rng.random() < 0.6 else "skin", "skin")
    lower = ("trousers", "trousers" if rng.random() < 0.75 else "skin", "shoes")
    arm, leg = {}, {}
    for side, shade in ((-1, 0.85), (1, 1.0)):
        arm[side] = _limb(neck + 0.78 * side * across - 0.15 * up, ARM, arms[side], girth, sleeve, shade)
        leg[side] = _limb(0.38 * side * across, LEG, legs[side], girth, lower, shade)
    bag = _bag(rng, neck, hand=arm[1][0].points.mean(0)) if rng.random() < 0.25 else []
    body = [*_trunk(neck, up, across, girth), *_head(rng, neck, up)]
    parts = [*arm[-1], *leg[-1], *leg[1], *body, *bag[:-1], *arm[1], *bag[-1:]]
    return [part._replace(points=part.points * np.float32((facing, 1))) for part in parts]


def _pose(rng, frontal: bool) -> tuple[dict, dict]:
    """Angles in degrees from hanging straight down, forwards positive: per side (thigh, shin) and (upper, fore)arm."""
    action = rng.choice(("stand", "walk", "run", "cheer", "sit", "reach"), p=(0.25, 0.25, 0.15, 0.12, 0.1, 0.13))
    stride = {"walk": rng.uniform(15, 32), "run": rng.uniform(30, 55)}.get(action, rng.uniform(2, 12))
    legs, arms = {}, {}
    for side in (-1, 1):
        bend = {"run": rng.uniform(10, 95), "walk": rng.uniform(0, 35)}.get(action, rng.uniform(0, 8))
        thigh = side * stride + rng.normal(0, 4)
        upper = -side * stride * 0.9 + rng.normal(0, 8)
        fore = upper + (rng.uniform(50, 100) if action == "run" else rng.uniform(3, 35))
        if frontal and action in ("stand", "cheer", "reach"):
            out = rng.uniform(8, 50)
            upper, fore = side * out, side * (out - rng.uniform(0, 100))
        if action == "sit":
            thigh, bend = rng.uniform(65, 95), rng.uniform(55, 95)
        if action == "cheer" or (action == "reach" and side > 0):
            upper = (side if frontal else 1) * rng.uniform(85, 165)
            fore = upper + (side if frontal else 1) * rng.uniform(-10, 50)
        legs[side], arms[side] = (thigh, thigh - bend), (upper, fore)
    return legs, arms


def _limb(start, kind, angles, girth, garments, shade) -> list[Part]:
    """The pieces of an arm or a leg, from its end to its root."""
    (lengths, radii, turn), points = kind, [start]
    for length, angle in zip(lengths, (*angles, angles[1] + turn), strict=True):
        points.append(points[-1] + length * _towards(angle))
    discs = [(point, radius * girth) for point, radius in zip(points, radii, strict=True)]
    pieces = zip(discs[:-1], discs[1:], garments, strict=True)
    return [Part(_hull(one, other), garment, shade) for one, other, garment in pieces][::-1]


def _trunk(neck, up, across, girth) -> list[Part]:
    shoulders = [(neck + 0.7 * side * across - 0.2 * up, 0.28 * girth) for side in (-1, 1)]
    waist = [(0.9 * up + 0.2 * side * across, 0.42 * girth) for side in (-1, 1)]
    hips = [(0.1 * up + 0.3 * side * across, 0.44 * girth) for side in (-1, 1)]
    return [
        Part(_hull(*waist, *hips), "trousers", 1.0),
        Part(_hull((neck - 0.1 * up, 0.22), (neck + 0.45 * up, 0.2)), "skin", 0.85),
        Part(_hull(*waist, (0.4 * up, 0.44 * girth)), "shirt", 1.0),
        Part(_hull(*shoulders, *waist), "shirt", 1.0),
    ]


def _head(rng, neck, up) -> list[Part]:
    front = np.array((-up[1], up[0]))
    crown, chin = neck + 1.0 * up, neck + 0.62 * up + 0.06 * front
    hair = [(crown + 0.14 * up - 0.05 * front, 0.36), (crown - 0.2 * front, 0.34)]
    if rng.random() < 0.4:
        hair.append((neck + rng.uniform(0.0, 0.5) * up - 0.28 * front, 0.2))
    marks = [crown - 0.02 * up, crown - 0.02 * up + 0.24 * front, chin + 0.1 * front]  # eyes and mouth
    return [
        Part(_hull(*hair), "hair", 1.0),
        Part(_hull((crown, 0.37), (chin, 0.27)), "skin", 1.0),
        Part(_hull((crown + 0.26 * up, 0.27), (crown + 0.2 * up - 0.16 * front, 0.3)), "hair", 1.0),
        *(Part(_hull((mark, 0.045)), "face", 1.0) for mark in marks),
    ]


def _bag(rng, neck, hand) -> list[Part]:
    """A bag at the hip with its strap, or one that hangs from the hand; it belongs to the figure."""
    on_strap, wide = rng.random() < 0.5, rng.uniform(0.25, 0.5)
    top = np.array((-0.6, 0.1)) if on_strap else hand + np.array((0, 0.5))
    strap = _hull((neck + np.array((0.5, 0.1)) if on_strap else hand, 0.07), (top, 0.07))
    corners = [(top + np.array((x, y)), 0.13) for x in (-wide, wide) for y in (0, 1.6 * wide)]
    return [Part(strap, "bag", 0.8), Part(_hull(*corners), "bag", 1.0)]


def _towards(degrees: float) -> np.ndarray:
    """The unit vector that many degrees from straight down, turning towards +x."""
    return np.array((np.sin(np.radians(degrees)), np.cos(np.radians(degrees))))


def _hull(*discs) -> np.ndarray:
    """Corner points (N, 2) of the convex hull of discs, each ((x, y), radius)."""
    ring = np.stack([_towards(angle) for angle in range(0, 360, 15)])
    points = np.concatenate([np.asarray(centre) + radius * ring for centre, radius in discs])
    return cv2.convexHull(points.astype(np.float32))[:, 0]


def _fill(cover: np.ndarray, points: np.ndarray) -> None:
    """Add a polygon to (H, W) uint8 coverage, 255 inside and smooth at its edges."""
    piece = np.zeros_like(cover)
    cv2.fillPoly(piece, [np.round(points * 16).astype(np.int32)], 255, cv2.LINE_AA, shift=4)
    np.maximum(cover, piece, out=cover)


def _paint(canvas, points, texture, shade, cover=None) -> None:
    """Lay a textured polygon, darker towards its edge, over the canvas, and add it to `cover`."""
    size = len(canvas)
    low = np.clip(np.floor(points.min(0)).astype(int) - 2, 0, size)
    high = np.clip(np.ceil(points.max(0)).astype(int) + 3, 0, size)
    if (low >= high).any():
        return
    box = (slice(low[1], high[1]), slice(low[0], high[0]))
    alpha = np.zeros(high[::-1] - low[::-1], np.uint8)
    _fill(alpha, points - low)
    if cover is not None:
        np.maximum(cover[box], alpha, out=cover[box])
    alpha = alpha.astype(np.float32)[..., None] / 255
    inside = cv2.blur(alpha, (size // 40 * 2 + 1,) * 2)[..., None]
    canvas[box] += alpha * (texture[box] * (shade * (0.65 + 0.35 * inside)) - canvas[box])


def _photograph(rng, canvas: np.ndarray) -> np.ndarray:
    """Light from one side, a lens that is never quite sharp, and a sensor with noise: float32 -> uint8."""
    size = len(canvas)
    light = np.linspace(rng.uniform(0.7, 1.1), rng.uniform(0.8, 1.2), size, dtype=np.float32)
    canvas = canvas * (light[None, :, None] if rng.random() < 0.5 else light[:, None, None])
    canvas = cv2.GaussianBlur(canvas, (0, 0), rng.uniform(0.3, 1.3) * size / 321 + 0.05)
    canvas += rng.standard_normal(canvas.shape, dtype=np.float32) * np.float32(rng.uniform(3, 14))
    return np.clip(canvas * rng.uniform(0.85, 1.15), 0, 255).astype(np.uint8)
