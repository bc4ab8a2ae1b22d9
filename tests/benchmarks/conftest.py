"""What the benchmarks change in a process of their own is put back in this one."""

from __future__ import annotations

import pytest
import torch._dynamo


@pytest.fixture(autouse=True)
def compiler_as_it_was():
    """``run.fresh_compiler`` makes silent eager code an error."""
    config = torch._dynamo.config
    with config.patch(fail_on_recompile_limit_hit=config.fail_on_recompile_limit_hit):
        yield
