"""Runs in processes of their own: every end but a good one is told in one line."""

import sys

import pytest

from benchmarks.process import RunFailed, last_error, run_process


def test_the_last_line_is_the_result() -> None:
    code = "import json, os; print('hello'); print(json.dumps({'threads': os.environ['OMP_NUM_THREADS']}))"
    assert run_process([sys.executable, "-c", code], threads=3, timeout=60) == {"threads": "3"}


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("raise ValueError('too\\nlong')", "ValueError: too"),
        ("import sys; sys.exit(3)", "exit code 3"),
        ("print('hello')", "gave no result, but: 'hello'"),
    ],
)
def test_a_process_that_fails_says_why_in_one_line(code: str, message: str) -> None:
    with pytest.raises(RunFailed, match=message):
        run_process([sys.executable, "-c", code], threads=1, timeout=60)


def test_a_process_that_takes_too_long_is_ended() -> None:
    with pytest.raises(RunFailed, match="--timeout 1"):
        run_process([sys.executable, "-c", "import time; time.sleep(60)"], threads=1, timeout=1)
    with pytest.raises(RunFailed, match="cannot be run"):
        run_process(["/nowhere/python"], threads=1, timeout=1)


def test_the_last_exception_is_the_error() -> None:
    assert last_error("Traceback\n  File\nRuntimeError: no memory\nwarning: something\n") == "RuntimeError: no memory"
    assert last_error("just\nlines\n") == "lines"
    assert last_error("") == ""
