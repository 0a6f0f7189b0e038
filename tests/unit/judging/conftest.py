"""A gateway that samples two versions, for tests of the judge. Time is simulated: a quarter of a second a window."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec

from turnout.core.judging.judge import Judge, Question
from turnout.core.judging.judgement import JudgeSettings
from turnout.events.health import HealthSampled, bin_of

START = datetime(2026, 1, 1, tzinfo=UTC)
SETTINGS = JudgeSettings(error_ceiling=0.05, latency_ceiling_ms=5000.0)
