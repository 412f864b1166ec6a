"""Checks cron expressions: those that cron, Cloud Scheduler, Airflow and Kubernetes all take, and read the same."""

import calendar
import re

_FIELDS = (
    ("minute", 0, 59),
    ("hour", 0, 23),
    ("day of the month", 1, 31),
    ("month", 1, 12),
    ("day of the week", 0, 6),
)
"""Name, lowest and highest value. Kubernetes has no day 7: Sunday is 0 everywhere."""

_PART = re.compile(r"(?P<range>\*|(?P<first>\d{1,2})(-(?P<last>\d{1,2}))?)(/(?P<step>\d{1,2}))?", re.ASCII)


def check_cron(expression: str) -> None:
    """Checks a cron expression of five fields of numbers: `*`, `5`, `1-5`, `*/10`, `0-30/10`, and lists of them.

    Args:
      expression: minute, hour, day of the month, month, day of the week (0 is Sunday).

    Raises:
      ValueError: it is none, never comes true, or the schedulers disagree on it; the message names the field.
    """
    fields = expression.split()
    if len(fields) != len(_FIELDS):
        raise ValueError(
            f"{expression!r} has {len(fields)} fields, not 5: minute, hour, day of the month, month, day of the week; "
            "'15 3 * * *' is every day at 3:15"
        )
    values = [_values(field, *bounds) for field, bounds in zip(fields, _FIELDS, strict=True)]
    month_day, week_day = fields[2], fields[4]
    if "*" not in (month_day, week_day):
        if "*" in month_day or "*" in week_day:
            raise ValueError(
                f"{expression!r}: schedulers disagree whether the day must fit {month_day!r} and {week_day!r} or one "
                "of them: write one of the two fields as *"
            )
        return  # One of both is enough, so that some day of the week always fits.
    days, months = values[2], values[3]
    if week_day == "*" and all(min(days) > calendar.monthrange(2024, month)[1] for month in months):
        raise ValueError(f"{expression!r} never comes true: no such month has a day {min(days)}")


def _values(field: str, name: str, lowest: int, highest: int) -> set[int]:
    """Returns the values that a field allows."""
    values: set[int] = set()
    for part in field.split(","):
        match = _PART.fullmatch(part)
        if part == "*" != field:
            raise ValueError(f"{field!r}: write * alone, as it holds every {name}")
        if match is None or (match["step"] and match["range"] != "*" and match["last"] is None):
            raise ValueError(
                f"{part!r} is no {name}: write numbers from {lowest} to {highest}, as *, 5, 1-5, */10 or 0-30/10, or "
                "a list of these with commas and no spaces"
            )
        first = lowest if match["first"] is None else int(match["first"])
        last = highest if match["range"] == "*" else int(match["last"] or first)
        step = int(match["step"] or 1)
        if not lowest <= first <= last <= highest:
            remedy = "; Sunday is 0" if name == "day of the week" and last == 7 else ""
            raise ValueError(f"{part!r} is no {name}: it goes from {lowest} to {highest}{remedy}")
        if not 1 <= step <= highest:
            raise ValueError(f"{part!r} is no {name}: a step goes from 1 to {highest}")
        values.update(range(first, last + 1, step))
    return values
