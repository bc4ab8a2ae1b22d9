"""One step of on-policy distillation, whole and stage by stage: caop_fast beside the loop of the released trainer.

A step samples rollouts with ``generate``, runs the teacher on them after its longer prompt, runs the student, computes
the loss and its gradient, and takes a step of AdamW. Sampling and optimizer are the same for all; implementations
differ in what lies between. The stage "loss" contains the loss and the whole backward, that of the student too. Where a
loss takes logits, the projections belong to the forwards; where it takes hidden states, to the loss: only the sum of
the three stages is comparable. The models have published shapes and random weights; some cases have fewer layers.
"""
