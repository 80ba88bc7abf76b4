"""How good given masks look to a teacher: scores, where the two differ, a ranking and a suggested verdict.

Arrays in, numbers and words out; utils/audit.py reads and writes the files.
"""

import cv2
import numpy as np
from scipy.stats import rankdata

from utils.images import IGNORE
from utils.scores import QUALITIES

SOFT = ("soft", "margin")  # scores that need the teacher's probabilities
SCORES = (*QUALITIES, *SOFT)
VERDICTS = ("drop", "fix", "check", "keep")
HOPELESS = ("mask empty", "mask full", "inverted")  # there is nothing in such a mask to start a correction from
_GROUPS, _CLEAR = 30, 10  # masks from which on groups are looked for; by how much BIC has to prefer two
_NEAR, _LARGE = 0.04, 0.02  # of the image's side: what is still the outline; of the object: a region worth naming


def confidence(probability: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(C, H, W) probabilities and the given mask (H, W) -> p(given label), p(likeliest label) of the pixels that count.

    C = 1: `probability` is that of label 1. Both results are (n,) float64; pixels that `mask` marks 255 are left out.
    """
    known = mask != IGNORE
    if len(probability) == 1:
        p = probability[0][known].astype(np.float64)
        return np.where(mask[known] == 1, p, 1 - p), np.maximum(p, 1 - p)
    p = probability[:, known].astype(np.float64)
    return np.take_along_axis(p, mask[known][None].astype(np.int64), 0)[0], p.max(0)


def softmin(values: np.ndarray, temperature: float = 0.1) -> float:
    """sum_i softmax((1 - v) / T)_i v_i: a mean of (n,) values in [0, 1] in which low ones count most; 1 for none.

    Of p(given label) of every pixel it is the image's label quality of Lad and Mueller (2023), the default of
    cleanlab.segmentation.rank, with its T = 0.1. Small T tend to the worst pixel, large T to the mean.
    """
    if not values.size:
        return 1.0
    weight = np.exp((values.min() - values) / temperature)
    return float((weight * values).sum() / weight.sum())


def soft_scores(probability: np.ndarray, mask: np.ndarray, temperature: float = 0.1) -> dict[str, float]:
    """`soft`, `margin` and `sure` in [0, 1] of one image, from (C, H, W) probabilities and the given mask (H, W).

    `soft` is the softmin of p(given label). `margin` is IoU with every disagreement counted by how much likelier the
    teacher finds its own label, m = p(likeliest) - p(given): 1 - sum m / pixels in either mask (classes > 1: / all
    pixels that count). `sure` is the mean m of the pixels where they disagree, NaN where they nowhere do.
    """
    given, top = confidence(probability, mask)
    gap = top - given
    apart = gap > 0
    whole = given.size
    if len(probability) == 1:
        known = mask != IGNORE
        whole = int(((mask == 1) | (probability[0] > 0.5))[known].sum())
    return {
        "soft": softmin(given, temperature),
        "margin": float(np.clip(1 - gap.sum() / whole, 0, 1)) if whole else 1.0,
        "sure": float(gap[apart].mean()) if apart.any() else float("nan"),
    }


def explain(pred: np.ndarray, mask: np.ndarray, classes: int = 1) -> str:
    """The likeliest fault of the given mask (H, W) beside the teacher's `pred` (H, W), in a few words.

    Binary: `mask empty`, `mask full`, `inverted`, `shifted`, `object missing`, `part missing`, `extra region`,
    `boundary off`, `agrees`, or `teacher sees nothing`. Classes: the pair confused most, `2 labelled as 0`.
    """
    if classes > 1:
        return _explain_classes(pred, mask, classes)
    given, seen, both = (int(np.count_nonzero(m)) for m in (mask, pred, mask & pred))
    union = given + seen - both
    if union == 0 or both / union >= 0.95:
        return "agrees"
    if given == 0:
        return "mask empty"
    if given >= 0.995 * mask.size:
        return "mask full"
    if seen == 0:
        return "teacher sees nothing"
    background = mask.size - given
    if (seen - both) / (background + both) > max(0.5, both / union):
        return "inverted"
    offset = _shift(pred, mask, both / union)
    if offset:
        return f"shifted by {offset} px"
    near = _NEAR * np.sqrt(mask.size)
    missing, whole = _far_region(pred & ~mask, mask, near)
    extra, _ = _far_region(mask & ~pred, pred, near)
    found = [(missing, "object missing" if whole else "part missing"), (extra, "extra region")]
    named = [text for area, text in sorted(found, reverse=True) if area >= _LARGE * union]
    if named:
        return ", ".join(named)
    lacking, added = seen - both, given - both
    way = " (too tight)" if lacking > 3 * added else " (too wide)" if added > 3 * lacking else ""
    return f"boundary off{way}"


def _shift(pred, mask, overlap) -> int:
    """How many pixels to move the mask by so that more than half of what the IoU lacks is gained; 0 if none does."""
    down, right = (round(float(np.mean(a) - np.mean(b))) for a, b in zip(pred.nonzero(), mask.nonzero(), strict=True))
    moved = cv2.warpAffine(mask, np.float32([[1, 0, right], [0, 1, down]]), mask.shape[::-1], flags=cv2.INTER_NEAREST)
    after = np.count_nonzero(moved & pred) / max(1, np.count_nonzero(moved | pred))
    # what an object cut off at one side gains by a move is less than this
    return round(float(np.hypot(down, right))) if after - overlap > 0.5 * (1 - overlap) and after > 0.75 else 0


def _far_region(only, other, near) -> tuple[int, bool]:
    """Of the largest region of `only` (H, W) that reaches farther than `near` pixels from `other`: how many of its
    pixels lie beyond, and whether it is apart from `other`."""
    away = cv2.distanceTransform(1 - other, cv2.DIST_L2, 3)
    count, region = cv2.connectedComponents(only, connectivity=8)
    beyond = np.bincount(region[(away > near) & (only > 0)], minlength=count)
    largest = int(beyond.argmax())
    if not beyond[largest]:
        return 0, False
    return int(beyond[largest]), bool(away[region == largest].min() > 2)


def _explain_classes(pred, mask, classes) -> str:
    counts = (mask != IGNORE) & (pred != IGNORE)
    if not counts.any():
        return "mask is all void"
    apart, labelled = (pred != mask) & counts, np.count_nonzero(((pred > 0) | (mask > 0)) & counts)
    if np.count_nonzero(apart) <= 0.05 * labelled:
        return "agrees"
    pairs = np.bincount(pred[apart].astype(np.int64) * classes + mask[apart], minlength=classes**2)
    seen, given = divmod(int(pairs.argmax()), classes)
    return f"{seen} labelled as {given}"


def combine(scores: dict[str, np.ndarray], by: list[str]) -> np.ndarray:
    """One (n,) value to rank by, low is worst: the score itself, or the mean of the percentile ranks of several."""
    if len(by) == 1:
        return scores[by[0]]
    return np.mean([rankdata(scores[name]) / len(scores[name]) for name in by], axis=0)


def deviation(values: np.ndarray) -> np.ndarray:
    """How far each of (n,) values in [0, 1] lies below those of usable masks, in their standard deviations.

    Usable are the better of two groups, where there are two clearly apart (a mixture of two normal distributions that
    fits better by BIC, means two deviations apart or more): then even most masks may be bad. Else all count, by median
    and 1.4826 MAD. Measured on the logit scale, since scores crowd at 0 or at 1; values are clipped to [0.02, 0.95],
    and a deviation is at least 0.4, so that masks which all agree well are not set against each other.
    """
    middle, spread = _usable(values)
    return (middle - _logit(values)) / spread


def lowest_usable(values: np.ndarray, deviations: float = 2.0) -> float:
    """The score in [0, 1] that lies so many deviations below those of usable masks, as `deviation` measures them."""
    middle, spread = _usable(values)
    return float(1 / (1 + np.exp(deviations * spread - middle)))


def _logit(values) -> np.ndarray:
    values = np.clip(values, 0.02, 0.95)
    return np.log(values / (1 - values))


def _usable(values) -> tuple[float, float]:
    """Mean and deviation of usable masks' scores (n,), as logits."""
    logit = _logit(values)
    middle, spread = _better_group(logit) or (np.median(logit), 1.4826 * np.median(np.abs(logit - np.median(logit))))
    return middle, max(spread, 0.4)


def trust(values: np.ndarray) -> np.ndarray:
    """The chance that a mask is of the better of two groups, (n,) in [0, 1], by its score, (n,) in [0, 1].

    It never falls as the score rises. Where the scores do not fall into two groups, it is the score itself.
    """
    logit = _logit(values)
    groups = _two_groups(logit)
    if groups is None:
        return values
    means = groups.means_.ravel()
    # beyond its mean a narrow group would leave what is better, or worse, to the wide one
    chance = groups.predict_proba(logit.clip(means.min(), means.max())[:, None])[:, means.argmax()]
    order = np.argsort(logit, kind="stable")
    found = np.empty_like(chance)
    found[order] = np.maximum.accumulate(chance[order])
    return found


def _better_group(logit: np.ndarray) -> tuple[float, float] | None:
    """Mean and deviation of the higher of two groups; None where (n,) values do not fall into two."""
    groups = _two_groups(logit)
    if groups is None:
        return None
    best = groups.means_.ravel().argmax()
    return float(groups.means_.ravel()[best]), float(np.sqrt(groups.covariances_.ravel()[best]))


def _two_groups(logit):
    """The mixture of two normal distributions that (n,) values fall into; None where they do not."""
    if len(logit) < _GROUPS or np.ptp(logit) == 0:
        return None
    from sklearn.mixture import GaussianMixture  # a second to import, only needed here

    x = logit[:, None]
    one, two = (GaussianMixture(k, n_init=k, random_state=0, reg_covar=1e-2).fit(x) for k in (1, 2))
    mean, variance = two.means_.ravel(), two.covariances_.ravel()
    apart = np.ptp(mean) / np.sqrt(variance.mean())
    return None if one.bic(x) - two.bic(x) < _CLEAR or apart < 2 else two


def suggest(scores: dict[str, np.ndarray], by: list[str], reasons: list[str], cuts=(2.0, 3.0)) -> list[str]:
    """A verdict for every image, from the mean `deviation` z of the scores in `by`: a suggestion, never a proof.

    `keep` up to cuts[0]; `check` up to cuts[1], or beyond it where the teacher sees nothing or is not sure of what it
    says (`sure` below 0.5, where there are probabilities). Beyond: `drop` where the mask is empty, full or inverted
    or has an IoU below 0.5, else `fix`.
    """
    far = np.mean([deviation(scores[name]) for name in by], axis=0)
    unsure = scores["sure"] < 0.5 if "sure" in scores else np.zeros(len(far), bool)
    verdicts = []
    for z, doubt, iou, reason in zip(far, unsure, scores["iou"], reasons, strict=True):
        if z <= cuts[0]:
            verdicts.append("keep")
        elif z <= cuts[1] or doubt or reason == "teacher sees nothing":
            verdicts.append("check")
        else:
            verdicts.append("drop" if iou < 0.5 or reason in HOPELESS else "fix")
    return verdicts


def precision_at(value: np.ndarray, noisy: np.ndarray) -> np.ndarray:
    """(n,) share of noisy (n,) bool among the k lowest values, k = 1 ... n; of equal values, what is to be expected."""
    order = np.argsort(value, kind="stable")
    ends = np.flatnonzero(np.append(np.diff(value[order]) > 0, True)) + 1
    hits = np.append(0, np.cumsum(noisy[order])[ends - 1])
    k = np.arange(1, len(value) + 1)
    return np.interp(k, np.append(0, ends), hits) / k


def ranking_report(value: np.ndarray, noisy: np.ndarray, at=(10, 25, 50, 100)) -> dict[str, float]:
    """AUROC and AUPRC of finding the noisy masks (n,) bool by low values, and the precision among the k lowest.

    `P@noisy` is the precision at k = the number of noisy masks; empty where all masks are of one kind.
    """
    if noisy.all() or not noisy.any():
        return {}
    from sklearn.metrics import average_precision_score, roc_auc_score  # a second to import, only needed here

    precision = precision_at(value, noisy)
    found = {
        "AUROC": float(roc_auc_score(noisy, -value)),
        "AUPRC": float(average_precision_score(noisy, -value)),
    }
    found |= {f"P@{k}": float(precision[k - 1]) for k in at if k <= len(value)}
    return found | {"P@noisy": float(precision[noisy.sum() - 1])}


def weight_report(weight: np.ndarray, noisy: np.ndarray) -> dict[str, float]:
    """How well weights (n,) find the clean masks, given which are noisy (n,) bool.

    `auroc` and `ap` of clean (and `ap_noisy` of noisy) as the class to find, `noisy_share` of the total weight,
    `effective_size` = (sum w)^2 / sum w^2; empty where all masks are of one kind.
    """
    if noisy.all() or not noisy.any():
        return {}
    from sklearn.metrics import average_precision_score, roc_auc_score  # a second to import, only needed here

    total = weight.sum()
    return {
        "auroc": float(roc_auc_score(~noisy, weight)),
        "ap": float(average_precision_score(~noisy, weight)),
        "ap_noisy": float(average_precision_score(noisy, -weight)),
        "noisy_share": float(weight[noisy].sum() / total) if total > 0 else float("nan"),
        "effective_size": float(total**2 / (weight**2).sum()) if total > 0 else 0.0,
    }
