"""Logging of a process, set up once: text on a terminal, JSON lines else, always on stderr. Never prompt text."""

from __future__ import annotations

import logging
import sys

import structlog

LEVELS = ("debug", "info", "warning", "error")


def set_up(level: str = "info", **bound: str) -> None:
    """Configure structlog for this process.

    Args:
        level: one of ``LEVELS``.
        bound: stands in every line, e.g. ``process="gateway"``.
    """
    threshold = getattr(logging, level.upper())
    text = sys.stderr.isatty()
    renderer: structlog.types.Processor = (
        structlog.dev.ConsoleRenderer(pad_event_to=26, sort_keys=False) if text else structlog.processors.JSONRenderer()
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper("%H:%M:%S" if text else "iso", utc=not text),
            *(() if text else (structlog.processors.format_exc_info,)),
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(threshold),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )
    structlog.contextvars.bind_contextvars(**bound)
    logging.basicConfig(level=max(threshold, logging.WARNING), handlers=[_Forward()], force=True)


class _Forward(logging.Handler):
    """What libraries log goes the same way, from warnings on."""

    def emit(self, record: logging.LogRecord) -> None:
        structlog.get_logger().log(record.levelno, "library", of=record.name, said=record.getMessage())
