"""One-line bugs that the suite must notice: `python tests/mutants.py [--jobs N] [--only WORD ...] [--recent] [--minutes M]`.

Each mutant is applied in a temporary copy of the tree and the tests named with it must fail there. Exit code 1 if one
survives, or if its text no longer occurs exactly once (then update the list below).
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("tsopsd_jax", "tests", "tpu", "pyproject.toml")


class Mutant(NamedTuple):
    """A bug: in `file` (under tsopsd_jax) `old`, which occurs once, becomes `new`; `tests` are expected to fail."""

    name: str
    file: str
    old: str
    new: str
    tests: str


MUTANTS = [
    Mutant(
        "a frozen teacher looks at the policy's own logits",
        "objectives/reference.py",
        "teacher = jax.lax.stop_gradient(reference_logits) / t",
        "teacher = jax.lax.stop_gradient(logits) / t",
        "test_reference.py -k frozen_teacher_by_hand",
    ),
    Mutant(
        "a frozen teacher's temperature is inverted",
        "objectives/reference.py",
        "jax.lax.stop_gradient(reference_logits) / t",
        "jax.lax.stop_gradient(reference_logits) * t",
        "test_reference.py -k frozen_teacher_by_hand",
    ),
    Mutant(
        "a frozen teacher's KLs change places",
        "objectives/reference.py",
        '{"forward_kl": losses.forward_kl, "reverse_kl": losses.reverse_kl}',
        '{"forward_kl": losses.reverse_kl, "reverse_kl": losses.forward_kl}',
        "test_reference.py -k frozen_teacher_by_hand",
    ),
    Mutant(
        "agreement of the smallest entries",
        "objectives/reference.py",
        "jnp.any(tops[0] & tops[1], axis=-1)",
        "jnp.all(tops[0] == tops[1], axis=-1)",
        "test_reference.py -k agreement",
    ),
    Mutant(
        "the KL to the start is learned from",
        "objectives/reference.py",
        "return LossOutput(out.loss, out.metrics |",
        'return LossOutput(out.loss + Mean.of(stats["start_kl"], batch.mask), out.metrics |',
        "test_reference.py -k teaches_nothing",
    ),
    Mutant(
        "the KL to the start in the other direction",
        "objectives/reference.py",
        "losses.reverse_kl(reference_logits, jax.lax.stop_gradient(logits))",
        "losses.forward_kl(reference_logits, jax.lax.stop_gradient(logits))",
        "test_reference.py -k teaches_nothing",
    ),
    Mutant(
        "eopd adds the forward KL where the teacher is decided",
        "objectives/opd.py",
        'stats["teacher_entropy"] > threshold_nats',
        'stats["teacher_entropy"] < threshold_nats',
        "test_reference.py -k eopd_by_hand",
    ),
    Mutant(
        "k3 of the ratio upside down",
        "losses.py",
        "d = -log_ratio(logp, reference_logp)",
        "d = log_ratio(logp, reference_logp)",
        "test_reference.py -k kl_to_the_reference",
    ),
    Mutant(
        "dapo rewards distance from its reference",
        "objectives/dapo.py",
        'per_token + kl_coefficient * stats["reference_kl"]',
        'per_token - kl_coefficient * stats["reference_kl"]',
        "test_reference.py -k kl_to_the_reference",
    ),
    Mutant(
        "the reference's KL forgets the policy temperature",
        "objectives/dapo.py",
        "jax.lax.stop_gradient(reference_logits) / policy_temperature",
        "jax.lax.stop_gradient(reference_logits)",
        "test_reference.py -k kl_to_the_reference",
    ),
    Mutant(
        "the reference's states are not shifted with the policy's",
        "head.py",
        "reference and Reference(states(reference.hidden), reference.unembed)",
        "reference and Reference(reference.hidden[:, 1:].reshape(-1, reference.hidden.shape[-1]), reference.unembed)",
        "test_reference.py -k in_tiles",
    ),
    Mutant(
        "a renewed reference is never renewed",
        "train/phase.py",
        "phase_step % every == 0",
        "False",
        "test_trainer.py -k renewed",
    ),
    Mutant(
        "another model is loaded at every step",
        "train/phase_step.py",
        "        if self._loaded is None:\n",
        "        if True:\n",
        "test_trainer.py -k loaded_once",
    ),
    Mutant(
        "a model of other tokens is taken for a reference",
        "config/references.py",
        "theirs.backend.get_vocab(with_added_tokens=True) !=",
        "tokenizer.backend.get_vocab(with_added_tokens=True) !=",
        "test_configs.py -k has_the_policys_vocabulary",
    ),
    Mutant(
        "a reference that nothing uses is kept",
        "config/build.py",
        'if phase.reference != "none" and not (objective.reference or phase.measure_start_kl):',
        "if False:",
        "test_configs.py -k that_nothing_uses",
    ),
    Mutant(
        "a plan forgets the reference's bytes",
        "plan/case.py",
        'found["reference"] = tree_bytes(',
        'found["reference"] = 0 * tree_bytes(',
        "test_plan.py -k held_and_computed",
    ),
    Mutant(
        "entropy_advantage: the bonus knows no limit",
        "objectives/entropy_advantage.py",
        "jnp.minimum(alpha * entropy, jnp.abs(batch.advantage) / kappa)",
        "alpha * entropy",
        "test_methods.py -k entropy_advantage_by_hand",
    ),
    Mutant(
        "repo_r: rare wrong tokens lose more",
        "objectives/repo_r.py",
        "1.0 - jnp.sign(advantage) * zeta * logp",
        "1.0 - zeta * logp",
        "test_methods.py -k repo_r_by_hand",
    ),
    Mutant(
        "repo_r: an advantage changes its sign",
        "objectives/repo_r.py",
        "advantage * jnp.maximum(1.0 - jnp.sign(advantage) * zeta * logp, 0.0)",
        "advantage * (1.0 - jnp.sign(advantage) * zeta * logp)",
        "test_methods.py -k repo_r_by_hand",
    ),
    Mutant(
        "repo_r: zeta never lowers the entropy",
        "objectives/repo_r.py",
        "if abs(zeta) / 2 >= least else towards * least",
        "if abs(zeta) / 2 >= least else -towards * least",
        "test_methods.py -k changes_its_sign",
    ),
    Mutant(
        "an anchored knob forgets the entropy of the first update",
        "objectives/anchor.py",
        "entropy < target), TARGET: target}",
        "entropy < target), TARGET: entropy}",
        "test_methods.py -k anchored_knob",
    ),
    Mutant(
        "an anchored knob turns away from the target",
        "objectives/anchor.py",
        "turn(knobs[knob], entropy < target)",
        "turn(knobs[knob], entropy > target)",
        "test_methods.py -k anchored_knob",
    ),
    Mutant(
        "adapo: the knob does not reach the clip",
        "objectives/adapo.py",
        'clip = widest._replace(high=batch.knobs["clip_high"])',
        "clip = widest",
        "test_methods.py -k adapo_by_hand",
    ),
    Mutant(
        "bapo: a clipped negative token weighs what its ratio says",
        "objectives/bapo.py",
        "jnp.maximum(-batch.advantage, 0.0) * jnp.maximum(ratio, lo)",
        "jnp.maximum(-batch.advantage, 0.0) * ratio",
        "test_methods.py -k 'bapo_by_hand or bapos_bounds'",
    ),
    Mutant(
        "bapo: the upper bound rises first",
        "objectives/bapo.py",
        "[lows[0]] + [lows[1]] * len(highs)",
        "[lows[0]] * len(highs) + [lows[1]]",
        "test_methods.py -k 'bapo_by_hand or bapos_bounds'",
    ),
    Mutant(
        "aent: the likeliest entries are left out",
        "objectives/aent.py",
        "logits >= edge[..., None]",
        "logits <= edge[..., None]",
        "test_methods.py -k clamped_entropy_by_hand",
    ),
    Mutant(
        "aent: negative logits order backwards",
        "objectives/aent.py",
        "key = jnp.where(bits >= sign, ~bits, bits | sign)",
        "key = jnp.where(bits >= sign, bits, bits | sign)",
        "test_methods.py -k order_statistic",
    ),
    Mutant(
        "aent: the coefficient follows the whole entropy",
        "objectives/aent.py",
        "metrics.get(CLAMPED_ENTROPY, metrics[ENTROPY])",
        "metrics[ENTROPY]",
        "test_methods.py -k aents_coefficient",
    ),
    Mutant(
        "aer: the target is the initial entropy itself",
        "objectives/aer.py",
        "turn, fraction=target_fraction)",
        "turn)",
        "test_methods.py -k aers_target",
    ),
    Mutant(
        "head tile: the gradient's traffic counted once",
        "hardware/tiles.py",
        "while 4 / 3 * chip.flops",
        "while 2 / 3 * chip.flops",
        "test_hardware.py",
    ),
    Mutant(
        "mfu: a repeated forward pass counted as useful",
        "hardware/speed.py",
        "return float(3 * (layers",
        "return float(4 * (layers",
        "test_hardware.py",
    ),
    Mutant(
        "decode floor: the cache read at its final length",
        "hardware/speed.py",
        "response * (prompt + response / 2)",
        "response * (prompt + response)",
        "test_hardware.py",
    ),
    Mutant(
        "segments for cudnn: starts count from the end of the first",
        "model/attention.py",
        "jnp.cumsum(length_BM, axis=1, dtype=jnp.int32) - length_BM",
        "jnp.cumsum(length_BM, axis=1, dtype=jnp.int32)",
        "test_attention.py -k cudnn_reads",
    ),
    Mutant(
        "packed rows: what cuDNN leaves at padding reaches the gradient",
        "model/attention.py",
        "q, k, v = (jnp.where(held, x, jnp.zeros((), x.dtype)) for x in (q_BTNH, k_BTKH, v_BTKH))",
        "q, k, v = q_BTNH, k_BTKH, v_BTKH",
        "test_attention.py -k no_sequence",
    ),
    Mutant(
        "packing: a row of more sequences than attention counts",
        "learn/packing.py",
        " & (held < MOST_SEGMENTS)",
        "",
        "test_packing.py -k so_many",
    ),
    Mutant(
        "ratios outside 0.9 to 1.1 counted inside",
        "head.py",
        "- batch.old_logp)) > RATIO_MARGIN",
        "- batch.old_logp)) < RATIO_MARGIN",
        "test_update.py -k logp_gap",
    ),
    Mutant(
        "plan: an estimate below the bound",
        "plan/roofline.py",
        "time / share for time",
        "time * share for time",
        "test_plan.py -k shares_of_the_peaks",
    ),
    Mutant(
        "plan: cores of a v5p slice taken for chips",
        "plan/topologies.py",
        "chips = counted / _CORES[kind]",
        "chips = counted",
        "test_topologies.py -k slices",
    ),
    Mutant(
        "rewards are added without their weights",
        "rewards/named.py",
        "sum(self._weight(part, name) * x",
        "sum(x",
        "test_own_rewards.py -k weighted_sum",
    ),
    Mutant(
        "where the first reward failed, the second is the accuracy",
        "rewards/named.py",
        "accuracy = next(iter(first.values()), 0.0)",
        "accuracy = next(iter(parts.values()), 0.0)",
        "test_own_rewards.py -k failed_reward",
    ),
    Mutant(
        "a reward may be NaN",
        "rewards/own_worker.py",
        "isinstance(value, numbers.Real) and math.isfinite(value)",
        "isinstance(value, numbers.Real)",
        "test_own_rewards.py -k does_wrong",
    ),
    Mutant(
        "what a reward function prints is taken for its reply",
        "rewards/own_worker.py",
        "os.dup2(2, 1)",
        "pass",
        "test_own_rewards.py -k prints",
    ),
    Mutant(
        "a reward function is exchanged while it is used",
        "rewards/own_worker.py",
        ".hexdigest() != sha256:",
        '.hexdigest() == "":',
        "test_own_rewards.py -k exchanged",
    ),
    Mutant(
        "half of the rewards failing stops the run",
        "train/phase.py",
        "failed_fraction(verdicts) > self.max_reward_failed_fraction",
        "failed_fraction(verdicts) >= self.max_reward_failed_fraction",
        "test_own_rewards.py -k guard_stops",
    ),
    Mutant(
        "failed rewards are learnt from",
        "train/phase_step.py",
        "            phase.guard.check_rewards(phase.name, batch.verdicts)  # before anything is learnt from them\n",
        "",
        "test_trainer.py -k fail_stop",
    ),
    Mutant(
        "a reward function is tried once on each toy response",
        "rewards/contract.py",
        "for _ in range(2):",
        "for _ in range(1):\n            values.append(function(response, answer, row))\n        for _ in range(0):",
        "test_own_rewards.py -k break_the_contract",
    ),
    Mutant(
        "the run learns from the accuracy alone",
        "judge/groups.py",
        "(accuracy if reward is None else reward)",
        "accuracy",
        "test_judge.py -k adds_the_penalty",
    ),
    Mutant(
        "samples of steps that are taken again stay",
        "rundir/log.py",
        "for name in (METRICS_FILE, EVALUATIONS_FILE, SAMPLES_FILE):",
        "for name in (METRICS_FILE, EVALUATIONS_FILE):",
        "test_log.py -k samples_are_kept",
    ),
    Mutant(
        "samples: the best response is the worst",
        "train/samples.py",
        "reward[rows].argmax()",
        "reward[rows].argmin()",
        "test_trainer.py -k killed_run",
    ),
    Mutant(
        "a kept response is HTML on the page",
        "display/responses.py",
        "{escape(words)} &middot; ",
        "{words} &middot; ",
        "test_page.py -k hostile",
    ),
    Mutant(
        "a model card names the hub's commit as the model",
        "commands/model_card.py",
        'if snapshots == "snapshots" and repository.startswith("models--"):',
        "if False:",
        "test_model_card.py -k hubs_cache",
    ),
    Mutant(
        "a bar in a phase's name begins a cell of the card",
        "commands/model_card.py",
        "cell.replace('|', BAR)",
        "cell",
        "test_model_card.py -k bar_in_a_name",
    ),
    Mutant(
        "a store's client may raise what it likes",
        "rundir/object_store.py",
        "    except Exception as error:  # each",
        "    except (ImportError, KeyError) as error:  # each",
        "test_object_store.py -k without_network",
    ),
    Mutant(
        "the place of a problem in a template is replaced in the problem, too",
        "data/prompts.py",
        "lambda problem, _row: before + problem + after",
        "lambda problem, _row: (before + problem + after).replace(PLACE, problem)",
        "test_prompts.py -k with_a_place",
    ),
    Mutant(
        "special tokens of a later message are read as such",
        "data/tokenizer.py",
        "backend.encode_special_tokens = outside",
        "backend.encode_special_tokens = False",
        "test_prompts.py -k no_message_can_write",
    ),
    Mutant(
        "messages of a conversation are shown without those before",
        "data/encode.py",
        "tokenizer.encode(problems[i].prompt, problems[i].before)",
        "tokenizer.encode(problems[i].prompt)",
        "test_prompts.py -k encoded_with",
    ),
    Mutant(
        "reversal: the projection on the cooling",
        "analysis/reversal.py",
        "reverse_projection=-product / heated2,",
        "reverse_projection=-product / cooled2,",
        "test_analysis.py -k reversal_by_hand",
    ),
    Mutant(
        "reversal: what is left is the cooling",
        "analysis/reversal.py",
        "x[start : start + PIECE].astype(np.float64) for x in flat)\n        heated, cooled, left = b - a, c - b, c - a",
        "x[start : start + PIECE].astype(np.float64) for x in flat)\n        heated, cooled, left = b - a, c - b, c - b",
        "test_analysis.py -k reversal_by_hand",
    ),
    Mutant(
        "reversal: differences in 16 bits",
        "analysis/reversal.py",
        "(x[start : start + PIECE].astype(np.float64) for x in flat)",
        "(x[start : start + PIECE] for x in flat)",
        "test_analysis.py -k 16_bits",
    ),
    Mutant(
        "reversal: the last piece is left out",
        "analysis/reversal.py",
        "range(0, before.size, PIECE)",
        "range(0, before.size - PIECE, PIECE)",
        "test_analysis.py -k reversal_by_hand",
    ),
    Mutant(
        "distributions: the KL the other way round",
        "analysis/distributions.py",
        '"forward_kl_nats": jnp.sum(losses.kl_terms(logp, logq), axis=-1),',
        '"forward_kl_nats": jnp.sum(losses.kl_terms(logq, logp), axis=-1),',
        "test_analysis.py -k distributions_by_hand",
    ),
    Mutant(
        "distributions: before is taken for after",
        "analysis/distributions.py",
        "return pair_stats(logits, reference, k=k)",
        "return pair_stats(reference, logits, k=k)",
        "test_analysis.py -k tiles_on_a_mesh",
    ),
    Mutant(
        "distributions: overlap place by place",
        "analysis/distributions.py",
        "in_after, in_before = jnp.any(same, axis=-1), jnp.any(same, axis=-2)",
        "in_after = in_before = jnp.diagonal(same, axis1=-2, axis2=-1)",
        "test_analysis.py -k likeliest",
    ),
    Mutant(
        "distributions: the mass of the other policy's places",
        "analysis/distributions.py",
        "jnp.sum(jnp.where(in_before, jnp.exp(top_q), 0.0), axis=-1)",
        "jnp.sum(jnp.where(in_after, jnp.exp(top_q), 0.0), axis=-1)",
        "test_analysis.py -k likeliest",
    ),
    Mutant(
        "distributions: values beyond the edges are lost",
        "analysis/distributions.py",
        "np.histogram(np.clip(values, edges[0], edges[-1]), edges)",
        "np.histogram(values, edges)",
        "test_analysis.py -k summary",
    ),
    Mutant(
        "CKA without centring",
        "analysis/representations.py",
        "product - np.outer(x[i], y[j]) / self.tokens",
        "product - 0 * np.outer(x[i], y[j]) / self.tokens",
        "test_analysis.py -k rotated",
    ),
    Mutant(
        "CKA of states that are not shifted",
        "analysis/representations.py",
        "found - shift[:, None, None, :]",
        "found - 0 * shift[:, None, None, :]",
        "test_analysis.py -k layers_on_a_mesh",
    ),
    Mutant(
        "CKA of prompts and padding too",
        "analysis/representations.py",
        "return jnp.where(batch.mask[None, :, :, None], found",
        "return jnp.where(batch.mask[None, :, :, None] | True, found",
        "test_analysis.py -k layers_on_a_mesh",
    ),
    Mutant(
        "forks: counted from 1",
        "analysis/forks.py",
        "return int(apart[0]) if",
        "return int(apart[0]) + 1 if",
        "test_analysis.py -k fork_by_hand",
    ),
    Mutant(
        "edit distance of the shorter rollout",
        "analysis/forks.py",
        "float(row[-1]) / max(len(a), len(b))",
        "float(row[-1]) / min(len(a), len(b))",
        "test_analysis.py -k fork_by_hand",
    ),
    Mutant(
        "edit distance without insertions",
        "analysis/forks.py",
        "np.minimum.accumulate(new - at) + at",
        "new",
        "test_analysis.py -k fork_by_hand",
    ),
    Mutant(
        "jump: increments are not compared with their neighbours",
        "analysis/jump.py",
        "gain >= LEAST_GAIN and ratio >= LEAST_RATIO and",
        "gain >= LEAST_GAIN and",
        "test_analysis.py -k smooth_ramp",
    ),
    Mutant(
        "jump: only upwards",
        "analysis/jump.py",
        "abs(height) >= LEAST_RATIO * noise",
        "height >= LEAST_RATIO * noise",
        "test_analysis.py -k planted",
    ),
    Mutant(
        "jump: checkpoints a step late",
        "commands/analyses/reasoning.py",
        'entropy = Curve("", part.step - 1,',
        'entropy = Curve("", part.step,',
        "test_analyse_command.py -k checkpoints_of_reheating",
    ),
    Mutant(
        "bands with n in the denominator",
        "analysis/trajectories.py",
        "np.sqrt(squares / np.maximum(count - 1, 1))",
        "np.sqrt(squares / np.maximum(count, 1))",
        "test_analysis.py -k band",
    ),
    Mutant(
        "cost: the share of the whole",
        "analysis/cost.py",
        "sum(each.total_h for each in phases if not each.reheats)",
        "sum(each.total_h for each in phases)",
        "test_analysis.py -k cost",
    ),
    Mutant(
        "temperatures: a mean of means over batches",
        "analysis/temperatures.py",
        "g.astype(jnp.float32) * out.loss.count",
        "g.astype(jnp.float32)",
        "test_analysis.py -k reverse_teachers",
    ),
    Mutant(
        "responses as text: the stop token is forgotten",
        "commands/responses.py",
        'stop = [] if row.get("stopped") is False else',
        'stop = [] if row.get("stopped") is not True else',
        "test_analyse_command.py -k ids_and_of_text",
    ),
    Mutant(
        "generate: the ids of padded prompts",
        "commands/generate.py",
        "tokens[which[ended.row], : lengths[which[ended.row]]].tolist()",
        "tokens[which[ended.row]].tolist()",
        "test_generate.py -k interrupted",
    ),
    Mutant(
        "eval: a run is known by its name and step alone",
        "commands/policies.py",
        '"model_weights": weights,',
        '"model_weights": "",',
        "test_cli.py -k made_anew",
    ),
    Mutant(
        "clip_cov: what the clip takes is drawn too",
        "objectives/covariance.py",
        " & ~clip.clipped(stats, batch)",
        "",
        "test_objectives.py -k clip_cov_by_hand",
    ),
    Mutant(
        "kl_cov: the lowest covariances are penalised",
        "objectives/covariance.py",
        "jnp.where(batch.mask, -covariance(",
        "jnp.where(batch.mask, covariance(",
        "test_objectives.py -k kl_cov_by_hand",
    ),
    Mutant(
        "kl_cov: a token that has not moved is pulled down",
        "objectives/covariance.py",
        "jax.lax.stop_gradient(jnp.sign(change)) * change",
        "jnp.abs(change)",
        "test_objectives.py -k has_not_moved",
    ),
    Mutant(
        "kl_cov: the coefficient is not annealed",
        "objectives/covariance.py",
        'batch.knobs["coefficient"] if anneal_updates else coefficient',
        "coefficient",
        "test_objectives.py -k annealed",
    ),
    Mutant(
        "top_entropy: the tokens of lowest entropy",
        "objectives/top_entropy.py",
        'jnp.where(batch.mask, -stats["entropy"]',
        'jnp.where(batch.mask, stats["entropy"]',
        "test_objectives.py -k top_entropy_by_hand",
    ),
    Mutant(
        "the adaptive bonus falls below its target",
        "objectives/entropy_bonus.py",
        "metrics[ENTROPY] < target_nats",
        "metrics[ENTROPY] > target_nats",
        "test_objectives.py -k turns_its",
    ),
    Mutant(
        "an entropy bonus that is a penalty",
        "objectives/entropy_bonus.py",
        '- coefficient * stats["entropy"]',
        '+ coefficient * stats["entropy"]',
        "test_objectives.py -k entropy_bonus_by_hand",
    ),
    Mutant(
        "jsd: teacher and student change places",
        "objectives/jsd.py",
        "(teacher, student) if beta == 0 else (student, teacher)",
        "(student, teacher) if beta == 0 else (teacher, student)",
        "test_objectives.py -k jsd_by_hand",
    ),
    Mutant(
        "jsd: the mixture's weights change places",
        "objectives/jsd.py",
        "student + jnp.log1p(-beta), teacher + jnp.log(beta)",
        "student + jnp.log(beta), teacher + jnp.log1p(-beta)",
        "test_objectives.py -k jsd_weights",
    ),
    Mutant(
        "the entropy that rules look at is that of the policy temperature",
        "objectives/dapo.py",
        '"entropy": losses.entropy(logits),',
        '"entropy": losses.entropy(tempered),',
        "test_objectives.py -k at_a_policy_temperature",
    ),
    Mutant(
        "a token's hash does not know its place in a packed row",
        "objectives/base.py",
        "return at - jax.lax.cummax(jnp.where(begins, at, 0), axis=1)",
        "return at + jnp.zeros_like(batch.tokens)",
        "test_objectives.py -k follows_it",
    ),
    Mutant(
        "select sees other micro-batches' statistics",
        "learn/update.py",
        "return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, x.shape[-1]), found)",
        "return jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), found)",
        "test_objectives.py -k 'micro_batches_and_tiles and (clip_cov or top_entropy)'",
    ),
    Mutant(
        "generate: responses of other weights taken for this model's",
        "commands/generate.py",
        "facts |= model_facts(Path(settings.model))",
        "model_facts(Path(settings.model))",
        "test_generate.py -k other_weights",
    ),
    Mutant(
        "fingerprint: blocks hashed in any order",
        "model/fingerprint.py",
        'b"".join(threads.map(block, range(0, size, READ_BYTES)))',
        'b"".join(sorted(threads.map(block, range(0, size, READ_BYTES))))',
        "test_fingerprint.py -k in_order",
    ),
    Mutant(
        "what is restored is not compared with what was written",
        "rundir/checkpoints.py",
        'problem = _difference(digests.of_arrays(_fields(run.state), "state"), facts)',
        "problem = None",
        "test_checkpoints.py -k flipped",
    ),
    Mutant(
        "a start policy is not compared",
        "rundir/checkpoints.py",
        'problem = _difference(digests.of_arrays(run.start, "start"), facts)',
        "problem = None",
        "test_checkpoints.py -k flipped",
    ),
    Mutant(
        "a progress is not compared",
        "rundir/checkpoints.py",
        'if problem := _difference({"progress": digests.of_json(got["progress"])}, got["digests"]):',
        "if problem := None:",
        "test_checkpoints.py -k 'another and progress'",
    ),
    Mutant(
        "a digest does not know positions",
        "rundir/digests.py",
        "jnp.uint32(multiplier)",
        "jnp.uint32(0)",
        "test_checkpoints.py -k digest",
    ),
    Mutant(
        "a digest does not mix",
        "rundir/digests.py",
        "words = (words ^ (words >> jnp.uint32(15))) * jnp.uint32(_MIX)",
        "words = words * jnp.uint32(_MIX)",
        "test_checkpoints.py -k digest",
    ),
    Mutant(
        "a save is not read back",
        "rundir/checkpoints.py",
        "                self._open(self._writing)\n",
        "                pass\n",
        "test_checkpoints.py -k cannot_be_read",
    ),
    Mutant(
        "after a failed save Orbax's list of checkpoints is believed",
        "rundir/checkpoints.py",
        "self._manager.all_steps(read=True)",
        "self._manager.all_steps()",
        "test_checkpoints.py -k save_that_fails",
    ),
    Mutant(
        "a store out of reach is damage",
        "rundir/checkpoints.py",
        "            if _passes(error):\n                raise\n",
        "",
        "test_checkpoints.py -k says_nothing",
    ),
    Mutant(
        "a damaged checkpoint keeps its place",
        "rundir/checkpoints.py",
        "[s for s in self.steps() if s > after] if processes.is_first() else []",
        "[]",
        "test_checkpoints.py -k damaged",
    ),
    Mutant(
        "a failed save is noticed at the next one",
        "train/trainer.py",
        "            self.checkpoints.check()\n            self._renew_reference(phase)",
        "            self._renew_reference(phase)",
        "test_trainer.py -k full_disk",
    ),
    Mutant(
        "a full disk is our own fault",
        "commands/exit_codes.py",
        "isinstance(error, SaveError) or error.errno in _FULL",
        "isinstance(error, SaveError)",
        "test_cli.py -k exit_code_6",
    ),
    Mutant(
        "a rule that holds already takes a step more",
        "train/trainer.py",
        "over = self._over(phase) or self._take_steps(phase)",
        "over = self._take_steps(phase)",
        "test_trainer.py -k rule_was_changed",
    ),
    Mutant(
        "a run without its checkpoints starts over",
        "config/claim.py",
        "    if removed or (",
        "    if (",
        "test_claim.py -k were_removed",
    ),
    Mutant(
        "a failure stays on the machine that failed",
        "train/trainer.py",
        "if state == status.FAILED:  # nobody else will",
        "if False:",
        "test_object_store.py -k failure_reaches",
    ),
    Mutant(
        "a viewer that goes away ends what it watched",
        "display/screen.py",
        "if not (self._keep_going or isinstance(error, BrokenPipeError)):",
        "if not self._keep_going:",
        "test_screen.py -k went_away",
    ),
    Mutant(
        "a full screen ends a run",
        "display/screen.py",
        "if not (self._keep_going or isinstance(error, BrokenPipeError)):",
        "if not isinstance(error, BrokenPipeError):",
        "test_screen.py -k full_disk",
    ),
    Mutant(
        "a closed descriptor is left to the next file",
        "display/screen.py",
        "os.set_inheritable(os.open(os.devnull, flags), True)",
        "pass",
        "test_screen.py -k taken_by_a_log",
    ),
    Mutant(
        "the commands that take long give up with their screen",
        "cli.py",
        "secure(keep_going=next(iter(argv), None) in LONG)",
        "secure(keep_going=False)",
        "test_screen.py -k 'need_its_screen and full'",
    ),
    Mutant(
        "a resumed run's status keeps ends of phases that it takes again",
        "rundir/status.py",
        'if end["step"] <= last_step]',
        "]",
        "test_status.py -k taken_again",
    ),
    Mutant(
        "a phase that a guard refused has its outcome on the page",
        "display/run_status.py",
        "not at its end</div>', False",
        "not at its end</div>', True",
        "test_status.py -k refused_phase",
    ),
    Mutant(
        "a failure reads as a guard",
        "train/trainer.py",
        "status.GUARD if isinstance(error, GuardError) else status.FAILED",
        "status.GUARD",
        "test_status.py -k failure",
    ),
    Mutant(
        "a tracker shows the last step of a killed run twice",
        "rundir/trackers.py",
        "step <= self._sent[file]",
        "step < self._sent[file]",
        "test_log.py -k shows_no_step_twice",
    ),
    Mutant(
        "a tracker forgets what was sent before the last start",
        "rundir/trackers.py",
        'max(step, known["sent"][name])',
        "step",
        "test_log.py -k shows_no_step_twice",
    ),
    Mutant(
        "an interrupted evaluation goes into a row that is closed",
        "rundir/trackers.py",
        "row = max(step, 1 + max(self._sent.values()))",
        "row = step",
        "test_log.py -k interrupted",
    ),
    Mutant(
        "events are pushed before they are written",
        "rundir/log.py",
        "        self.flush()\n        object_store",
        "        object_store",
        "test_object_store.py -k hold_back",
    ),
    Mutant(
        "the rate of the next update is logged",
        "learn/update.py",
        "all_with_path(state.opt_state,",
        "all_with_path(opt_state,",
        "test_update.py -k rate_is_reported",
    ),
    Mutant(
        "a half line is read as a broken one",
        "rundir/files.py",
        "            if broken:",
        "            if broken and False:",
        "test_log.py -k broken_line",
    ),
    Mutant(
        "tokenwise taken at its word",
        "testing.py",
        "    if not objective.tokenwise:\n",
        "    if True:\n",
        "test_testing.py -k tokenwise_must",
    ),
    Mutant(
        "what an objective makes of padding is not looked at",
        "testing.py",
        "    more_padding = padded(toy)\n",
        "    more_padding = toy\n",
        "test_testing.py -k wrong_losses",
    ),
    Mutant(
        "rows always in one order",
        "testing.py",
        "ORDER = np.array([3, 1, 5, 0, 4, 2])",
        "ORDER = np.arange(6)",
        "test_testing.py -k wrong_losses",
    ),
    Mutant(
        "a tile's statistics are zero outside the mask",
        "testing.py",
        "if not tiles:  # the head",
        "if True:  # the head",
        "test_testing.py -k tokenwise_must",
    ),
    Mutant(
        "a loss without a gradient passes",
        "testing.py",
        "if np.abs(found.gradient).max() > LIVE_GRADIENT:",
        "if np.abs(found.gradient).max() >= 0:",
        "test_testing.py -k 'wrong_losses or zero_by_choice'",
    ),
    Mutant(
        "a gradient that is zero by choice is refused",
        "testing.py",
        "    return not isinstance(out, Literal) and out in made",
        "    return False",
        "test_testing.py -k zero_by_choice",
    ),
    Mutant(
        "advantages read in secret",
        "testing.py",
        "advantage=-2 * toy.batch.advantage",
        "advantage=1 * toy.batch.advantage",
        "test_testing.py -k declared_needs",
    ),
    Mutant(
        "a statistic's shape is not looked at",
        "testing.py",
        "if not _is_float(x, (n,)):",
        "if not _is_float(x, x.shape):",
        "test_testing.py -k wrong_statistics",
    ),
    Mutant(
        "a line's mistake is put down to the whole function",
        "testing.py",
        "if f.filename in files]",
        "if f.filename in ()]",
        "test_testing.py -k file_of_ones_own",
    ),
    Mutant(
        "needs of an objective not looked at",
        "config/build.py",
        "    _check_needs(phase, objective)\n",
        "",
        "test_configs.py -k 'uses_advantages or that_sampled'",
    ),
    Mutant(
        "the policy temperature is always 1",
        "config/build.py",
        "phase.sampling != Sampling(sampling_temperature=t)",
        "phase.sampling != Sampling()",
        "test_configs.py -k that_sampled",
    ),
    Mutant(
        "an objective checked in every phase",
        "config/build.py",
        "for earlier in config.phases[:i]]",
        "for earlier in config.phases[:0]]",
        "test_configs.py -k checked_once",
    ),
    Mutant(
        "a run starts with an objective that nobody checked",
        "config/build.py",
        "notes = check_objectives(config, phases)",
        "notes = []",
        "test_cli.py -k broken_objective",
    ),
    Mutant(
        "a penalty's ramp longer than the response",
        "config/build.py",
        "buffer_tokens=phase.reward.overlong_buffer_tokens",
        "buffer_tokens=0 * phase.reward.overlong_buffer_tokens",
        "test_configs.py -k ramp",
    ),
    Mutant(
        "a mean of what numpy stretches",
        "types.py",
        "if jnp.shape(values) != jnp.shape(mask):",
        "if jnp.ndim(values) > jnp.ndim(mask):",
        "test_types.py -k wants_one_shape",
    ),
    Mutant(
        "a hyperparameter's typo names the first",
        "loading.py",
        "get_close_matches(name, known, n=1",
        "get_close_matches(known[0], known, n=1",
        "test_objectives.py -k errors_name",
    ),
    Mutant(
        "a rollout that is left waits for all its verifications",
        "judge/scoring.py",
        "threads.shutdown(cancel_futures=True)",
        "threads.shutdown()",
        "test_judge.py -k is_left",
    ),
    Mutant(
        "an answer without a verdict is not counted",
        "rewards/workers.py",
        "self.cut_off += 1",
        "self.cut_off += 0",
        "test_verifier.py -k over_the_limit",
    ),
    Mutant(
        "a worker that ran over is used again",
        "rewards/workers.py",
        "elif self.most_answers is None or worker.answered < self.most_answers:",
        "if self.most_answers is None or worker.answered < self.most_answers:",
        "test_verifier.py -k over_the_limit",
    ),
    Mutant(
        "workers without a limit of memory",
        "rewards/symbolic_worker.py",
        "resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))",
        "resource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
        "test_verifier.py -k apart_and_limited",
    ),
    Mutant(
        "a worker whose parent is gone computes on",
        "rewards/symbolic_worker.py",
        "signal.setitimer(signal.ITIMER_REAL, wall_s)",
        "signal.setitimer(signal.ITIMER_REAL, 0)",
        "test_verifier.py -k parent_that_is_killed",
    ),
    Mutant(
        "gold and answer of two units agree",
        "rewards/math.py",
        "if one.measures == other.measures:",
        "if one.measures != () != other.measures:",
        "test_verifier.py -k labels",
    ),
    Mutant(
        "two options count as the first",
        "rewards/answers.py",
        "None if _ANOTHER_OPTION.search(text[match.end(which) + 1 :]) else match[which]",
        "match[which]",
        "test_verifier.py -k labels",
    ),
    Mutant(
        "anagrams are the same word",
        "rewards/words.py",
        "> 2:\n        return a == b",
        "> 2:\n        return sorted(a) == sorted(b)",
        "test_verifier.py -k labels",
    ),
    Mutant(
        "small differences are zero",
        "rewards/symbolic_worker.py",
        "-min(given * degree, most)",
        "-50",
        "test_verifier.py -k late_digit",
    ),
    Mutant(
        "formulas are compared at positive points only",
        "rewards/exact.py",
        "-value if (turn >> place % 3) & 1 else value",
        "value",
        "test_verifier.py -k labels",
    ),
    Mutant(
        "an interval's closed end is open",
        "rewards/regions.py",
        '(0, 1) if brackets[0] == "[" else (1,)',
        "(1,)",
        "test_verifier.py -k labels",
    ),
    Mutant(
        "ratios are compared by their first two parts",
        "rewards/compare.py",
        "zip(a[1:], b[1:], strict=True))\n\n    def _same_relation",
        "zip(a[1:2], b[1:2], strict=True))\n\n    def _same_relation",
        "test_verifier.py -k labels",
    ),
    Mutant(
        "a tuple in square brackets is one in round ones",
        "rewards/compare.py",
        'if len({tree[1] if tree[0] == "seq" else "()" for tree in (a, b)}) > 1:',
        'if len({tree[1] if tree[0] == "seq" else "()" for tree in (a, b)}) > 2:',
        "test_verifier.py -k labels",
    ),
    Mutant(
        "an inequality keeps its sense under a negative factor",
        "rewards/compare.py",
        "operator if same_sign else MIRRORED.get(operator)",
        "operator",
        "test_verifier.py -k labels",
    ),
    Mutant(
        "a number after a letter is a factor",
        "rewards/formula.py",
        'if unclear or (self.token or "")[:1].isdigit()',
        "if unclear or False",
        "test_verifier.py -k two_things",
    ),
    Mutant(
        "a box before the answer's line wins",
        "rewards/answers.py",
        "box > start and boxed",
        "box < start and boxed",
        "test_verifier.py -k final_answer",
    ),
    Mutant(
        "a process does the rows of its neighbours' blocks",
        "distributed/processes.py",
        "return row % jax.process_count() == jax.process_index()",
        "return row // jax.process_count() == jax.process_index()",
        "test_distributed.py -k divided",
    ),
    Mutant(
        "a signal stops only the process that got it",
        "train/signals.py",
        "return max(processes.exchange(self.number or 0))",
        "return self.number or 0",
        "test_distributed.py -k everyones",
    ),
    Mutant(
        "a pause of its own is taken for the others' silence",
        "distributed/heartbeat.py",
        "passed, looked = min(now - looked, 2 * pause), now",
        "passed, looked = now - looked, now",
        "test_distributed.py -k pause",
    ),
    Mutant(
        "what was saved when a rollout is left is not the last step",
        "train/trainer.py",
        "if (step := self.run_state.step) == self.saved_step:",
        "if (step := self.run_state.step) >= self.saved_step:",
        "test_trainer.py -k leaves_the_rollout",
    ),
    Mutant(
        "an update compiled ahead is another function than the one that is called",
        "train/phase_update.py",
        "        if micro_batches not in self._jitted:\n            layout",
        "        if True:\n            layout",
        "test_trainer.py -k compiled_while",
    ),
    Mutant(
        "each process chooses micro-batches by its own memory",
        "learn/micro_batches.py",
        "int((1 - RESERVE) * min(limits))",
        "int((1 - RESERVE) * limits[0])",
        "test_distributed.py -k everyones",
    ),
    Mutant(
        "a process that is gone is taken for one that took leave",
        "distributed/heartbeat.py",
        'return message == "bye"',
        'return message in ("bye", "alive")',
        "test_distributed.py -k silent",
    ),
    Mutant(
        "an error is kept to oneself",
        "distributed/heartbeat.py",
        'self._send({"failed": f"{self.names[self.index]} failed: {error}"})',
        'self._send("alive")',
        "test_distributed.py -k error",
    ),
    Mutant(
        "what follows a greeting is lost",
        "distributed/heartbeat.py",
        'peer.makefile("rb", buffering=0)',
        'peer.makefile("rb")',
        "test_distributed.py -k heels",
    ),
    Mutant(
        "a tick does not count",
        "distributed/heartbeat.py",
        "_Main.ticks += 1",
        "_Main.ticks += 0",
        "test_distributed.py -k ticks",
    ),
    Mutant(
        "who hangs leaves without a word",
        "distributed/heartbeat.py",
        "self._end(reason, tell=True)",
        "self._end(reason)",
        "test_distributed.py -k those_that_work",
    ),
    Mutant(
        "a process that hangs says it only to itself",
        "distributed/heartbeat.py",
        'if message["doing"] != _Main.doing:',
        'if message["doing"] == _Main.doing:',
        "test_distributed.py -k which",
    ),
    Mutant(
        "a lone process is not watched",
        "distributed/processes.py",
        "        with contextlib.closing(watch):\n            yield\n        return\n",
        "        watch.close()\n        yield\n        return\n",
        "test_distributed.py -k one_process",
    ),
    Mutant(
        "files of a run that is gone stay",
        "rundir/object_store.py",
        "            file.unlink()",
        "            pass",
        "test_object_store.py -k truth",
    ),
    Mutant(
        "the log in the store is behind the checkpoint",
        "train/trainer.py",
        "            self.log.push()\n        self.checkpoints.save",
        "            pass\n        self.checkpoints.save",
        "test_object_store.py -k pushed_before",
    ),
    Mutant(
        "the mesh may not change",
        "config/claim.py",
        r"|mesh\.(data|fsdp|tensor|cpu_devices)",
        "",
        "test_claim.py -k machines_settings",
    ),
    Mutant(
        "teacher's temperature inverted",
        "logit_stats.py",
        "logq = s - log_z, s / asked.teacher_temperature - log_q",
        "logq = s - log_z, s * asked.teacher_temperature - log_q",
        "test_head.py",
    ),
    Mutant(
        "sampling temperature inverted",
        "rollout/distribution.py",
        "centred / sampling.sampling_temperature",
        "centred * sampling.sampling_temperature",
        "test_rollout.py -k draw_follows",
    ),
    Mutant(
        "KL directions swapped",
        "logit_stats.py",
        'out["forward_kl"] = jnp.sum(kl_terms(logq, logp), axis=-1)',
        'out["forward_kl"] = jnp.sum(kl_terms(logp, logq), axis=-1)',
        "test_head.py",
    ),
    Mutant(
        "forward KL reversed",
        "losses.py",
        "_kl_of(log_softmax(jax.lax.stop_gradient(teacher_logits)), log_softmax(student_logits))",
        "_kl_of(log_softmax(student_logits), log_softmax(jax.lax.stop_gradient(teacher_logits)))",
        "test_losses.py",
    ),
    Mutant(
        "objective ignores its direction",
        "objectives/ts_opsd.py",
        "Mean.of(stats[kl], batch.mask)",
        'Mean.of(stats[kl] if direction == "forward" else stats["entropy"], batch.mask)',
        "test_objectives.py -k ts_opsd_by_hand",
    ),
    Mutant(
        "shift missing",
        "head.py",
        "hidden_BLD[:, :-1].reshape",
        "hidden_BLD[:, 1:].reshape",
        "test_head.py -k refer_to_the_token",
    ),
    Mutant(
        "shift padded on the wrong side",
        "head.py",
        "((0, 0), (1, 0))",
        "((0, 0), (0, 1))",
        "test_head.py -k refer_to_the_token",
    ),
    Mutant(
        "gradient of p - q not formed from what the largest entry leaves",
        "logit_stats.py",
        "jnp.where(is_top, sums.teacher_rest / q_sum - sums.rest / z, p - q)",
        "(p - q)",
        "test_head.py -k keep_their_digits",
    ),
    Mutant(
        "gradient of log p not formed from what the largest entry leaves",
        "logit_stats.py",
        "jnp.where(is_top, sums.rest / z, 1.0 - p)",
        "(1.0 - p)",
        "test_head.py -k keep_their_digits",
    ),
    Mutant(
        "reverse KL's slope without 1 - 1/T",
        "logit_stats.py",
        'slope + (1.0 - 1.0 / t) * g["reverse_kl"]',
        'slope + g["reverse_kl"]',
        "test_head.py -k one_pass_equals_two",
    ),
    Mutant(
        "entropy's gradient with the wrong sign",
        "logit_stats.py",
        'slope = slope - g["entropy"]',
        'slope = slope + g["entropy"]',
        "test_head.py -k full_logits",
    ),
    Mutant(
        "ties of the largest entry counted once",
        "logit_stats.py",
        "dtype=jnp.float32) - 1.0  # ties",
        "dtype=jnp.float32) * 0.0  # ties",
        "test_head.py -k ties",
    ),
    Mutant(
        "tiles of unwanted tokens left out, and one more",
        "head_tiles.py",
        "count = -(-jnp.sum(wanted_N, dtype=jnp.int32) // tile)",
        "count = jnp.sum(wanted_N, dtype=jnp.int32) // tile",
        "test_head.py -k refer_to_the_token",
    ),
    Mutant(
        "every device goes through its own number of tiles",
        "head_tiles.py",
        "jax.lax.pmax(count, tiling.axes) if tiling.axes else count",
        "jax.lax.pmin(count, tiling.axes) if tiling.axes else count",
        "test_head.py -k one_pass_equals_two",
    ),
    Mutant(
        "gap of the last tile only",
        "head.py",
        "jnp.maximum(self.gap, other.gap)",
        "other.gap",
        "test_head.py -k one_pass_equals_two",
    ),
    Mutant(
        "attention across packed sequences",
        "model/attention.py",
        "visible_BTS & (segment_BT[:, start:end, None] == segment_BT[:, None, :end])",
        "visible_BTS",
        "test_objectives.py -k packed_rows",
    ),
    Mutant(
        "the last micro-batch in use left out",
        "learn/update.py",
        "jnp.arange(1, micro_batches + 1, dtype=jnp.int32)",
        "jnp.arange(0, micro_batches, dtype=jnp.int32)",
        "test_objectives.py -k packed_rows",
    ),
    Mutant(
        "packed rows laid out as consecutive micro-batches",
        "learn/packing.py",
        "row = (row % each) * micro_batches + row // each",
        "row = row + 0 * each",
        "test_packing.py -k every_token",
    ),
    Mutant(
        "teacher's gradient not stopped in the loss",
        "losses.py",
        "_kl_of(log_softmax(jax.lax.stop_gradient(teacher_logits)), log_softmax(student_logits))",
        "_kl_of(log_softmax(teacher_logits), log_softmax(student_logits))",
        "test_losses.py",
    ),
    Mutant(
        "reverse KL's teacher not stopped",
        "losses.py",
        "_kl_of(log_softmax(student_logits), log_softmax(jax.lax.stop_gradient(teacher_logits)))",
        "_kl_of(log_softmax(student_logits), log_softmax(teacher_logits))",
        "test_losses.py",
    ),
    Mutant(
        "KL's p - q dropped",
        "losses.py",
        "q * d + (p - q)",
        "q * d",
        "test_losses.py",
    ),
    Mutant(
        "KL's series dropped",
        "losses.py",
        "(jnp.abs(d) < SERIES_BELOW_NATS) & (q > 0)",
        "(jnp.abs(d) < 0.0) & (q > 0)",
        "test_losses.py",
    ),
    Mutant(
        "clip sides swapped",
        "losses.py",
        "jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high)",
        "jnp.clip(ratio, 1.0 - clip_high, 1.0 + clip_low)",
        "test_losses.py -k surrogate",
    ),
    Mutant(
        "dual clip dropped",
        "losses.py",
        "jnp.minimum(loss, -advantage * clip_ratio_c), loss)",
        "loss, loss)",
        "test_losses.py -k surrogate",
    ),
    Mutant(
        "dual clip where the advantage is positive",
        "losses.py",
        "jnp.where(advantage < 0, jnp.minimum",
        "jnp.where(advantage > 0, jnp.minimum",
        "test_losses.py -k surrogate",
    ),
    Mutant(
        "pessimism reversed",
        "losses.py",
        "jnp.maximum(-advantage * ratio",
        "jnp.minimum(-advantage * ratio",
        "test_losses.py -k surrogate",
    ),
    Mutant(
        "old log-probs carry gradient",
        "losses.py",
        "logp - jax.lax.stop_gradient(old_logp)",
        "logp - old_logp",
        "test_losses.py -k logp_alone",
    ),
    Mutant(
        "log-ratio not clamped",
        "losses.py",
        "-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)",
        "-90.0, 90.0)",
        "test_losses.py -k clamped",
    ),
    Mutant(
        "entropy's sign",
        "losses.py",
        "return -jnp.sum(p * jnp.where(p > 0, logp, 0.0), axis=-1)",
        "return jnp.sum(p * jnp.where(p > 0, logp, 0.0), axis=-1)",
        "test_losses.py -k entropy",
    ),
    Mutant(
        "dapo counts clipping on the wrong side",
        "objectives/dapo.py",
        "((batch.advantage < 0) & (ratio < 1 - self.low))",
        "((batch.advantage < 0) & (ratio > 1 - self.low))",
        "test_objectives.py -k by_hand",
    ),
    Mutant(
        "dapo forwards clip_high as clip_low",
        "objectives/dapo.py",
        "clip_low=self.low,\n",
        "clip_low=self.high,\n",
        "test_objectives.py -k settings_reach",
    ),
    Mutant(
        "mask not in the loss's count",
        "types.py",
        "jnp.sum(mask, dtype=jnp.float32)",
        "jnp.sum(jnp.ones_like(mask), dtype=jnp.float32)",
        "test_types.py",
    ),
    Mutant(
        "values outside the mask are multiplied, not dropped",
        "types.py",
        "jnp.sum(jnp.where(mask, values, 0.0), dtype=jnp.float32)",
        "jnp.sum(mask.astype(jnp.float32) * values, dtype=jnp.float32)",
        "test_types.py",
    ),
    Mutant(
        "mask by pad id",
        "types.py",
        "return (at >= self.prompt_length[:, None]) & (at < self.length[:, None])",
        "return (at >= self.prompt_length[:, None]) & (self.tokens != 0)",
        "test_types.py",
    ),
    Mutant(
        "prompt tokens counted as response",
        "types.py",
        "return (at >= self.prompt_length[:, None]) &",
        "return (at >= 0 * self.prompt_length[:, None]) &",
        "test_types.py",
    ),
    Mutant(
        "batch drops prompt tokens",
        "types.py",
        "jnp.where(live, jnp.asarray(tokens, jnp.int32), 0)",
        "jnp.where(mask, jnp.asarray(tokens, jnp.int32), 0)",
        "test_types.py",
    ),
    Mutant(
        "junk in the padding of a batch",
        "types.py",
        "jnp.where(live, jnp.asarray(tokens, jnp.int32), 0)",
        "jnp.asarray(tokens, jnp.int32)",
        "test_types.py",
    ),
    Mutant("std with ddof 0", "advantages.py", "ddof=1)", "ddof=0)", "test_advantages.py"),
    Mutant(
        "advantages not grouped",
        "advantages.py",
        "centred = rewards - jnp.mean(rewards, axis=1, keepdims=True)",
        "centred = rewards - jnp.mean(rewards, axis=0, keepdims=True)",
        "test_advantages.py",
    ),
    Mutant(
        "epsilon of another library", "advantages.py", "STD_EPSILON = 1e-6", "STD_EPSILON = 1e-4", "test_advantages.py"
    ),
    Mutant(
        "overlong penalty's sign",
        "rewards/shaping.py",
        "(free_tokens - length) / buffer_tokens",
        "(length - free_tokens) / buffer_tokens",
        "test_judge.py",
    ),
    Mutant(
        "overlong buffer ignored",
        "rewards/shaping.py",
        "free_tokens = max_tokens - buffer_tokens",
        "free_tokens = max_tokens",
        "test_judge.py",
    ),
    Mutant(
        "overlong penalty by the row's whole length",
        "judge/groups.py",
        "np.asarray(rollout.response_length),",
        "np.asarray(rollout.length),",
        "test_judge.py",
    ),
    Mutant(
        "informative by reward",
        "judge/dynamic_sampling.py",
        "groups.accuracy.max(axis=1) != groups.accuracy.min(axis=1)",
        "groups.reward.max(axis=1) != groups.reward.min(axis=1)",
        "test_judge.py",
    ),
    Mutant(
        "surplus lost",
        "judge/dynamic_sampling.py",
        'if rule.surplus == "keep" and have > prompts else None',
        'if rule.surplus == "hold" and have > prompts else None',
        "test_judge.py",
    ),
    Mutant(
        "leftover forgotten",
        "judge/dynamic_sampling.py",
        "kept = [] if leftover is None else [leftover]",
        "kept = []",
        "test_judge.py",
    ),
    Mutant(
        "dynamic sampling never draws again",
        "judge/dynamic_sampling.py",
        "while have < prompts and drawn < rule.max_generation_batches",
        "while have < prompts and drawn < 1",
        "test_judge.py",
    ),
    Mutant(
        "verifier reads the prompt too",
        "judge/scoring.py",
        "rollout.tokens[row, rollout.prompt_length[row] : rollout.length[row]]",
        "rollout.tokens[row, : rollout.length[row]]",
        "test_judge.py",
    ),
    Mutant(
        "log-prob of the unfiltered distribution",
        "rollout/distribution.py",
        "- jnp.log(total)",
        "- jnp.log(jnp.sum(weight, axis=-1))",
        "test_rollout.py -k draw_follows",
    ),
    Mutant(
        "logits divided before they are centred",
        "rollout/distribution.py",
        "vocab = logits.shape[-1]\n",
        "vocab, logits = logits.shape[-1], logits / (sampling.sampling_temperature or 1)\n"
        "    sampling = dataclasses.replace(sampling, sampling_temperature=float(sampling.sampling_temperature > 0))\n",
        "test_rollout.py -k temperature_is_exact",
    ),
    Mutant(
        "greedy decoding takes the last of the likeliest",
        "rollout/distribution.py",
        "jnp.argmax(logits, axis=-1)",
        "(vocab - 1 - jnp.argmax(logits[:, ::-1], axis=-1))",
        "test_rollout.py -k greedy",
    ),
    Mutant(
        "temperatures too small to be exact",
        "rollout/distribution.py",
        "not SMALLEST_TEMPERATURE <= temperature <",
        "not 0 < temperature <",
        "test_rollout.py -k refuses",
    ),
    Mutant(
        "a nucleus that must exceed top-p",
        "rollout/distribution.py",
        "measure(bits >= middle[:, None]) >= goal",
        "measure(bits >= middle[:, None]) > goal",
        "test_rollout.py -k draw_follows",
    ),
    Mutant(
        "nucleus without the token that reaches it",
        "rollout/distribution.py",
        "jnp.ceil(missing",
        "jnp.floor(missing",
        "test_rollout.py -k draw_follows",
    ),
    Mutant(
        "ties counted twice across blocks",
        "rollout/distribution.py",
        "jnp.cumsum(equal_BN, axis=-1) - equal_BN",
        "jnp.cumsum(equal_BN, axis=-1)",
        "test_rollout.py -k large_vocabulary",
    ),
    Mutant(
        "top-k gives one tie too many",
        "rollout/distribution.py",
        "Cut(edge, sampling.top_k - above)",
        "Cut(edge, sampling.top_k - above + 1)",
        "test_rollout.py -k draw_follows",
    ),
    Mutant(
        "inside a block the blocks before are forgotten",
        "rollout/distribution.py",
        "passed[:, None] + jnp.cumsum(inside_BW",
        "0 * passed[:, None] + jnp.cumsum(inside_BW",
        "test_rollout.py -k large_vocabulary",
    ),
    Mutant(
        "impossible tokens at uniform 0",
        "rollout/distribution.py",
        "running_BN <= goal_B",
        "running_BN < goal_B",
        "test_rollout.py -k ends",
    ),
    Mutant(
        "stop token not counted",
        "rollout/segment.py",
        "count + live.astype(jnp.int32)",
        "count + (live & ~stopped).astype(jnp.int32)",
        "test_rollout.py -k first_stop",
    ),
    Mutant(
        "row key ignores the row id",
        "rollout/segment.py",
        "jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, row_id)",
        "jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(row_id.shape[0]))",
        "test_rollout.py -k alone",
    ),
    Mutant(
        "one uniform number for every position",
        "rollout/segment.py",
        "jax.random.fold_in(row_key, t)",
        "jax.random.fold_in(row_key, 0 * t)",
        "test_rollout.py -k own_number",
    ),
    Mutant(
        "each segment draws the first one's numbers",
        "rollout/segment.py",
        "t_R = first + jnp.arange",
        "t_R = 0 * first + jnp.arange",
        "test_engine.py -k arrangement",
    ),
    Mutant(
        "position off by one in decode",
        "rollout/segment.py",
        "slots.position + t, attend",
        "slots.position + t + 1, attend",
        "test_rollout.py -k logp_is",
    ),
    Mutant(
        "a token does not see itself",
        "rollout/segment.py",
        "place_C <= home + t",
        "place_C < home + t",
        "test_rollout.py -k logp_is",
    ),
    Mutant(
        "junk beyond the prompt is seen",
        "rollout/segment.py",
        "place_C[None, :] < slots.tail[:, None]",
        "place_C[None, :] <= slots.tail[:, None]",
        "test_rollout.py -k logp_is",
    ),
    Mutant(
        "the last prompt token of the widest row for all",
        "rollout/segment.py",
        "jnp.take_along_axis(tokens, length[:, None] - 1, axis=1)",
        "jnp.take_along_axis(tokens, 0 * length[:, None] + p - 1, axis=1)",
        "test_rollout.py -k logp_is",
    ),
    Mutant(
        "pages joined without their scale",
        "rollout/segment.py",
        "out + part.out * scale[..., None]",
        "out + part.out",
        "test_engine.py -k arrangement",
    ),
    Mutant(
        "the wrong half of a tail becomes a page",
        "rollout/cache.py",
        "tail.shape[axis] - r, tail.shape[axis], axis=axis)",
        "0, r, axis=axis)",
        "test_engine.py -k arrangement",
    ),
    Mutant(
        "a prompt's rest is its beginning",
        "rollout/admission.py",
        "start[shard, entry.slot] = prompt, len(entry.pages) * r",
        "start[shard, entry.slot] = prompt, 0",
        "test_engine.py -k arrangement",
    ),
    Mutant(
        "the wrong prompt is carried on",
        "rollout/admission.py",
        "keep[shard] = prompt",
        "keep[shard] = 0",
        "test_engine.py -k change_nothing",
    ),
    Mutant(
        "a prompt's cache is sent to all devices",
        "rollout/programs.py",
        "attention=causal), out_shardings=self._heads)",
        "attention=causal), out_shardings=replicated(mesh))",
        "test_engine.py -k stays_where",
    ),
    Mutant(
        "a prompt is carried on as nobody's",
        "rollout/admission.py",
        "carried[shard] = of_entry",
        "carried[shard] = -1",
        "test_engine.py -k pieces",
    ),
    Mutant(
        "layers of the sampler traced one by one",
        "model/decoding.py",
        "layer = jax.jit(functools.partial(_layer, model, attend, len(tokens_BT)))",
        "layer = functools.partial(_layer, model, attend, len(tokens_BT))",
        "test_model.py -k prefill",
    ),
    Mutant(
        "every block's gradients in the first one's place",
        "head_tiles.py",
        "dynamic_update_index_in_dim(z, new, i, 0)",
        "dynamic_update_index_in_dim(z, new, 0, 0)",
        "test_head.py -k one_pass_equals",
    ),
    Mutant(
        "of a tile's blocks only the last counts",
        "head.py",
        "jnp.sum(x, axis=0), self.out)",
        "x[-1], self.out)",
        "test_head.py -k one_pass_equals",
    ),
    Mutant(
        "a group's rows on all shards in turn",
        "rollout/schedule.py",
        "if not idle[shard] or self.group[row] != self.group[row - 1]:",
        "if True:",
        "test_engine.py -k share_a_shard",
    ),
    Mutant(
        "pages are never freed",
        "rollout/schedule.py",
        "self.owner[shard, free] = -1",
        "pass",
        "test_engine.py -k books",
    ),
    Mutant(
        "slots are not freed before the longest row ends",
        "rollout/schedule.py",
        "self.waiting < len(self.prompt_length):\n            return None",
        "True:\n            return None",
        "test_engine.py -k long_tailed",
    ),
    Mutant(
        "kernel keeps the old sum's scale",
        "rollout/paged_attention.py",
        "total_ref[0, head] * scale",
        "total_ref[0, head]",
        "test_attention.py -k paged",
    ),
    Mutant(
        "kernel joins the pages of neighbours",
        "rollout/paged_attention.py",
        "(slot[i] != slot[jnp.maximum(i - 1, 0)])",
        "(i < 0)",
        "test_attention.py -k paged",
    ),
    Mutant(
        "the rollout view's RoPE turns backwards",
        "model/decoding.py",
        "a * cos - b * sin, b * cos + a * sin",
        "a * cos + b * sin, b * cos - a * sin",
        "test_model.py -k prefill",
    ),
    Mutant(
        "a response is scored against another's answer",
        "judge/scoring.py",
        "asked[done.row].answer, asked",
        "asked[0].answer, asked",
        "test_judge.py -k while",
    ),
    Mutant(
        "the key's bias is not added",
        "model/qwen3.py",
        "k_BTKH = k_BTKH + self.k_bias[...].astype(dtype)[None, None]",
        "k_BTKH = k_BTKH + 0 * self.k_bias[...].astype(dtype)[None, None]",
        "test_model.py -k prefill",
    ),
    Mutant(
        "the rollout view swaps the biases of key and value",
        "model/decoding.py",
        'w["k_bias"][:, None], w["v_bias"][:, None]]',
        'w["v_bias"][:, None], w["k_bias"][:, None]]',
        "test_model.py -k view_of_biases",
    ),
    Mutant(
        "Llama's scaled rotation is read as plain",
        "model/hf_config.py",
        'if kind not in ("default", "yarn"):',
        'if kind not in ("default", "yarn", "llama3"):',
        "test_model_hf.py -k config_errors",
    ),
    Mutant(
        "YaRN turned around: slow components stay",
        "model/qwen3.py",
        "frequency = frequency * kept + frequency / yarn.factor * (1 - kept)",
        "frequency = frequency * (1 - kept) + frequency / yarn.factor * kept",
        "test_model.py -k yarn",
    ),
    Mutant(
        "YaRN without the longer queries and keys",
        "model/qwen3.py",
        "return (cos, sin) if yarn is None else (cos * yarn.scale, sin * yarn.scale)",
        "return cos, sin",
        "test_model.py -k yarn",
    ),
    Mutant(
        "YaRN in training, not in sampling",
        "model/decoding.py",
        "c.rope_theta, c.yarn)",
        "c.rope_theta)",
        "test_model.py -k prefill",
    ),
    Mutant(
        "YaRN is lost in an export",
        "model/hf_config.py",
        'kind = {"rope_type": "default" if config.yarn is None else "yarn"} | scaling',
        'kind = {"rope_type": "default"}',
        "test_model_hf.py -k yarn",
    ),
    Mutant(
        "rope_scaling drops the other section's theta in silence",
        "model/hf_config.py",
        'if raw.get("rope_scaling") and',
        "if False and",
        "test_model_hf.py -k config_errors",
    ),
    Mutant(
        "a tensor in two shards",
        "model/hf.py",
        "if name in where and where[name] != shard:",
        "if False:",
        "test_model_hf.py -k index",
    ),
    Mutant(
        "weights that are infinite are loaded",
        "model/hf_layout.py",
        ".max() >= infinity:",
        ".max() > infinity:",
        "test_model_hf.py -k finite",
    ),
    Mutant(
        "an export stops where its base model did",
        "model/hf.py",
        "if stop_ids != (named if isinstance(named, list) else [named]):",
        "if named is None:",
        "test_model_hf.py -k stop_ids",
    ),
    Mutant(
        "truncation that tokenizer.json holds is obeyed",
        "data/tokenizer.py",
        "        backend.no_truncation()\n",
        "",
        "test_prompts.py -k left",
    ),
    Mutant(
        "padding that tokenizer.json holds is obeyed",
        "data/tokenizer.py",
        "        backend.no_padding()\n",
        "",
        "test_prompts.py -k left",
    ),
    Mutant(
        "a stop token that is not special is shown",
        "data/tokenizer.py",
        "        backend.add_special_tokens([backend.id_to_token(token) for token in stop_ids])\n",
        "",
        "test_prompts.py -k not_marked",
    ),
    Mutant(
        "a word of the vocabulary ends a problem",
        "data/tokenizer.py",
        "if token in self.special_ids and not is_added:",
        "if False:",
        "test_prompts.py -k special_word",
    ),
    Mutant(
        "a prompt depends on the date",
        "data/chat.py",
        'if "strftime_now" in template else template',
        "if False else template",
        "test_prompts.py -k expect",
    ),
    Mutant(
        "torch is imported to read files",
        "huggingface.py",
        "        with _torch_later():\n",
        "        if True:\n",
        "test_prompts.py -k without_torch",
    ),
    Mutant(
        "every architecture is saved as Qwen3",
        "model/hf_config.py",
        '"architectures": [config.architecture],',
        '"architectures": ["Qwen3ForCausalLM"],',
        "test_model_hf.py -k round_trip",
    ),
    Mutant(
        "somebody's README is replaced",
        "model/hf.py",
        'ours = any(folder.glob("model*.safetensors"))',
        "ours = True",
        "test_model_hf.py -k card_is_replaced",
    ),
    Mutant(
        "the card tells of steps after the exported one",
        "commands/model_card.py",
        'metrics = [line for line in metrics if line["step"] <= step]',
        "metrics = list(metrics)",
        "test_model_card.py",
    ),
    Mutant(
        "test calculations in other words are trained on",
        "data/arithmetic.py",
        'zlib.crc32(f"{operation} {sorted((a, b))}".encode())',
        'zlib.crc32(f"{operation} {a} {b}".encode())',
        "test_arithmetic.py -k share_no",
    ),
    Mutant(
        "RoPE's sign",
        "model/qwen3.py",
        "[a * cos - b * sin, b * cos + a * sin]",
        "[a * cos + b * sin, b * cos + a * sin]",
        "test_model.py test_model_parity.py",
    ),
    Mutant(
        "attention sees one ahead",
        "model/attention.py",
        "at[None, start:end, None] >= at[None, None, :end]",
        "at[None, start:end, None] >= at[None, None, :end] - 1",
        "test_attention.py -k causal",
    ),
    Mutant(
        "mean of means",
        "learn/update.py",
        "return found.out.loss.total, found",
        "return found.out.loss.value, found",
        "test_update.py -k one_division",
    ),
    Mutant(
        "only the last micro-batch counts",
        "learn/update.py",
        "jax.tree.map(jnp.add, carry[0], grads), carry[1] + found",
        "grads, add(carry[1], found)",
        "test_update.py -k one_division",
    ),
    Mutant(
        "hold ignored",
        "learn/update.py",
        "jnp.where(finite & ~held, new, old)",
        "jnp.where(finite, new, old)",
        "test_update.py -k hold",
    ),
    Mutant(
        "non-finite not skipped",
        "learn/update.py",
        "jnp.where(finite & ~held, new, old)",
        "jnp.where(~held, new, old)",
        "test_update.py -k not_finite",
    ),
    Mutant(
        "hold only beyond the limit",
        "learn/update.py",
        "out.metrics[ENTROPY].value >= hold_above_nats",
        "out.metrics[ENTROPY].value > hold_above_nats",
        "test_update.py -k hold",
    ),
    Mutant(
        "decay on the norms",
        "learn/update.py",
        '"norm" not in name and "bias" not in name',
        '"bias" not in name',
        "test_update.py -k decay",
    ),
    Mutant(
        "decay on the biases",
        "learn/update.py",
        '"norm" not in name and "bias" not in name',
        '"norm" not in name',
        "test_update.py -k decay",
    ),
    Mutant(
        "warm-up off by one",
        "learn/update.py",
        "(count.astype(jnp.float32) + 1.0)",
        "(count.astype(jnp.float32) + 0.0)",
        "test_update.py -k 'first_steps or rate_rises'",
    ),
    Mutant(
        "no gradient clip",
        "learn/update.py",
        "optax.clip_by_global_norm(clip_norm),",
        "optax.identity(),",
        "test_update.py -k first_steps",
    ),
    Mutant(
        "reheating draws with one key for all steps",
        "learn/update.py",
        "jax.random.fold_in(run_key, state.step)",
        "run_key",
        "test_update.py -k fused",
    ),
    Mutant(
        "gap outside the mask",
        "head.py",
        "jnp.where(batch.mask, apart, 0.0)",
        "jnp.where(~batch.mask, apart, 0.0)",
        "test_update.py -k logp_gap",
    ),
    Mutant(
        "positions go on in a packed row",
        "model/qwen3.py",
        "first = jnp.diff(segment, axis=1, prepend=segment[:, :1]) != 0",
        "first = jnp.diff(segment, axis=1, prepend=segment[:, :1]) < 0",
        "test_packing.py -k positions",
    ),
    Mutant(
        "gradients added in the compute dtype",
        "learn/update.py",
        "return jax.tree.map(jnp.add, carry[0], grads), carry[1] + found",
        "return jax.tree.map(lambda a, g: (a + g).astype(model.compute_dtype).astype(a.dtype), carry[0], grads), "
        "carry[1] + found",
        "test_update.py -k float32",
    ),
    Mutant(
        "the first phase's start kept for all",
        "train/trainer.py",
        "self.progress.next_phase())",
        "self.progress.next_phase(), start=self.run_state.start)",
        "test_trainer.py -k how_far",
    ),
    Mutant(
        "colliding axes pass",
        "distributed/sharding.py",
        "if mesh_axis in used:",
        "if mesh_axis == axis:",
        "test_sharding.py",
    ),
    Mutant(
        "embedding sharded otherwise",
        "distributed/sharding.py",
        '"embed": "fsdp",',
        '"embed": None,',
        "test_sharding.py",
    ),
    Mutant(
        "preemption: every notice is passed on",
        "../tpu/supervise.py",
        "                asked = True\n",
        "",
        "test_tpu_scripts.py -k 'notice or shutdown'",
    ),
    Mutant(
        "preemption: a pause for maintenance taken for the end",
        "../tpu/supervise.py",
        "if read_metadata(host, key) == value)",
        "if read_metadata(host, key) not in (None, 'FALSE', 'NONE'))",
        "test_tpu_scripts.py -k without_a_notice",
    ),
    Mutant(
        "resume: any error of gcloud taken for absence",
        "../tpu/common.sh",
        'elif grep -q NOT_FOUND "$WORK/errors"; then',
        "elif true; then",
        "test_tpu_scripts.py -k not_taken_for_absence",
    ),
    Mutant(
        "resume: bad input started again",
        "../tpu/resume.sh",
        "for word in running 2 3 6 bare stopped none; do",
        "for word in running bare stopped none; do",
        "test_tpu_scripts.py -k words_decide",
    ),
    Mutant(
        "resume: crashes without limit",
        "../tpu/resume.sh",
        "((++failures <= opt[crashes])) ||",
        "true ||",
        "test_tpu_scripts.py -k gives_up",
    ),
    Mutant(
        "resume: a command that vanishes is started for ever",
        "../tpu/resume.sh",
        """[[ -z $begun ]] || failed "the command ended""",
        """true || failed "the command ended""",
        "test_tpu_scripts.py -k vanishes",
    ),
    Mutant(
        "resume: a watch that gives up leaves the slice",
        "../tpu/resume.sh",
        "trap 'at_exit $?' EXIT",
        "trap '(($? == 1)) || at_exit 0' EXIT",
        "test_tpu_scripts.py -k however_the_watch_ends",
    ),
    Mutant(
        "run: any run directory is taken",
        "../tpu/common.sh",
        "[[ $place =~ ^gs://",
        "[[ $place =~ ^",
        "test_tpu_scripts.py -k goes_with_the_machine",
    ),
    Mutant(
        "worker: without the bucket's client",
        "../tpu/worker.sh",
        "${CODE}[tpu,gcs]",
        "${CODE}[tpu]",
        "test_tpu_scripts.py -k accelerator_and_the_store",
    ),
    Mutant(
        "worker: a full disk hides the exit code",
        "../tpu/supervise.py",
        "with contextlib.suppress(OSError):  # a full disk must not hide the exit code",
        "if True:",
        "test_tpu_scripts.py -k full_disk_does_not",
    ),
    Mutant(
        "resume: a run that was stopped on purpose loses its slice",
        "../tpu/resume.sh",
        "        opt[delete]=''\n",
        "",
        "test_tpu_scripts.py -k stopped_on_purpose",
    ),
    Mutant(
        "smoke: cores are taken for chips",
        "../tpu/common.sh",
        "|| CHIPS=$((CHIPS / 2))",
        "|| true",
        "test_tpu_scripts.py -k chips_of_all",
    ),
    Mutant(
        "resume: a slice gone from an active queued resource not noticed",
        "../tpu/common.sh",
        "    [[ $found == READY ]] || break\n",
        "",
        "test_tpu_scripts.py -k lost_from",
    ),
    Mutant(
        "worker: the exit code of the last start kept",
        "../tpu/worker.sh",
        '  run rm -f "$STATE/exit_code" "$STATE/stopped"\n',
        "",
        "test_tpu_scripts.py -k started_as_a_service",
    ),
    Mutant(
        "entropy of the slot's previous row carried over",
        "rollout/engine.py",
        "self.nats = np.where(drawn > 0, self.nats, 0.0)",
        "self.nats = self.nats",
        "test_engine.py -k entropy_is",
    ),
    Mutant(
        "entropy of idle slots counted",
        "rollout/segment.py",
        "nats = nats + jnp.where(live, losses.entropy(logits_BV), 0.0)",
        "nats = nats + losses.entropy(logits_BV)",
        "test_engine.py -k entropy_is",
    ),
    Mutant(
        "mean entropy over responses instead of tokens",
        "evaluation/evaluate.py",
        "np.average([r.entropy_nats for r in responses], weights=tokens)",
        "np.average([r.entropy_nats for r in responses])",
        "test_evaluate.py",
    ),
    Mutant(
        "standard error with the wrong deviation",
        "evaluation/evaluate.py",
        "per_problem.std(ddof=1)",
        "per_problem.std(ddof=0)",
        "test_evaluate.py",
    ),
    Mutant(
        "bootstrap draws without replacement",
        "evaluation/evaluate.py",
        "d[rng.integers(len(d), size=len(d))].mean()",
        "d[rng.permutation(len(d))].mean()",
        "test_evaluate.py",
    ),
    Mutant(
        "a resumed response takes another row's random numbers",
        "commands/eval.py",
        "row_id += [place * samples + s for s in todo]",
        "row_id += list(range(len(row_id), len(row_id) + len(todo)))",
        "test_eval_command.py -k killed",
    ),
    Mutant(
        "an unfinished evaluation in the table",
        "evaluation/scoreboard.py",
        "finished = [e for e in evaluated if not e.missing]",
        "finished = [e for e in evaluated if e.missing < 2]",
        "test_eval_command.py -k table_is",
    ),
    Mutant(
        "evaluation within a phase before it is saved",
        "train/trainer.py",
        "save=evaluates or self",
        "save=self",
        "test_trainer.py -k within_phases",
    ),
    Mutant(
        "repetitions of a problem are kept",
        "data/layouts.py",
        "if earlier != number:",
        "if earlier > number:",
        "test_data.py -k dapo_layout",
    ),
    Mutant(
        "an option's place taken for its letter",
        "data/layouts.py",
        '"ABCD"[int(np.flatnonzero(order == 0)[0])]',
        '"ABCD"[int(order[0])]',
        "test_prepare.py -k gpqa",
    ),
    Mutant(
        "malformed rows dropped silently",
        "data/prepare.py",
        "if tally.malformed and not skip_malformed:",
        "if tally.malformed and skip_malformed is None:",
        "test_prepare.py -k malformed_rows_stop",
    ),
    Mutant(
        "all braces are alike to the overlap",
        "data/selection.py",
        'return re.sub(r"\\{(\\w)\\}", r"\\1", text)',
        'return re.sub(r"[{}]", "", text)',
        "test_prepare.py -k fingerprints",
    ),
    Mutant(
        "a sample repeats problems",
        "data/selection.py",
        "size=count, replace=False",
        "size=count, replace=True",
        "test_prepare.py -k sample_is",
    ),
    Mutant(
        "first N before what is left out",
        "config/build.py",
        "first=None if filtered else data.first",
        "first=data.first",
        "test_prepare.py -k first_counts",
    ),
    Mutant(
        "a problem can write special tokens",
        "data/tokenizer.py",
        "backend.encode_special_tokens = True",
        "backend.encode_special_tokens = False",
        "test_prompts.py -k special_tokens",
    ),
    Mutant(
        "a chat does not stop at the turn's end",
        "data/tokenizer.py",
        "stop_ids = tuple(dict.fromkeys((*[token for token in end if token in added][:1], *stop_ids)))",
        "del end, added",
        "test_prompts.py -k stop_tokens",
    ),
    Mutant(
        "thinking turned around",
        "data/chat.py",
        "enable_thinking=thinking",
        "enable_thinking=not thinking",
        "test_prompts.py -k golden",
    ),
    Mutant(
        "plan: an all-reduce counted as half of itself",
        "plan/collectives.py",
        '{"all-reduce": 2 * (n - 1) / n,',
        '{"all-reduce": (n - 1) / n,',
        "test_plan.py -k are_counted",
    ),
    Mutant(
        "plan: collectives in loops counted once",
        "plan/collectives.py",
        "self._walk(name, inner)",
        "self._walk(name, times)",
        "test_plan.py -k are_counted",
    ),
    Mutant(
        "plan: loops unrolled by two counted twice",
        "plan/collectives.py",
        "return _constant(added[0]) if added else 1",
        "return 1",
        "test_plan.py -k are_counted",
    ),
    Mutant(
        "plan: a fused reduce-scatter taken for an all-reduce",
        "plan/collectives.py",
        'if kind == "all-reduce" and "all-reduce-scatter" in computation:',
        'if kind == "all-reduce" and "nowhere" in computation:',
        "test_plan.py -k are_counted",
    ),
    Mutant(
        "plan: causal attention counted as full",
        "hardware/work.py",
        "* c.head_dim * length * (length + 1)",
        "* c.head_dim * 2 * length * length",
        "test_plan.py -k attention_counts",
    ),
    Mutant(
        "plan: rematerialised forward forgotten",
        "hardware/work.py",
        "layer_weights(c) * (3 + again)",
        "layer_weights(c) * 3",
        "test_plan.py -k flops_of_an_update",
    ),
    Mutant(
        "plan: what lies beside a program forgotten",
        "plan/compiled.py",
        'held = part.bytes | {"temporaries": temporaries}',
        'held = {"temporaries": compiled.bytes}',
        "test_plan.py -k beside_a_program",
    ),
    Mutant(
        "plan: a kernel's memory taken for the device's",
        "learn/micro_batches.py",
        r"of \S+ hbm|",
        "of|",
        "test_packing.py -k refuses",
    ),
    Mutant(
        "numeric answers with an exponent",
        "data/layouts.py",
        'np.format_float_positional(value + 0.0, trim="-")',
        "str(value)",
        "test_data.py -k plain_digits",
    ),
    Mutant(
        "answers that are not finite",
        "data/layouts.py",
        "if isinstance(value, float) and not math.isfinite(value):",
        "if False:",
        "test_data.py -k not_finite",
    ),
    Mutant(
        "narrow floats with the digits of wide ones",
        "data/layouts.py",
        "if value is None or not _is_narrow(kind):",
        "if True:",
        "test_data.py -k own_width",
    ),
    Mutant(
        "a byte-order mark is part of the first row",
        "data/layouts.py",
        "line.removeprefix(codecs.BOM_UTF8)",
        "line",
        "test_data.py -k byte_order",
    ),
    Mutant(
        "the files of several data sets are one",
        "data/sources.py",
        "if len(folders) > 1:",
        "if False:",
        "test_prepare.py -k several_data_sets",
    ),
    Mutant(
        "a data set of any size",
        "data/layouts.py",
        "self.known is not None and self.kept > self.known",
        "False",
        "test_prepare.py -k more_problems_than",
    ),
    Mutant(
        "a run goes on with other problems",
        "config/claim.py",
        "if others and reached is not None and not accept_changed:",
        "if False:",
        "test_claim.py -k other_problems",
    ),
    Mutant(
        "the digest of problems knows no order",
        "config/claim.py",
        "json.dumps([_learned(row) for row in rows],",
        "json.dumps(sorted(_learned(row) for row in rows),",
        "test_claim.py -k other_problems",
    ),
    Mutant(
        "answers are not in the digest of problems",
        "config/claim.py",
        "(problem.prompt, problem.answer, *(",
        "(problem.prompt, *(",
        "test_claim.py -k other_problems",
    ),
    Mutant(
        "another objective's file is not noticed",
        "config/claim.py",
        "hashlib.sha256(Path(path).read_bytes())",
        "hashlib.sha256(path.encode())",
        "test_claim.py -k ones_own",
    ),
    Mutant(
        "problems are not compared when a run starts",
        "commands/train.py",
        "claim.claim(run_dir, config, inputs, accept_changed=accept_changed)",
        "claim.claim(run_dir, config)",
        "test_configs.py -k unless_told_to",
    ),
    Mutant(
        "the last of two equal keys counts",
        "config/strict.py",
        "if key.value in lines:",
        "if False:",
        "test_configs.py -k yaml_that_is_refused",
    ),
    Mutant(
        "numbers of base eight",
        "config/strict.py",
        'int(text, 0 if text[1:2] in ("o", "x") else 10)',
        'int(text, 8 if text[0] == "0" else 10)',
        "test_configs.py -k yaml_1_2",
    ),
    Mutant(
        "text that YAML 1.2 takes for a number is written without quotes",
        "config/strict.py",
        "for _class in (_Loader, _Dumper):",
        "for _class in (_Loader,):",
        "test_configs.py -k read_alike",
    ),
    Mutant(
        "of merged mappings the last wins",
        "config/strict.py",
        "for pairs in reversed(merged)",
        "for pairs in merged",
        "test_configs.py -k merged_key",
    ),
    Mutant(
        "joining other processes starts JAX before the CPU is divided",
        "commands/train.py",
        "divide_cpu(load_config(args.config, args.set).mesh.cpu_devices)",
        "load_config(args.config, args.set)",
        "test_configs.py -k divides_the_cpu",
    ),
    Mutant(
        "a division of the CPU that comes too late is swallowed",
        "config/build.py",
        'if jax.default_backend() == "cpu" and there != devices:',
        "if False:",
        "test_configs.py -k comes_too_late",
    ),
    Mutant(
        "a setting that nothing reads",
        "config/build.py",
        "pack=phase.pack,",
        "pack=True,",
        "test_config_fields.py -k pack",
    ),
    Mutant(
        "a group of one",
        "config/schema.py",
        "self.reward is not None and self.responses_per_prompt == 1",
        "False",
        "test_configs.py -k bad_settings",
    ),
    Mutant(
        "a collapsed policy counts as recovered",
        "config/schema.py",
        "low is not None and high is not None and low > high",
        "False",
        "test_configs.py -k recovered_one",
    ),
    Mutant(
        "a run in 64 bits starts",
        "cli.py",
        'if os.environ.get("JAX_ENABLE_X64", "").lower() in',
        'if "" in',
        "test_environment.py -k 64_bits",
    ),
    Mutant(
        "a platform without devices is a traceback",
        "cli.py",
        "isinstance(error, ValueError | OSError) or exit_codes.no_backend(error)",
        "isinstance(error, ValueError | OSError)",
        "test_environment.py -k 'not_there and check and abacus'",
    ),
    Mutant(
        "a tilde in settings is a folder of that name",
        "config/strict.py",
        "return at_home(value)",
        "return value",
        "test_environment.py -k tilde_in_settings",
    ),
    Mutant(
        "a tilde in options is a folder of that name",
        "cli.py",
        "setattr(args, name, type(value)(at_home(str(value))))",
        "pass",
        "test_environment.py -k tilde_in_the_environment",
    ),
    Mutant(
        "workplaces of killed preparations stay",
        "data/builders.py",
        "            _sweep(directory)\n",
        "",
        "test_environment.py -k killed",
    ),
    Mutant(
        "workplaces of living preparations go",
        "data/builders.py",
        "if not wait or error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP):",
        "if False:",
        "test_environment.py -k killed",
    ),
]


class Verdict(NamedTuple):
    """What became of a mutant: killed, SURVIVED, or why it could not be tried."""

    mutant: Mutant
    word: str
    seconds: float
    tail: str


def copy_tree(to: Path) -> None:
    """What a test run needs of the repository."""
    skip = shutil.ignore_patterns("__pycache__", "*.pyc")
    for part in PARTS:
        source = ROOT / part
        if source.is_dir():
            shutil.copytree(source, to / part, ignore=skip)
        else:
            shutil.copy(source, to / part)


def arguments(tests: str) -> list[str]:
    """`a.py b.py -k 'x or y'` as pytest's arguments."""
    files, _, expression = tests.partition(" -k ")
    chosen = [f"tests/{file}" for file in files.split()]
    return [*chosen, "-k", expression.strip("'")] if expression else chosen


def pytest_in(folder: Path, tests: str, timeout_s: float) -> tuple[int, str]:
    """(exit code, the end of the output) of the tests in a copied tree; a test that hangs counts as failed."""
    env = os.environ | {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *arguments(tests)]
    try:
        done = subprocess.run(
            command, cwd=folder, env=env, capture_output=True, text=True, timeout=timeout_s, check=False
        )
    except subprocess.TimeoutExpired:
        return 1, "timed out"
    return done.returncode, (done.stdout + done.stderr)[-1500:]


def try_mutant(mutant: Mutant, timeout_s: float) -> Verdict:
    """Apply a mutant in a copy of the tree and run its tests there."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutant-") as name:
        folder = Path(name)
        copy_tree(folder)
        file = folder / "tsopsd_jax" / mutant.file
        text = file.read_text()
        if text.count(mutant.old) != 1:
            return Verdict(mutant, f"TEXT FOUND {text.count(mutant.old)} TIMES", 0.0, "")
        file.write_text(text.replace(mutant.old, mutant.new))
        code, tail = pytest_in(folder, mutant.tests, timeout_s)
    # 1: tests failed. Anything else (no tests, a usage error) proves nothing.
    word = {0: "SURVIVED", 1: "killed"}.get(code, f"PYTEST EXIT {code}")
    return Verdict(mutant, word, time.monotonic() - start, tail)


def git(*arguments: str) -> str:
    return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True).stdout


def changed_files(hours: int = 24) -> set[str]:
    """Files in which the commits of the last hours changed more than imports; none where the history is missing."""
    before = git("rev-list", "-1", f"--before={hours} hours ago", "HEAD").strip()
    if not before:
        return set()
    rows = git("diff", "-M", "--numstat", "-z", r"-I^\s*(from|import) ", before, "HEAD").split("\0")
    # A row: added, removed, path; for a renamed file the path is empty and the old and the new one follow.
    return {row.split("\t")[-1] for row in rows} - {""}


def number_of(mutant: Mutant) -> int:
    """A large number that the commit and the mutant's name decide."""
    commit = git("rev-parse", "HEAD").strip()
    return int(hashlib.sha256(f"{commit} {mutant.name}".encode()).hexdigest(), 16)


def shuffled(mutants: list[Mutant]) -> list[Mutant]:
    """The mutants in an order that the commit chooses: where time runs out, other commits try others."""
    return sorted(mutants, key=number_of)


def recent(mutants: list[Mutant]) -> list[Mutant]:
    """The mutants whose file or tests changed in the last day, and a tenth of the others, which the commit chooses."""
    changed = changed_files()

    def touched(mutant: Mutant) -> bool:
        tests = [name.partition("::")[0] for name in arguments(mutant.tests)]
        return any(file in changed for file in [os.path.normpath(f"tsopsd_jax/{mutant.file}"), *tests])

    return [m for m in mutants if touched(m) or number_of(m) % 10 == 0]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=1, help="mutants at once")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="those whose name, file or tests contain a word")
    parser.add_argument("--check", action="store_true", help="only check that every text occurs exactly once")
    parser.add_argument("--timeout-s", type=float, default=300.0, help="limit per mutant")
    parser.add_argument("--verbose", action="store_true", help="show the output of what was not killed")
    parser.add_argument("--recent", action="store_true", help="those of files changed today, and a tenth of the rest")
    parser.add_argument("--minutes", type=float, help="begin none after this long, in an order that the commit chooses")
    options = parser.parse_args(argv)
    chosen = [m for m in MUTANTS if not options.only or any(w in f"{m.name} {m.file} {m.tests}" for w in options.only)]
    if options.recent:
        chosen = recent(chosen)
    if options.check:
        wrong = [m for m in chosen if (ROOT / "tsopsd_jax" / m.file).read_text().count(m.old) != 1]
        print(
            "\n".join(f"{m.file}: not exactly once: {m.old!r} ({m.name})" for m in wrong)
            or f"{len(chosen)} texts found"
        )
        return bool(wrong)
    ends = time.monotonic() + 60 * options.minutes if options.minutes else float("inf")
    if options.minutes:
        chosen = shuffled(chosen)
    bad = left = 0
    with ThreadPoolExecutor(options.jobs) as pool:
        for verdict in pool.map(
            lambda m: try_mutant(m, options.timeout_s) if time.monotonic() < ends else None, chosen
        ):
            if verdict is None:
                left += 1
                continue
            m = verdict.mutant
            print(f"{verdict.word:<22} {verdict.seconds:6.1f} s  {m.file:<26} {m.name}", flush=True)
            if verdict.word != "killed":
                bad += 1
                if options.verbose:
                    print(verdict.tail)
    tried = len(chosen) - left
    print(f"{tried - bad} of {tried} mutants killed" + (f"; {left} more were not begun in time" if left else ""))
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
