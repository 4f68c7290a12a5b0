import json
import random
import re
from datetime import date
from pathlib import Path

import pytest

from adapters.tasks import SPLITS, TASKS, write_task


def read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("name", TASKS)
def test_splits_share_no_prompt(tmp_path: Path, name: str) -> None:
    write_task(name, tmp_path)
    prompts = []
    for split, count in SPLITS.items():
        records = read(tmp_path / f"{split}.jsonl")
        assert len(records) == count
        for record in records:
            assert record.keys() == {"prompt", "completion"}
            assert not record["prompt"].endswith(" ")
            assert record["completion"].startswith(" ")
            assert "\n" not in record["completion"]
        prompts += [record["prompt"] for record in records]
    assert len(set(prompts)) == len(prompts)


@pytest.mark.parametrize("name", TASKS)
def test_the_seed_decides_the_files(tmp_path: Path, name: str) -> None:
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_task(name, tmp_path / folder, seed)
    first, again, other = ((tmp_path / folder / "test.jsonl").read_bytes() for folder in "abc")
    assert first == again != other


def test_dates_say_the_day_that_they_mean() -> None:
    source = random.Random(0)
    for _ in range(200):
        prompt, completion = TASKS["dates"].make(source)
        day = date.fromisoformat(completion.strip())
        assert str(day.year) in prompt
        assert {str(day.day), f"{day.day:02d}"} & set(re.findall(r"\d+", prompt))


def test_contacts_hold_what_the_json_says() -> None:
    source = random.Random(0)
    for _ in range(200):
        prompt, completion = TASKS["contacts"].make(source)
        fields = json.loads(completion)
        assert list(fields) == ["name", "email", "phone"]
        assert all(word in prompt for word in fields["name"].split())
        assert fields["email"] in prompt
        assert re.search(fields["phone"].replace("-", r"\W+"), prompt)


def test_tickets_go_to_six_queues() -> None:
    source = random.Random(0)
    made = [TASKS["tickets"].make(source) for _ in range(500)]
    assert len({completion for _, completion in made}) == 6
    assert not any(re.search("[{}]", prompt) for prompt, _ in made)
