"""How the process logs: lines for people, or one JSON object a line. Set up once, before anything logs."""

import logging

from pythonjsonlogger.json import JsonFormatter


def set_up_logging(level: str, log_format: str) -> None:
    """To standard error, in the format `text` or `json`."""
    handler = logging.StreamHandler()
    if log_format == "json":
        handler.setFormatter(
            JsonFormatter(
                "%(levelname)s %(name)s %(message)s",
                rename_fields={"levelname": "level", "name": "logger"},
                timestamp=True,
            )
        )
    else:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(message)s", datefmt="%Y-%m-%d %H:%M:%S"))
    logging.basicConfig(level=level.upper(), handlers=[handler])
