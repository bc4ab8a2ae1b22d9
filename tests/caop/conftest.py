from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerFast

from helpers.small_tokenizers import BUILDERS, word_level


@pytest.fixture(scope="session")
def tokenizers() -> dict[str, PreTrainedTokenizerFast]:
    return {name: build() for name, build in BUILDERS.items()}


@pytest.fixture(scope="session")
def words() -> PreTrainedTokenizerFast:
    return word_level()
