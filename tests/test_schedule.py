import math

import numpy as np
import pytest
import torch

from turbo_core.errors import TurboError
from turbo_core.schedule import default_sigma_max, rcm_sigmas, untrained

FIRST = {80.0: 0.987654, 200.0: 0.995025, 1600.0: 0.999375}
MIDDLE = (0.933781, 0.852895, 0.608979)  # TrigFlow 1.5, 1.4, 1.0


@pytest.mark.parametrize("sigma_max", FIRST)
@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_published_sigmas(steps, sigma_max):
    sigmas = rcm_sigmas(steps, sigma_max)
    assert sigmas.dtype == torch.float64 and sigmas.shape == (steps + 1,)
    published = [FIRST[sigma_max], *MIDDLE[: steps - 1], 0.0]
    assert sigmas.tolist() == pytest.approx(published, rel=0, abs=5e-7)
    assert sigmas[-1] == 0 and (sigmas.diff() < 0).all()


@pytest.mark.parametrize("sigma_max", FIRST)
def test_sigmas_to_the_last_bit_of_float64(sigma_max):
    # sin / (cos + sin) is tan / (1 + tan), and tan(atan(sigma_max)) is sigma_max itself
    tangents = [sigma_max, math.tan(1.5), math.tan(1.4), math.tan(1.0)]
    exact = [t / (1 + t) for t in tangents]
    assert rcm_sigmas(4, sigma_max)[:-1].tolist() == pytest.approx(exact, rel=1e-15, abs=0)


@pytest.mark.parametrize("sigma_max, first", [(80, 988), (200, 996)])
def test_the_network_sees_the_published_timesteps(sigma_max, first):
    timesteps = (1000 * rcm_sigmas(4, sigma_max)[:-1]).to(torch.bfloat16)
    assert timesteps.tolist() == [first, 932, 852, 608]


def test_default_sigma_max_is_80_for_t2v_and_200_for_i2v():
    assert default_sigma_max(16) == 80 and default_sigma_max(36) == 200
    assert rcm_sigmas(2)[0] == rcm_sigmas(2, 80)[0]


@pytest.mark.parametrize("steps", [0, 101, -1, 2.5, True, False, math.nan, math.inf, None, "4", "four", [4]])
def test_bad_steps_are_refused_and_named(steps):
    with pytest.raises(TurboError) as error:
        rcm_sigmas(steps, 80)
    assert "1 to 4" in str(error.value) and str(steps) in str(error.value)


@pytest.mark.parametrize("steps", [5, 8, 12, 100])
def test_more_steps_lie_between_the_four(steps):
    sigmas, four = rcm_sigmas(steps, 80), rcm_sigmas(4, 80)
    assert sigmas.shape == (steps + 1,) and (sigmas.diff() < 0).all() and sigmas[-1] == 0
    assert sigmas[0] == four[0] and "4 are enough" in untrained(steps) and untrained(4) is None
    if steps % 4 == 0:
        assert torch.allclose(sigmas[:: steps // 4], four, rtol=1e-15, atol=0)
    angles = torch.atan2(sigmas, 1 - sigmas)  # sin and cos of an angle are as sigma to 1 - sigma
    knots = np.interp(np.linspace(0, 4, steps + 1), range(5), [math.atan(80), 1.5, 1.4, 1.0, 0.0])
    assert angles.tolist() == pytest.approx(knots.tolist(), abs=1e-12)


@pytest.mark.parametrize("steps", [3.0, np.int64(3), np.float32(3)])
def test_whole_numbers_of_any_type_are_steps(steps):
    assert torch.equal(rcm_sigmas(steps, 80), rcm_sigmas(3, 80))


@pytest.mark.parametrize("sigma_max", [0, -80, 14.1, math.nan, math.inf, -math.inf, None, "80", True])
def test_bad_sigma_max_is_refused_and_named(sigma_max):
    with pytest.raises(TurboError) as error:
        rcm_sigmas(4, sigma_max)
    assert "sigma_max" in str(error.value) and str(sigma_max) in str(error.value)


@pytest.mark.parametrize("sigma_max", [14.2, 80, np.float32(200), 1600.0])
def test_any_number_above_the_second_angle_is_a_sigma_max(sigma_max):
    assert rcm_sigmas(4, sigma_max)[0].item() == pytest.approx(float(sigma_max) / (1 + float(sigma_max)), rel=1e-7)
