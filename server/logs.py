"""How the process logs: lines for people, or one JSON object a line."""

import logging

from pythonjsonlogger.json import JsonFormatter


def set_up_logging(level: str, log_format: str) -> None:
    """To standard error, in the format `text` or `json`. Called once, before anything logs."""
    handler = logging.StreamHandler()
    handler.setFormatter(formatter(log_format))
    logging.basicConfig(level=level.upper(), handlers=[handler])


def formatter(log_format: str) -> logging.Formatter:
    if log_format == "json":
        names = {"levelname": "level", "name": "logger"}
        return JsonFormatter("%(levelname)s %(name)s %(message)s", rename_fields=names, timestamp=True)
    return logging.Formatter("%(asctime)s %(levelname)-7s %(message)s", datefmt="%Y-%m-%d %H:%M:%S")
