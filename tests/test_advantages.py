"""Group-relative advantages against hand-computed values."""

import inspect

import jax.numpy as jnp
import numpy as np
import pytest

from tsopsd_jax.advantages import group_relative


def test_group_relative_by_hand():
    # [1,0,0,1]: mean 1/2, squares 4 * 1/4 = 1, std = sqrt(1 / 3) = 0.5773503, 0.5 / 0.5773513 = 0.8660239
    # [3,1,1,1]: mean 3/2, squares 9/4 + 3/4 = 3, std = sqrt(3 / 3) = 1; 1.5 / 1.000001, -0.5 / 1.000001
    got = group_relative(jnp.array([[1.0, 0.0, 0.0, 1.0], [3.0, 1.0, 1.0, 1.0]]))
    a = 0.5 / (1 / np.sqrt(3) + 1e-6)
    want = [[a, -a, -a, a], [1.5 / 1.000001, *[-0.5 / 1.000001] * 3]]
    np.testing.assert_allclose(got, want, rtol=2e-7)


def test_std_epsilon_is_one_millionth():
    # std of [0, 2e-6] with ddof 1 is 2e-6 / sqrt(2) = 1.41421e-6; 1e-6 / (1.41421e-6 + 1e-6) = 0.414214
    got = group_relative(jnp.array([[0.0, 2e-6]]))
    np.testing.assert_allclose(got, [[-0.41421356, 0.41421356]], rtol=1e-5)


def test_without_std_only_the_mean_goes():
    got = group_relative(jnp.array([[1.0, 0.0, 0.0, 1.0], [3.0, 1.0, 1.0, 1.0]]), normalize_std=False)
    np.testing.assert_array_equal(got, [[0.5, -0.5, -0.5, 0.5], [1.5, -0.5, -0.5, -0.5]])


@pytest.mark.parametrize("normalize_std", [True, False])
def test_a_group_of_one_keeps_its_reward(normalize_std):
    got = group_relative(jnp.array([[0.25], [1.0]]), normalize_std=normalize_std)
    np.testing.assert_array_equal(got, [[0.25], [1.0]])


@pytest.mark.parametrize("normalize_std", [True, False])
@pytest.mark.parametrize(("reward", "group"), [(0.5, 4), (-0.7, 8), (-0.7, 7), (0.1, 3), (1e-8, 5)])
def test_equal_rewards_have_no_advantage(reward, group, normalize_std):
    # The float32 mean of some of these is not the number itself.
    got = group_relative(jnp.full((2, group), reward), normalize_std=normalize_std)
    np.testing.assert_array_equal(got, np.zeros((2, group)))


def test_one_groups_equal_rewards_leave_the_others_alone():
    got = group_relative(jnp.array([[-0.7] * 8, [1.0] * 4 + [0.0] * 4]), normalize_std=False)
    np.testing.assert_array_equal(got, [[0.0] * 8, [0.5] * 4 + [-0.5] * 4])


@pytest.mark.parametrize("shape", [(4,), (2, 2, 2)])
def test_wrong_rank_is_refused(shape):
    # Users run without the checks of the import hook; with them the annotation would speak first.
    group = inspect.unwrap(group_relative)
    with pytest.raises(ValueError, match=r"shape \[P, G\]"):
        group(jnp.zeros(shape))
