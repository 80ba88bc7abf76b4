"""Probabilities made to follow the edges of their image, by a dense CRF; needs requirements-crf.txt."""

import numpy as np

from utils.errors import InputError

GAUSSIAN = {"sxy": 3, "compat": 3}  # smoothness: nearby pixels
BILATERAL = {"sxy": 32, "srgb": 13, "compat": 10}  # appearance: nearby pixels of like colour
_SMALLEST = 1e-5  # probability whose logarithm is taken


def check_crf() -> None:
    """InputError, which says what to install, where the library is missing."""
    _library()


def refine(probability: np.ndarray, image: np.ndarray, steps: int = 1) -> np.ndarray:
    """(C, H, W) float32 probabilities, (1, H, W) of binary masks, and their image (H, W, 3) uint8 -> the same shape.

    Mean-field inference of Krähenbühl & Koltun, "Efficient inference in fully connected CRFs with Gaussian edge
    potentials", NeurIPS 2011, with the settings of the released code of Wang et al., Pattern Recognition 2022. Classes
    whose probability is 0 everywhere stay there. InputError where the library is missing.
    """
    library = _library()
    every = np.concatenate([1 - probability, probability]) if len(probability) == 1 else probability
    held = np.flatnonzero(every.reshape(len(every), -1).any(1))
    if len(held) < 2:
        return probability
    _, height, width = probability.shape
    crf = library.DenseCRF2D(width, height, len(held))
    unary = -np.log(every[held].clip(_SMALLEST, 1)).reshape(len(held), -1)
    crf.setUnaryEnergy(np.ascontiguousarray(unary, dtype=np.float32))
    crf.addPairwiseGaussian(**GAUSSIAN)
    crf.addPairwiseBilateral(rgbim=np.ascontiguousarray(image), **BILATERAL)
    found = np.zeros(every.shape, np.float32)
    found[held] = np.asarray(crf.inference(steps), np.float32).reshape(len(held), height, width)
    return found[1:] if len(probability) == 1 else found


def _library():
    try:
        import pydensecrf.densecrf as library
    except ImportError:
        raise InputError(
            "--crf: pydensecrf2 is missing; pip install -r requirements-crf.txt, or leave it out"
        ) from None
    return library
