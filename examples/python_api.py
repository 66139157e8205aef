# %% [markdown]
# A policy in the hand: sample, measure, reheat, from Python. Run it as a script,
# or cell by cell in an editor that knows `# %%`.
#
#     python examples/python_api.py

# %% Load a policy: a Hugging Face directory, or the packaged model by its name
import numpy as np

from tsopsd_jax.objectives import ts_opsd
from tsopsd_jax.policy import Policy, Sample

policy = Policy.load("countdown-tiny")
prompts = ["3 5 2 1 -> 24 :", "7 11 2 4 -> 30 :", "12 3 9 6 -> 18 :", "8 8 2 5 -> 50 :"]

# %% Sample: four numbers and a target; a response is three steps that end at the target
samples = [s for group in policy.sample(prompts, samples=16, max_tokens=19) for s in group]
for sample in samples[::16]:
    print(f"{policy.tokenizer.decode(sample.prompt_tokens)} {sample.text}   ({sample.entropy_nats:.2f} nats a token)")


# %% Entropy of every token, and its divergence from the self-teacher softmax(z / 1.2), all in nats
def mean_entropy(policy: Policy, samples: list[Sample]) -> float:
    """Mean over the tokens of these samples."""
    return float(np.mean(np.concatenate([stats.entropy for stats in policy.stats(samples)])))


stats = policy.stats(samples, teacher_temperature=1.2)
print(f"entropy {mean_entropy(policy, samples):.3f} nats")
print(f"KL(teacher, policy) {np.mean(np.concatenate([s.forward_kl for s in stats])):.4f} nats")

# %% Reheat: a few steps of TS-OPSD, each on samples of the policy as it stands
hotter, reheater = policy, ts_opsd(teacher_temperature=1.2)
for step in range(3):
    own = [s for group in hotter.sample(prompts, samples=16, max_tokens=19, seed=step) for s in group]
    hotter, metrics = hotter.update(own, reheater, learning_rate=1e-4)
    print(f"step {step}: entropy {metrics['policy/entropy_nats']:.3f} nats")

# %% How far it went, and what it does to the same samples
print(f"entropy {mean_entropy(policy, samples):.3f} -> {mean_entropy(hotter, samples):.3f} nats")
print(f"KL(reheated, before) {np.mean(np.concatenate(hotter.kl_to(policy, samples))):.4f} nats")
