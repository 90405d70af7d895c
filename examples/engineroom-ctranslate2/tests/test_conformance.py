"""engineroom's own suite for handlers."""

from __future__ import annotations

from pathlib import Path

import pytest

from engineroom import ModelConfig
from engineroom.testing import HandlerConformance
from engineroom_ctranslate2 import CTranslate2Handler


class TestCTranslate2(HandlerConformance):
    handler_class = CTranslate2Handler
    runtime_modules = ("ctranslate2", "tokenizers", "jinja2")

    @pytest.fixture(scope="class")
    def model_config(self, tiny_model: Path) -> ModelConfig:
        return ModelConfig(
            model_id="tiny", source=str(tiny_model), options={"n_threads": 1, "n_parallel": 2}
        )
