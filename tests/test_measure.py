"""Metrics against independent computations: scikit-learn, torchmetrics, scipy, and explicit loops."""

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import binomtest
from scipy.stats import bootstrap as scipy_bootstrap
from sklearn.metrics.pairwise import cosine_similarity, polynomial_kernel
from torchmetrics.image.kid import poly_mmd

from coneslab.errors import ConeslabError, MismatchError
from coneslab.measure.judge import Judge, load_judge
from coneslab.measure.statistics import bootstrap_interval, kid, share_interval


@pytest.fixture(scope="module")
def pictures() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (7, 48, 48, 3), dtype=np.uint8)


PROMPTS = ["a cat", "a dog on a hill", "nothing", "a cat", "under the sea", "red", "a very long prompt " * 20]


@pytest.fixture(scope="module")
def plain(judge, pictures):
    """Embeddings straight from the CLIP model, one picture and one prompt at a time."""
    image, text = [], []
    for picture, prompt in zip(pictures, PROMPTS, strict=True):
        inputs = judge.processor(
            text=[prompt], images=Image.fromarray(picture), return_tensors="pt", truncation=True, max_length=24
        )
        with torch.no_grad():
            outputs = judge.model(**inputs)
        image.append(outputs.image_embeds.numpy()[0])
        text.append(outputs.text_embeds.numpy()[0])
    return np.array(image), np.array(text)


def test_features_are_the_models_own_at_unit_length(judge, pictures, plain):
    np.testing.assert_allclose(judge.image_features(pictures), plain[0], atol=1e-5)
    np.testing.assert_allclose(judge.text_features(PROMPTS), plain[1], atol=1e-5)
    small_batches = Judge(judge.model, judge.processor, batch_size=2)
    torch.testing.assert_close(small_batches.image_features(pictures), judge.image_features(pictures))
    torch.testing.assert_close(small_batches.text_features(PROMPTS), judge.text_features(PROMPTS))
    raw = judge.image_features(pictures, normalize=False)
    assert not torch.allclose(raw.norm(dim=-1), torch.ones(7))
    torch.testing.assert_close(raw / raw.norm(dim=-1, keepdim=True), judge.image_features(pictures))


def test_pictures_may_come_as_pil_or_array(judge, pictures):
    as_list = [Image.fromarray(picture) for picture in pictures]
    expected = judge.image_features(pictures)
    assert torch.equal(judge.image_features(as_list), expected)
    assert torch.equal(judge.image_features([picture.convert("RGBA") for picture in as_list]), expected)
    assert torch.equal(judge.image_features(as_list[2]), judge.image_features(pictures[2]))


def test_text_alignment_against_sklearn(judge, pictures, plain):
    each = np.diag(cosine_similarity(*plain))
    np.testing.assert_allclose(judge.text_alignment(pictures, PROMPTS, reduction="none"), each, atol=1e-5)
    assert judge.text_alignment(pictures, PROMPTS) == pytest.approx(each.mean(), abs=1e-5)
    one = cosine_similarity(plain[0], plain[1][:1]).mean()
    assert judge.text_alignment(pictures, "a cat") == pytest.approx(one, abs=1e-5)


def test_image_alignment_against_sklearn(judge, pictures, plain):
    table = cosine_similarity(plain[0][:4], plain[0][4:])
    assert judge.image_alignment(pictures[:4], pictures[4:]) == pytest.approx(table.mean(), abs=1e-5)
    each = judge.image_alignment(pictures[:4], pictures[4:], reduction="none")
    np.testing.assert_allclose(each, table.mean(1), atol=1e-5)


def test_classify_takes_the_nearest_label_and_averages_phrasings(judge, pictures, plain):
    labels = ["a cat", "a dog on a hill", "red"]
    expected = cosine_similarity(plain[0], plain[1][[0, 1, 5]]).argmax(1)
    assert judge.classify(pictures, labels).tolist() == expected.tolist()
    grouped = [["a cat", "under the sea"], ["red"]]
    means = np.array([plain[1][[0, 4]].mean(0), plain[1][5]])
    np.testing.assert_allclose(judge.similarity(pictures, grouped), cosine_similarity(plain[0], means), atol=1e-5)
    assert judge.classify(pictures, grouped).tolist() == cosine_similarity(plain[0], means).argmax(1).tolist()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda judge, pictures: judge.text_alignment(pictures, ["a cat"] * 3), "7 pictures and 3 prompts"),
        (lambda judge, pictures: judge.text_alignment(pictures, "a", reduction="sum"), "reduction is 'sum'"),
        (lambda judge, pictures: judge.image_features([]), "no pictures"),
        (lambda judge, pictures: judge.image_features(pictures / 255 - 1), "numbers from -1 to 0: give uint8"),
        (lambda judge, pictures: judge.image_features(pictures[..., :2]), "of 1, 3 or 4 channels"),
        (lambda judge, pictures: judge.image_features(["nowhere.png"]), "there is no file nowhere.png"),
        (lambda judge, pictures: judge.image_features([3]), "got a int among the pictures"),
        (lambda judge, pictures: judge.text_features([]), "no prompts"),
        (lambda judge, pictures: judge.classify(pictures, [["a cat"], []]), "without a phrasing"),
        (lambda judge, pictures: load_judge("/nowhere/at/all"), "/nowhere/at/all"),
    ],
)
def test_bad_input_is_named(judge, pictures, call, message):
    with pytest.raises(ConeslabError, match=message):
        call(judge, pictures)


def features(n: int, d: int, shift: float, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(shift, 1, (n, d))


def test_kid_of_all_pictures_against_torchmetrics():
    a, b = features(40, 16, 0, 1), features(40, 16, 0.4, 2)
    expected = poly_mmd(torch.from_numpy(a), torch.from_numpy(b)).item()
    assert kid(a, b) == pytest.approx(expected, rel=1e-9)
    expected = poly_mmd(torch.from_numpy(a), torch.from_numpy(b), degree=2, gamma=0.3, coef=0.5).item()
    assert kid(torch.from_numpy(a), torch.from_numpy(b), degree=2, gamma=0.3, coef0=0.5) == pytest.approx(expected)


def test_kid_of_unequal_numbers_against_sklearn():
    a, b = features(30, 8, 0, 1), features(45, 8, 0.4, 2)
    xx, yy, xy = (polynomial_kernel(*pair, degree=3) for pair in ((a, a), (b, b), (a, b)))
    pairs_x, pairs_y = ~np.eye(30, dtype=bool), ~np.eye(45, dtype=bool)
    assert kid(a, b) == pytest.approx(xx[pairs_x].mean() + yy[pairs_y].mean() - 2 * xy.mean(), rel=1e-9)


def clean_fid_kernel_distance(a: np.ndarray, b: np.ndarray, subsets: int, size: int, seed: int) -> float:
    """clean-fid's loop over subsets (its `kernel_distance`), on scikit-learn's kernel."""
    rng = np.random.default_rng(seed)
    total = 0.0
    for _ in range(subsets):
        x, y = a[rng.choice(len(a), size, replace=False)], b[rng.choice(len(b), size, replace=False)]
        within = polynomial_kernel(x, x, degree=3) + polynomial_kernel(y, y, degree=3)
        across = polynomial_kernel(x, y, degree=3)
        total += (within.sum() - np.diag(within).sum()) / (size - 1) - across.sum() * 2 / size
    return total / subsets / size


def test_kid_of_subsets_against_clean_fids_loop():
    a, b = features(50, 8, 0, 1), features(60, 8, 0.4, 2)
    expected = clean_fid_kernel_distance(a, b, subsets=5, size=20, seed=3)
    assert kid(a, b, subset_size=20, subsets=5, seed=3) == pytest.approx(expected, rel=1e-9)


def test_kid_is_unbiased_and_grows_with_distance():
    same = [kid(features(20, 8, 0, seed), features(20, 8, 0, 1000 + seed)) for seed in range(400)]
    assert abs(np.mean(same)) < 4 * np.std(same) / np.sqrt(len(same))
    assert min(same) < 0
    a = features(100, 8, 0, 1)
    near, far = kid(a, features(100, 8, 0.3, 2)), kid(a, features(100, 8, 0.8, 2))
    assert 0 < near < far


def test_kid_of_features_of_length_1_is_that_of_features_of_length_sqrt_d():
    """k-diffusion and torchmetrics would see the cubic kernel as all but linear otherwise."""
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (features(40, 16, 0.2, 1), features(40, 16, 0.5, 2)))
    expected = poly_mmd(torch.from_numpy(a * 4), torch.from_numpy(b * 4)).item()
    assert kid(a, b) == pytest.approx(expected, rel=1e-9)
    assert kid(a.astype(np.float32), torch.from_numpy(b).float()) == pytest.approx(expected, rel=1e-4)
    assert kid(a, b, gamma=1 / 16) == pytest.approx(poly_mmd(torch.from_numpy(a), torch.from_numpy(b)).item(), rel=1e-9)


def gretton(x: np.ndarray, y: np.ndarray) -> float:
    """The U-statistic of pairs (Gretton et al. 2012, Lemma 6), written out."""

    def k(a, b):
        return (a @ b / len(a) + 1) ** 3

    n, total = len(x), 0.0
    for i in range(n):
        for j in range(n):
            if i != j:
                total += k(x[i], x[j]) + k(y[i], y[j]) - k(x[i], y[j]) - k(x[j], y[i])
    return total / (n * (n - 1))


def test_kid_of_pairs_is_unbiased_where_the_other_estimate_is_not():
    rng = np.random.default_rng(0)
    a = features(12, 8, 0, 1)
    b = a + 0.3 * features(12, 8, 0, 2)
    assert kid(a, b, paired=True) == pytest.approx(gretton(a, b), rel=1e-9)
    assert kid(a, a, paired=True) == 0.0 and kid(a, a) < -0.5
    twice = kid(a, b, paired=True, subset_size=6, subsets=3, seed=4)
    drawn = np.random.default_rng(4)
    rows = [drawn.choice(12, 6, replace=False) for _ in range(3)]
    assert twice == pytest.approx(np.mean([gretton(a[own], b[own]) for own in rows]), rel=1e-9)
    paired, apart = [], []
    for _ in range(300):  # equal distributions, dependent pairs: both should be 0 on average
        shared, first, second = rng.normal(size=(3, 20, 8))
        x, y = (0.9 * shared + 0.436 * own for own in (first, second))
        paired.append(kid(x, y, paired=True))
        apart.append(kid(x, y))
    error = np.std(paired) / np.sqrt(300)
    assert abs(np.mean(paired)) < 4 * error and np.mean(apart) < -4 * error
    with pytest.raises(MismatchError, match="pairs"):
        kid(a, b[:5], paired=True)


def test_kid_refuses_what_does_not_fit():
    with pytest.raises(MismatchError, match=r"\(5, 4\) and \(5, 3\)"):
        kid(np.ones((5, 4)), np.ones((5, 3)))
    with pytest.raises(ConeslabError, match="at least 2"):
        kid(np.ones((1, 4)), np.ones((5, 4)))
    with pytest.raises(ConeslabError, match="subset_size=6"):
        kid(np.ones((5, 4)), np.ones((9, 4)), subset_size=6)
    with pytest.raises(ConeslabError, match="NaN"):
        kid(np.full((5, 4), np.nan), np.ones((9, 4)))


def test_bootstrap_against_scipy():
    values = np.random.default_rng(0).gamma(2, size=40)
    ours = bootstrap_interval(values, resamples=20_000, level=0.9)
    theirs = scipy_bootstrap(
        (values,), np.mean, n_resamples=20_000, confidence_level=0.9, method="percentile", rng=1
    ).confidence_interval
    assert ours.estimate == pytest.approx(values.mean())
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.02)
    assert bootstrap_interval(values) == bootstrap_interval(values) != bootstrap_interval(values, seed=1)


def nested_by_loop(values, subjects, seeds, resamples: int) -> list[float]:
    """The hierarchical bootstrap written out, one draw after another."""
    rng = np.random.default_rng(9)
    means = []
    for _ in range(resamples):
        drawn_subjects = []
        for subject in rng.choice(np.unique(subjects), len(np.unique(subjects))):
            own = np.unique(seeds[subjects == subject])
            drawn_seeds = [values[(subjects == subject) & (seeds == seed)].mean() for seed in rng.choice(own, len(own))]
            drawn_subjects.append(np.mean(drawn_seeds))
        means.append(np.mean(drawn_subjects))
    return means


@pytest.mark.slow
def test_hierarchical_bootstrap_against_a_loop():
    rng = np.random.default_rng(0)
    subjects = np.repeat(np.arange(6), 12)
    seeds = np.tile(np.repeat(np.arange(3), 4), 6)
    values = rng.normal(size=6)[subjects] + rng.normal(size=(6, 3))[subjects, seeds] + rng.normal(size=72) / 4
    keep = rng.random(72) < 0.8  # unequal numbers of pictures
    subjects, seeds, values = subjects[keep], seeds[keep], values[keep]
    ours = bootstrap_interval(values, clusters=[subjects, seeds], resamples=20_000)
    means = nested_by_loop(values, subjects, seeds, 3000)
    assert (ours.low, ours.high) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), abs=0.08)
    assert ours.estimate == pytest.approx(np.mean(means), abs=0.04)
    alone = bootstrap_interval(values)
    assert ours.high - ours.low > 2 * (alone.high - alone.low)  # pictures of a subject are not independent


def test_paired_difference_removes_what_subjects_share():
    rng = np.random.default_rng(0)
    subjects = [f"subject {index // 4}" for index in range(40)]
    base = rng.normal(size=10).repeat(4)
    treated = base + 0.1 + rng.normal(size=40) * 0.01
    paired = bootstrap_interval(treated, minus=base, clusters=[subjects])
    assert paired.estimate == pytest.approx(np.mean(treated - base))
    assert 0.09 < paired.low < 0.1 < paired.high < 0.11
    assert bootstrap_interval(treated, clusters=[subjects]).low < 0


def test_shares_near_an_end_have_the_interval_of_wilson():
    for hits, n in ((0, 24), (24, 24), (1, 24), (13, 24), (2, 2)):
        expected = binomtest(hits, n).proportion_ci(0.95, "wilson")
        for found in (bootstrap_interval([1] * hits + [0] * (n - hits)), share_interval(np.arange(n) < hits)):
            assert (found.low, found.high) == pytest.approx((expected.low, expected.high)) and found.clusters == n
            assert found.estimate == pytest.approx(hits / n)


def test_a_clustered_share_counts_its_effective_number():
    labels = np.repeat(np.arange(10), 8)
    for value in (0, 1):  # clusters that agree are as many values as there are clusters
        found = share_interval([value] * 80, clusters=[labels])
        expected = binomtest(10 * value, 10).proportion_ci(0.95, "wilson")
        assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-12)
        assert (found.values, found.clusters) == (80, 10)
    even = share_interval(np.arange(80) % 2, clusters=[labels])  # half of every cluster: no less than 80 values
    expected = binomtest(40, 80).proportion_ci(0.95, "wilson")
    assert (even.low, even.high) == pytest.approx((expected.low, expected.high))
    whole = np.repeat([1, 1, 1, 1, 1, 1, 1, 0, 0, 0], 8)  # a cluster is all right or all wrong: ten values
    found = share_interval(whole, clusters=[labels])
    expected = binomtest(7, 10).proportion_ci(0.95, "wilson")
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.02)
    rates = np.array([2, 3, 4, 5, 6, 7, 8, 5, 4, 6]) / 8  # variance of a mean of ten, as an unbiased estimate
    found = share_interval((np.arange(8) < 8 * rates[:, None]).ravel(), clusters=[labels])
    n = rates.mean() * (1 - rates.mean()) / (((rates - rates.mean()) ** 2).sum() / 9 / 10)
    middle = (rates.mean() + 1.959964**2 / (2 * n)) / (1 + 1.959964**2 / n)
    reach = (
        1.959964 / (1 + 1.959964**2 / n) * np.sqrt(rates.mean() * (1 - rates.mean()) / n + (1.959964 / (2 * n)) ** 2)
    )
    assert 10 < n < 80 and (found.low, found.high) == pytest.approx((middle - reach, middle + reach), rel=1e-6)
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(400):  # clusters with shares of their own around 0.97, which a bootstrap covers far too seldom
        own = rng.beta(9.7, 0.3, size=12)
        found = share_interval(rng.random((12, 6)).ravel() < own.repeat(6), clusters=[np.repeat(np.arange(12), 6)])
        inside += found.low <= 0.97 <= found.high
    assert inside / 400 > 0.93


def test_too_few_values_have_no_interval():
    for found in (
        bootstrap_interval([0.3]),
        bootstrap_interval([0.1, 0.2, 0.4, 0.3]),
        bootstrap_interval(np.linspace(0, 1, 30), clusters=[np.arange(30) % 4]),
        bootstrap_interval([1] * 30, clusters=[np.arange(30) % 4]),
        bootstrap_interval([1]),
        bootstrap_interval([1, 0, 1], minus=[0, 0, 1]),
    ):
        assert np.isnan(found.low) and np.isnan(found.high) and np.isfinite(found.estimate)
        assert "no interval" in repr(found) and found.to_dict()["low"] is None
    assert np.isfinite(bootstrap_interval([0.1, 0.2, 0.4, 0.3, 0.5]).low)


def test_a_difference_of_shares_that_never_differ_is_not_known_exactly():
    none = bootstrap_interval([1] * 24, minus=[1] * 24)
    assert none.estimate == 0 and none.low < -0.05 and none.high > 0.05
    # Agresti and Min (2005): 10 pairs (1, 0), 3 pairs (0, 1), 37 that agree
    first, second = [1] * 10 + [0] * 3 + [1] * 37, [0] * 10 + [1] * 3 + [1] * 37
    found = bootstrap_interval(first, minus=second)
    n = 52
    middle, spread = (10.5 - 3.5) / n, np.sqrt((14 / n - (7 / n) ** 2) / n)
    assert (found.low, found.high) == pytest.approx((middle - 1.959964 * spread, middle + 1.959964 * spread))
    clustered = bootstrap_interval([1] * 24, minus=[1] * 24, clusters=[np.arange(24) % 6])
    assert clustered.low < none.low  # six clusters, not 24 pairs


def test_bootstrap_refuses_what_does_not_fit():
    with pytest.raises(MismatchError, match="one length"):
        bootstrap_interval([1, 2, 3], clusters=[["a", "b"]])
    with pytest.raises(MismatchError, match="minus"):
        bootstrap_interval([1, 2, 3], minus=[1, 2])
    with pytest.raises(ConeslabError, match="finite"):
        bootstrap_interval([1, float("nan")])
    with pytest.raises(ConeslabError, match="at least one"):
        bootstrap_interval([])
    with pytest.raises(ConeslabError, match="level=95"):
        bootstrap_interval([1, 2], level=95)
    with pytest.raises(ConeslabError, match="from 0 to 1"):
        share_interval([0.5, 1.5])
