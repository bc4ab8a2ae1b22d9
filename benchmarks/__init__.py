"""Speed, memory and accuracy of caop_fast beside the code people use instead: same work, same inputs, same run.

See README.md. ``gpu`` is the command; ``cases`` and ``inputs`` say what is measured and what is right in float64,
``peers`` what is compared, ``measure`` how, ``run`` measures one implementation in a process of its own, ``step`` is a
whole training step, ``correctness`` runs the tests, ``records`` are the results and ``report`` shows them.
"""
