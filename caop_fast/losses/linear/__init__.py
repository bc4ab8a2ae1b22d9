"""The linear losses: from hidden states and output heads to losses and gradients, without ever holding the logits.

Each public function is in one file with its operator: ``distillation.py``, ``distillation_rows.py``, ``topk.py``,
``tokens.py``, ``confidence.py``; as modules: ``modules.py``. Below them ``config.py`` checks what callers pass and has
what operators take, ``gradients.py`` computes gradients in the forward pass or from upstream gradients, ``chunking.py``
goes through tokens and ids, ``lm_head.py`` has the GEMMs, ``distributed.py`` sharded vocabularies and FSDP2's heads.
"""
