"""AutoAugment and RandAugment as IEG uses them: the policies as numbers, and their operations on PIL images.

Cubuk et al., "AutoAugment", CVPR 2019, and "RandAugment", NeurIPS 2020. torchvision's CIFAR policy has 25 of the 95
published pairs and other magnitudes, so that these are written out here.
"""

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

# pairs of operations, each with its chance in tenths and its level
_CIFAR = """
Invert 1 7 Contrast 2 6; Rotate 7 2 TranslateX 3 9; Sharpness 8 1 Sharpness 9 3; ShearY 5 8 TranslateY 7 9;
AutoContrast 5 8 Equalize 9 2; Solarize 4 5 AutoContrast 9 3; TranslateY 9 9 TranslateY 7 9;
AutoContrast 9 2 Solarize 8 3; Equalize 8 8 Invert 1 3; TranslateY 7 9 AutoContrast 9 1;
Solarize 4 5 AutoContrast 0 2; TranslateY 7 9 TranslateY 7 9; AutoContrast 9 0 Solarize 4 3;
Equalize 7 5 Invert 1 3; TranslateY 7 9 TranslateY 7 9; Solarize 4 5 AutoContrast 9 1;
TranslateY 8 9 TranslateY 9 9; AutoContrast 8 0 TranslateY 7 9; TranslateY 2 7 Color 9 6; Equalize 7 6 Color 4 9;
ShearY 2 7 Posterize 3 7; Color 4 3 Brightness 6 7; Sharpness 3 9 Brightness 7 9; Equalize 6 5 Equalize 5 1;
Contrast 6 7 Sharpness 6 5; Brightness 3 7 AutoContrast 5 8; AutoContrast 9 4 AutoContrast 5 6;
Solarize 3 5 Equalize 6 5; TranslateY 2 4 Sharpness 3 3; Brightness 0 8 Color 8 8; Solarize 2 6 Color 8 6;
Solarize 2 6 AutoContrast 8 1; Solarize 4 1 Equalize 6 5; Brightness 0 0 Solarize 5 2;
AutoContrast 9 5 Brightness 5 3; Contrast 7 5 Brightness 0 2; Solarize 2 8 Solarize 1 5;
Contrast 5 1 TranslateY 2 9; AutoContrast 6 5 TranslateY 0 9; AutoContrast 9 4 Equalize 8 4;
Brightness 0 7 Equalize 4 7; Solarize 2 5 Equalize 7 5; Equalize 6 8 Color 6 2; Color 3 7 Color 2 4;
AutoContrast 5 2 Solarize 7 2; AutoContrast 2 0 Equalize 1 0; ShearY 6 5 Equalize 6 5;
Brightness 9 3 AutoContrast 4 1; Equalize 8 8 Equalize 7 7; Equalize 7 7 Solarize 5 0;
Equalize 8 4 TranslateY 8 9; TranslateY 8 9 TranslateY 6 9; TranslateY 9 0 TranslateY 5 9;
AutoContrast 5 3 Solarize 3 4; Solarize 5 3 Equalize 4 4; Color 7 7 TranslateX 5 8;
Equalize 3 7 AutoContrast 4 8; TranslateY 4 3 Sharpness 2 6; Brightness 9 6 Color 2 8; Solarize 5 2 Invert 0 3;
AutoContrast 1 5 Brightness 0 0; Cutout 2 4 Equalize 1 1; Equalize 7 7 AutoContrast 6 4; Color 1 8 ShearY 2 3;
ShearY 4 2 Rotate 7 0; ShearY 1 3 AutoContrast 9 5; TranslateY 3 6 Cutout 3 3; Equalize 5 0 Solarize 6 6;
AutoContrast 3 5 Rotate 2 7; Equalize 8 2 Invert 4 0; Equalize 9 5 Color 7 0; Equalize 1 1 ShearY 1 3;
AutoContrast 7 3 Equalize 7 0; Brightness 5 1 Contrast 1 7; Contrast 1 4 Solarize 6 5; Solarize 2 3 ShearX 0 0;
TranslateX 3 0 TranslateX 6 0; Equalize 5 9 TranslateY 6 7; ShearX 1 0 Sharpness 5 1; Equalize 8 6 Invert 3 6;
AutoContrast 3 9 Cutout 5 3; ShearX 4 4 AutoContrast 9 2; ShearX 0 3 Posterize 0 3; Solarize 4 3 Color 2 4;
Equalize 1 4 Equalize 7 6; Equalize 3 8 AutoContrast 4 3; Solarize 6 4 AutoContrast 7 6;
AutoContrast 2 9 Brightness 4 8; Equalize 1 0 Equalize 0 6; Equalize 8 4 Equalize 0 4;
Equalize 5 5 AutoContrast 1 2; Solarize 5 5 AutoContrast 9 5; AutoContrast 6 1 AutoContrast 7 8;
Equalize 2 0 AutoContrast 1 2; Equalize 6 9 Equalize 4 4
"""
_IMAGENET = """
Equalize 8 1 ShearY 8 4; Color 4 9 Equalize 6 3; Color 4 1 Rotate 6 8; Solarize 8 3 Equalize 4 7;
Solarize 4 2 Solarize 6 2; Color 2 0 Equalize 8 8; Equalize 4 8 SolarizeAdd 8 3; ShearX 2 9 Rotate 6 8;
Color 6 1 Equalize 10 2; Invert 4 9 Rotate 6 0; Equalize 10 9 ShearY 6 3; Color 4 7 Equalize 6 0;
Posterize 4 6 AutoContrast 4 7; Solarize 6 8 Color 6 9; Solarize 2 4 Rotate 8 9; Rotate 10 7 TranslateY 8 9;
ShearX 0 0 Solarize 8 4; ShearY 8 0 Color 6 4; Color 10 0 Rotate 6 2; Equalize 8 4 Equalize 0 8;
Equalize 10 4 AutoContrast 6 2; ShearY 4 7 SolarizeAdd 6 7; Posterize 8 2 Solarize 6 10;
Solarize 6 8 Equalize 6 1; Color 8 6 Rotate 4 5
"""


def _parse(table):
    words = [pair.split() for pair in table.split(";")]
    return [[(w[k], int(w[k + 1]) / 10, int(w[k + 2])) for k in (0, 3)] for w in words]


POLICIES = {"cifar": _parse(_CIFAR), "imagenet": _parse(_IMAGENET)}
RANDAUGMENT = "Identity AutoContrast Equalize Rotate Solarize Color Contrast Brightness Sharpness ShearX ShearY"
RANDAUGMENT = [*RANDAUGMENT.split(), "TranslateX", "TranslateY", "Posterize"]
ENHANCE = {name: getattr(ImageEnhance, name) for name in ("Color", "Contrast", "Brightness", "Sharpness")}
GREY = 128  # 0 of images scaled to [-1, 1]


def autoaugment(image: Image.Image, policy: str, rng: np.random.Generator) -> Image.Image:
    """The image after one pair of operations of the policy "cifar" or "imagenet", drawn by `rng`."""
    pairs = POLICIES[policy]
    for name, chance, level in pairs[rng.integers(len(pairs))]:
        if rng.random() < chance:
            image = operate(image, name, level, rng, large=policy == "imagenet")
    return image


def randaugment(image: Image.Image, chosen: list[tuple[str, int]], rng: np.random.Generator) -> Image.Image:
    """The image after each of the chosen (operation, level) with probability 1/2."""
    for name, level in chosen:
        if rng.random() < 0.5:
            image = operate(image, name, level, rng)
    return image


def choose_operations(rng: np.random.Generator, count: int = 2) -> list[tuple[str, int]]:
    """Operations of RandAugment with levels from 1 to 9, drawn with replacement."""
    return [(RANDAUGMENT[rng.integers(len(RANDAUGMENT))], int(rng.integers(1, 10))) for _ in range(count)]


def operate(image: Image.Image, name: str, level: int, rng: np.random.Generator, large: bool = False) -> Image.Image:
    """One operation at a level from 0 to 10; what moves is drawn to either side, what it uncovers is grey.

    `large`: the ranges of ImageNet, where a shift is at most 250 pixels, a cutout has 100, and Solarize and Posterize
    do less the higher their level is.
    """
    if name in ENHANCE:
        return ENHANCE[name](image).enhance(0.18 * level + 0.1)
    if name in ("AutoContrast", "Equalize", "Invert"):
        return getattr(ImageOps, name.lower())(image)
    if name == "Posterize":
        return ImageOps.posterize(image, max(1, int(0.4 * level) if large else 4 - int(0.4 * level)))
    if name == "Solarize":
        return ImageOps.solarize(image, int(25.6 * level) if large else 256 - int(25.6 * level))
    if name == "SolarizeAdd":
        pixels = np.asarray(image)
        lighter = np.minimum(pixels.astype(int) + int(11 * level), 255).astype(np.uint8)
        return Image.fromarray(np.where(pixels < 128, lighter, pixels))
    if name == "Cutout":
        return cutout(image, int((10 if large else 2) * level), rng)
    if name == "Identity":
        return image
    return _move(image, name, level * (-1 if rng.random() < 0.5 else 1), large)


def _move(image, name, level, large):
    grey = (GREY, GREY, GREY)
    if name == "Rotate":
        return image.rotate(int(3 * level), fillcolor=grey)
    shift = int(25 * level) if large else level
    across = {"ShearX": (1, 0.03 * level, 0, 0, 1, 0), "ShearY": (1, 0, 0, 0.03 * level, 1, 0)}
    across |= {"TranslateX": (1, 0, shift, 0, 1, 0), "TranslateY": (1, 0, 0, 0, 1, shift)}
    return image.transform(image.size, Image.Transform.AFFINE, across[name], fillcolor=grey)


def cutout(image: Image.Image, size: int, rng: np.random.Generator) -> Image.Image:
    """The image with a grey square of `size` around a point drawn anywhere in it, cut off at the border."""
    if size < 1:
        return image
    pixels = np.array(image)
    y, x = rng.integers(pixels.shape[0]), rng.integers(pixels.shape[1])
    top, left = max(0, y - size // 2), max(0, x - size // 2)
    pixels[top : y - size // 2 + size, left : x - size // 2 + size] = GREY
    return Image.fromarray(pixels)
