"""Random but repeatable changes of training images and their masks."""

import os
import random
from functools import partial

import cv2
import numpy as np


def augmentation(kind: str):
    """None, or a function (image, mask, seed) -> (image, mask) of a random but repeatable change.

    "flip" mirrors left-right, "crop" also zooms by 0.5 to 2, "strong" also moves, colours and blurs. Outside the frame
    image and mask are continued by reflection, so that no label is invented; masks are moved by nearest neighbour.
    """
    if kind == "none":
        return None
    if kind in ("flip", "crop"):
        return flip if kind == "flip" else crop
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # it would ask the network for its newest version at import
    import albumentations as A  # half a second, which other runs do not spend

    mirror = A.HorizontalFlip(p=0.5)
    move = A.Affine(
        scale=(0.7, 1.4),
        rotate=(-20, 20),
        shear=(-8, 8),
        translate_percent=(-0.1, 0.1),
        interpolation=cv2.INTER_LINEAR,
        mask_interpolation=cv2.INTER_NEAREST,
        border_mode=cv2.BORDER_REFLECT_101,
        p=0.8,
    )
    colour = [A.ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8), A.ToGray(p=0.1), A.RandomGamma((70, 140), p=0.3)]
    blur = A.OneOf([A.GaussianBlur((3, 5)), A.GaussNoise((0.02, 0.08))], p=0.3)
    return partial(_apply, A.Compose([mirror, move, *colour, blur]))


def flip(image, mask, seed):
    """Image and mask mirrored left-right, or not, as `seed` decides."""
    # decides as HorizontalFlip(p=0.5) does; the library around it takes longer than the flip
    mirrored = random.Random(seed).random() < 0.5
    return (cv2.flip(image, 1), cv2.flip(mask, 1)) if mirrored else (image, mask)


def crop(image, mask, seed):
    """Image and mask mirrored or not, zoomed by 0.5 to 2 (out and in with equal chance), and cut to their size again.

    The weak augmentation of Wang et al. (U2PL, CVPR 2022), but what lies outside is a reflection, not ignored.
    """
    draw = random.Random(seed)
    if draw.random() < 0.5:
        image, mask = cv2.flip(image, 1), cv2.flip(mask, 1)
    zoom = draw.uniform(0.5, 1) if draw.random() < 0.5 else draw.uniform(1, 2)
    size = image.shape[1::-1]
    # a larger image is cut anywhere, a smaller one lies in the middle; pixels are counted from their centres
    shift = [(n * zoom - n) * (draw.random() if zoom > 1 else 0.5) + 0.5 - 0.5 * zoom for n in size]
    move = np.array([[zoom, 0, -shift[0]], [0, zoom, -shift[1]]])
    how = (move, size)
    image = cv2.warpAffine(image, *how, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)
    return image, cv2.warpAffine(mask, *how, flags=cv2.INTER_NEAREST, borderMode=cv2.BORDER_REFLECT_101)


def photometric():
    """A function (image, seed) -> image that changes colours, greys and blurs, and moves nothing.

    The strong views of Yang et al. (UniMatch, CVPR 2023).
    """
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
    import albumentations as A

    blur = A.GaussianBlur(blur_limit=0, sigma_limit=(0.1, 2.0), p=0.5)
    pipeline = A.Compose([A.ColorJitter(0.5, 0.5, 0.5, 0.25, p=0.8), A.ToGray(p=0.2), blur])
    return partial(_recolour, pipeline)


def _recolour(pipeline, image, seed):
    pipeline.set_random_state(np.random.default_rng(seed), random.Random(seed))
    return pipeline(image=image)["image"]


def _apply(pipeline, image, mask, seed):
    # set_random_seed would give every transform the same draws: no colour without a flip
    pipeline.set_random_state(np.random.default_rng(seed), random.Random(seed))
    both = pipeline(image=image, mask=mask)
    return both["image"], both["mask"]
