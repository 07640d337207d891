"""Disentanglement of constructed codes, whose MIG and DCI are known."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import mutual_info_score

import pyro_vae as pv

GENERATOR = torch.Generator().manual_seed(0)
FACTORS = {name: torch.randint(k, (3000,), generator=GENERATOR) for name, k in {"x": 6, "y": 6, "shape": 3}.items()}
TRUE = torch.stack(list(FACTORS.values()), 1).double()
NOISE = torch.randn(3000, 2, generator=GENERATOR, dtype=torch.float64)


def rotated(x, angle):
    """Turn the first two of three columns, after standardizing."""
    x = (x - x.mean(0)) / x.std(0)
    cos, sin = math.cos(angle), math.sin(angle)
    return x @ torch.tensor([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]], dtype=torch.float64)


def test_permuted_and_stretched_factors_are_perfect_and_other_codes_do_not_matter(random_states):
    before = random_states()
    codes = torch.cat([NOISE[:, :1], -TRUE[:, 2:], TRUE[:, :1].exp(), NOISE[:, 1:], 3 * TRUE[:, 1:2] ** 3], 1)
    found = pv.disentanglement(codes, FACTORS)
    assert random_states() == before
    bias = 19 * 5 / (2 * 3000 * math.log(6))  # of the information of a noise of 20 bins, relative to the entropy
    assert 1 - 2 * bias < found.mig <= 1
    assert found.disentanglement == pytest.approx(1, abs=1e-6)
    assert found.completeness == pytest.approx(1, abs=1e-6)
    assert found.informativeness == 1
    assert found.information.argmax(0).tolist() == [2, 4, 1]
    torch.testing.assert_close(found.importance.sum(0), torch.ones(3, dtype=torch.float64))


def test_rotated_codes_keep_the_information_and_are_entangled():
    straight, turned = (pv.disentanglement(rotated(TRUE, angle), FACTORS) for angle in (0.0, math.pi / 4))
    assert straight.mig > 0.99
    assert (turned.gaps[:2] < 0.05).all()  # both codes know as much about x, and about y
    assert turned.gaps[2] == pytest.approx(1, abs=0.01)
    assert turned.informativeness > 0.95
    assert turned.completeness < 0.6
    assert turned.disentanglement < 0.6


def test_noise_is_about_nothing():
    noise = torch.randn(3000, 3, generator=torch.Generator().manual_seed(1))
    found = pv.disentanglement(noise, FACTORS)
    assert found.information.max() < 0.05
    assert abs(found.mig) < 0.02
    assert found.disentanglement < 0.02
    assert found.completeness < 0.02
    errors = (found.chance * (1 - found.chance) / 750).sqrt()
    assert ((found.accuracy - found.chance) < 5 * errors).all()


def test_two_codes_of_one_factor_are_disentangled_and_not_complete():
    factors = {name: FACTORS[name] for name in ("x", "y")}
    high, low = TRUE[:, 0] // 2, TRUE[:, 0] % 2  # both are needed for x
    found = pv.disentanglement(torch.stack([high, low, TRUE[:, 1]], 1), factors)
    assert found.disentanglement == pytest.approx(1, abs=0.01)
    assert found.completeness < 0.8
    entropies = [mutual_info_score(each, each) for each in (high, low, TRUE[:, 0])]
    assert found.gaps[0].item() == pytest.approx((entropies[0] - entropies[1]) / entropies[2], abs=0.01)


def test_information_and_entropy_are_those_of_scikit_learn_and_do_not_depend_on_the_scale():
    generator = torch.Generator().manual_seed(2)
    codes = TRUE[:, :2] + torch.randn(3000, 2, generator=generator, dtype=torch.float64)
    found = pv.disentanglement(codes, FACTORS)
    for row, code in enumerate(codes.T.numpy()):
        states = np.searchsorted(np.quantile(code, np.arange(1, 20) / 20), code, side="right")
        for column, factor in enumerate(FACTORS.values()):
            assert found.information[row, column].item() == pytest.approx(mutual_info_score(states, factor), abs=1e-6)
    for column, factor in enumerate(FACTORS.values()):
        shares = factor.bincount() / 3000
        assert found.entropy[column].item() == pytest.approx(-(shares * shares.log()).sum().item(), abs=1e-5)
    stretched = pv.disentanglement(codes.mul(0.5).sinh(), FACTORS)
    torch.testing.assert_close(stretched.information, found.information)


def test_the_draws_of_a_collapsed_latent_know_nothing_though_its_mean_moves():
    means = torch.stack([1e-3 * TRUE[:, 0], TRUE[:, 1]], 1)
    assert pv.disentanglement(means, FACTORS).information[0, 0] > 1.7  # log 6
    draws = means + torch.stack([NOISE[:, 0], 0.05 * NOISE[:, 1]], 1)
    assert pv.disentanglement(draws, FACTORS).information[0].max() < 0.05


def test_numbers_of_many_values_are_factors_in_bins():
    generator = torch.Generator().manual_seed(3)
    x, y = torch.rand(2, 4000, generator=generator)
    found = pv.disentanglement(torch.stack([y, x], 1), {"x": x, "y": y}, bins=10)
    torch.testing.assert_close(found.entropy, torch.full((2,), math.log(10)), atol=1e-3, rtol=0)
    assert found.mig > 0.95
    assert found.informativeness > 0.95


def test_the_result_shows_its_numbers():
    found = pv.disentanglement(TRUE, FACTORS)
    assert repr(found).startswith("Disentanglement(MIG 0.99") or repr(found).startswith("Disentanglement(MIG 1.00")
    assert "<td" in found._repr_html_()
    assert all(name in found._repr_html_() for name in FACTORS)


@pytest.mark.parametrize(
    ("codes", "factors", "message"),
    [
        (TRUE[:, 0], FACTORS, r"`codes` must be codes \(N, D\) with D >= 2.*got shape \(3000,\)"),
        (TRUE[:, :1], FACTORS, r"`codes` must be codes \(N, D\) with D >= 2.*got shape \(3000, 1\)"),
        (TRUE[:5], FACTORS, "`codes` must have 20 or more rows, got 5"),
        (TRUE.log(), FACTORS, r"`codes` must hold finite numbers, got -inf at"),
        (TRUE, {"x": FACTORS["x"]}, "`factors` must be two or more, got 1"),
        (TRUE, [FACTORS["x"]] * 2, "`factors` must be"),
        (TRUE, {"x": FACTORS["x"], "y": FACTORS["y"][1:]}, r"`factors` must be numbers \(3000,\).*for 'y'"),
        (TRUE, {"x": TRUE[:, 0], "one": torch.ones(3000)}, "`factors` must have two values or more, got one for 'one'"),
    ],
)
def test_what_cannot_be_measured_is_refused(codes, factors, message):
    with pytest.raises((TypeError, ValueError), match=message):
        pv.disentanglement(codes, factors)


def test_a_single_bin_is_refused():
    with pytest.raises(ValueError, match="`bins` must be 2 or more, got 1"):
        pv.disentanglement(TRUE, FACTORS, bins=1)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_value_that_most_rows_have_is_a_bin_of_its_own(sign):
    some = torch.arange(3000) % 50 == 0  # 2 % of the rows, fewer than those of a bin
    code = torch.where(some, sign * (1 + torch.arange(3000) / 3000), 0.0)
    other = (torch.arange(3000) // 50 % 3).double()
    found = pv.disentanglement(torch.stack([code.double(), other], 1), {"rare": code, "other": other})
    assert found.information[0, 0].item() == pytest.approx(-0.02 * math.log(0.02) - 0.98 * math.log(0.98), rel=1e-6)
    assert found.gaps[0] > 0.98
