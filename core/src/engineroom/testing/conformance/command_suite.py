"""The suite that :func:`engineroom.testing.conformance.runner.run_suite` runs; not for import."""

from __future__ import annotations

import dataclasses

import pytest

from engineroom.config.model import ModelConfig
from engineroom.handlers.base import InferenceHandler
from engineroom.testing.conformance.kit import Settings
from engineroom.testing.conformance.runner import Job, current_job
from engineroom.testing.conformance.suite import HandlerConformance

__all__ = ["TestHandler"]


class TestHandler(HandlerConformance):
    """The kit over the handler and the model of the job at hand."""

    @property
    def _job(self) -> Job:
        return current_job()

    @pytest.fixture
    def model_config(self) -> ModelConfig:
        """The job's model."""
        return self._job.model_config

    def make_handler(self) -> InferenceHandler:
        """The job's handler."""
        return self._job.make_handler()

    def settings(self) -> Settings:
        """The kit's own, with what the job changes."""
        return dataclasses.replace(super().settings(), **self._job.settings)
