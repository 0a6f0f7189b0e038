"""Five-field cron: what matches, what can't be meant, and the last firing."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from turnout.core import cron
from turnout.core.cron import Cron


def read(text: str) -> Cron:
    expression = cron.parse(text)
    assert isinstance(expression, Cron), expression
    return expression


@pytest.mark.parametrize(
    ("text", "at", "matches"),
    [
        ("* * * * *", "2026-11-28 12:34", True),
        ("45 8 * * *", "2026-11-28 08:45", True),
        ("45 8 * * *", "2026-11-28 08:46", False),
        ("45 8 * * *", "2026-11-28 20:45", False),
        ("*/15 * * * *", "2026-11-28 12:30", True),
        ("*/15 * * * *", "2026-11-28 12:31", False),
        ("5/20 * * * *", "2026-11-28 12:45", True),
        ("5/20 * * * *", "2026-11-28 12:00", False),
        ("0 9-17/4 * * *", "2026-11-28 13:00", True),
        ("0 9-17/4 * * *", "2026-11-28 14:00", False),
        ("0,30 9 * * *", "2026-11-28 09:30", True),
        ("0 8 * * mon-fri", "2026-11-27 08:00", True),  # a Friday
        ("0 8 * * mon-fri", "2026-11-28 08:00", False),  # a Saturday
        ("0 8 * * 0", "2026-11-29 08:00", True),
        ("0 8 * * 7", "2026-11-29 08:00", True),
        ("0 8 * * 5-7", "2026-11-29 08:00", True),
        ("0 8 * NOV *", "2026-11-28 08:00", True),
        ("0 8 * 12 *", "2026-11-28 08:00", False),
        ("0 8 29 2 *", "2028-02-29 08:00", True),
        ("0 8 13 * fri", "2026-11-27 08:00", True),  # day of month or day of week
        ("0 8 13 * fri", "2026-12-13 08:00", True),
        ("0 8 13 * fri", "2026-11-28 08:00", False),
        ("0 8 */2 * fri", "2026-11-27 08:00", True),  # a star: both must hold
        ("0 8 */2 * fri", "2026-12-04 08:00", False),
    ],
)
def test_an_expression_means_these_minutes(text: str, at: str, matches: bool) -> None:
    assert read(text).matches(datetime.fromisoformat(f"{at}+00:00")) is matches


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "has 0 fields"),
        ("* * * *", "has 4 fields"),
        ("@daily", "has 1 fields"),
        ("60 * * * *", "minute '60' can't be read: give *, a number from 0 to 59"),
        ("* 24 * * *", "hour '24'"),
        ("* * 0 * *", "day of month '0'"),
        ("* * * foo *", "month 'foo' can't be read: give *, a number from 1 to 12 or jan to dec"),
        ("* * * * 8", "day of week '8'"),
        ("*/0 * * * *", "minute '*/0'"),
        ("5-1 * * * *", "minute '5-1'"),
        ("1,,2 * * * *", "minute '1,,2'"),
        ("-1 * * * *", "minute '-1'"),
        ("1/ * * * *", "minute '1/'"),
        ("\u0661 * * * *", "minute '\u0661'"),
        ("0 0 31 2,4 *", "never comes"),
    ],
)
def test_what_can_not_be_meant_is_told_with_its_field(text: str, part: str) -> None:
    told = cron.parse(text)
    assert isinstance(told, str)
    assert part in told


def test_the_last_firing_counts_for_a_while() -> None:
    expression, now = read("45 8 * * *"), datetime(2026, 11, 28, 8, 52, 10, tzinfo=UTC)
    assert expression.last(now, timedelta(minutes=15)) == datetime(2026, 11, 28, 8, 45, tzinfo=UTC)
    assert expression.last(now, timedelta(minutes=7)) is None
    assert expression.last(now - timedelta(minutes=8), timedelta(minutes=15)) is None, "not before its minute"


@given(st.text())
def test_any_text_is_read_or_refused_with_a_reason(text: str) -> None:
    assert cron.parse(text)
