"""Rewards (response, answer -> score), the library's verifiers and one's own functions,
and shaping (token lengths -> penalty)."""

from tsopsd_jax.rewards.contract import check_reward, check_rewards, make_checked_rewards
from tsopsd_jax.rewards.countdown import verify_countdown
from tsopsd_jax.rewards.math import answers_cut_off, verify_math
from tsopsd_jax.rewards.named import (
    VERIFIERS,
    Rewards,
    Verdict,
    check_setting,
    failed_fraction,
    failure_words,
    make_rewards,
)
from tsopsd_jax.rewards.number import verify_last_number
from tsopsd_jax.rewards.own import OwnReward
from tsopsd_jax.rewards.own_worker import RewardError
from tsopsd_jax.rewards.shaping import overlong_penalty

__all__ = [
    "VERIFIERS",
    "OwnReward",
    "RewardError",
    "Rewards",
    "Verdict",
    "answers_cut_off",
    "check_reward",
    "check_rewards",
    "check_setting",
    "failed_fraction",
    "failure_words",
    "make_checked_rewards",
    "make_rewards",
    "overlong_penalty",
    "verify_countdown",
    "verify_last_number",
    "verify_math",
]
