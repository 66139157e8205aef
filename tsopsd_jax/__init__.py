"""Reinforcement learning of reasoning language models in JAX, with policy reheating (TS-OPSD).

    sample : params, prompts -> Rollout      judge : Rollout -> Batch      update : TrainState, Batch -> TrainState

The rooms, from the mathematics outwards:

    types                                    what flows through the loop; the glossary of axes and units
    losses  advantages  logit_stats  head    entropy, KLs and the clipped surrogate; the vocabulary, tile by tile
    objectives                               DAPO, the reheater, and those of one's own
    model  data  rewards                     what is given: a policy, problems, verifiers
    rollout  judge  learn                    the three verbs
    train                                    the loop: phases, steps, the trainer
    evaluation                               accuracy of a policy, tables of several
    distributed                              mesh, sharding, processes
    rundir  display                          what a run writes, and how it is shown
    config  plan  commands                   configurations, plans, the command line

Start with `help("tsopsd_jax.types")`, or with examples/one_page.py.
"""
