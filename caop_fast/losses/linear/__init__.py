"""The linear losses: from hidden states and output heads to losses and gradients, without ever holding the logits.

Public functions: ``distillation.py``, ``topk.py``, ``tokens.py``, ``confidence.py``; as modules: ``modules.py``. Below
them ``arguments.py`` checks what callers pass, ``dtensor.py`` and ``shards.py`` take distributed heads, ``call.py`` is
what the operators in ``ops/linear_*.py`` take, ``forward.py`` makes gradients in the forward, ``blocks.py`` is the two
ways through tokens and ids, ``head.py`` the GEMMs, ``sizes.py`` how much is taken at a time, ``selection.py`` rows of
weight 0, ``distill.py`` what is done to a block.
"""
