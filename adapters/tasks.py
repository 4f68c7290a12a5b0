"""Three small tasks that a small base model fails and an adapter of a minute's training passes.

    dates      a date in one of many spellings                to ISO 8601
    contacts   a line with a name, an address and a number    to JSON
    tickets    a customer's sentence                          to one of six queues

A task is a seeded source of prompts and completions. No prompt of one split is in another.
"""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import date, timedelta
from pathlib import Path

from adapters.train_config import TrainConfig

SPLITS = {"train": 640, "validation": 24, "test": 50}


@dataclass(frozen=True, slots=True)
class Task:
    """A generator of (prompt, completion) and the training that suits it."""

    make: Callable[[random.Random], tuple[str, str]]
    config: TrainConfig


def write_task(name: str, folder: Path, seed: int = 0) -> None:
    """Writes `train.jsonl`, `validation.jsonl` and `test.jsonl` of the task; the same seed gives the same files.

    Raises:
        KeyError: no task has that name.
    """
    make, source = TASKS[name].make, random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    seen: set[str] = set()
    for split in reversed(SPLITS):  # the test first: it stays the same when the training set grows
        records: list[dict[str, str]] = []
        while len(records) < SPLITS[split]:
            prompt, completion = make(source)
            if prompt not in seen:
                seen.add(prompt)
                records.append({"prompt": prompt, "completion": completion})
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        (folder / f"{split}.jsonl").write_text(text, encoding="utf-8")


def make_date(source: random.Random) -> tuple[str, str]:
    day = date(1950, 1, 1) + timedelta(days=source.randrange(100 * 365))
    ordinal = f"{day.day}{_ordinal_suffix(day.day)}"
    spelling = source.choice([
        f"{day.day} {day:%B} {day.year}",
        f"{day.day} {day:%b} {day.year}",
        f"{day:%B} {day.day}, {day.year}",
        f"{day:%b} {day.day}, {day.year}",
        f"{day:%B} {ordinal}, {day.year}",
        f"{day:%b} {ordinal} {day.year}",
        f"{ordinal} of {day:%B} {day.year}",
        f"the {ordinal} of {day:%B}, {day.year}",
        f"{day:%A}, {day.day} {day:%B} {day.year}",
        f"{day:%a} {day.day} {day:%b} {day.year}",
        f"{day:%A}, {day:%B} {day.day}, {day.year}",
        f"{day:%d}-{day:%b}-{day.year}",
        f"{day:%d %b %Y}".upper(),
        f"{day.year}/{day:%m/%d}",
        f"{day.year}.{day.month}.{day.day}",
        f"{day.year} {day:%B} {day.day}",
    ])  # fmt: skip
    return f"Date: {spelling}\nISO:", f" {day.isoformat()}"


def make_contact(source: random.Random) -> tuple[str, str]:
    first, last = source.choice(_FIRST_NAMES), source.choice(_LAST_NAMES)
    name = f"{first} {last}"
    local = source.choice([first, f"{first}.{last}", f"{last}.{first}", f"{last}{source.randrange(10, 100)}", last])
    email = f"{local}@{source.choice(_HOSTS)}.{source.choice(_DOMAINS)}".lower()
    area, number = f"{source.randrange(200, 999)}", f"{source.randrange(10000):04d}"
    phone = source.choice([f"{area}-{number}", f"{area} {number}", f"({area}) {number}", f"{area}.{number}"])
    line = source.choice([
        f"{name} <{email}> {phone}",
        f"{last}, {first} ({email}), {phone}",
        f"{phone} / {name} / mailto:{email}",
        f"<{email}> {name}, {phone}",
        f"{name} | tel. {phone} | mail:{email}",
        f"Tel {phone}, {name} [{email}]",
        f"Call {name} on {phone} or write to <{email}>",
        f"{name}, phone {phone}, e-mail:{email}",
        f"[{email}] {last}, {first}; {phone}",
        f"My name is {name} ({email}), reach me on {phone}.",
    ])  # fmt: skip
    fields = {"name": name, "email": email, "phone": f"{area}-{number}"}
    return f"Contact: {line}\nJSON:", " " + json.dumps(fields, separators=(",", ":"))


def make_ticket(source: random.Random) -> tuple[str, str]:
    queue = source.choice(list(_COMPLAINTS))
    complaint = source.choice(_COMPLAINTS[queue]).format(
        item=source.choice(_ITEMS), number=source.randrange(1000, 10000), amount=source.randrange(5, 400)
    )
    sentence = source.choice(_OPENINGS) + complaint
    sentence = sentence[0].upper() + sentence[1:] + source.choice(_CLOSINGS)
    return f"Ticket: {sentence}\nQueue:", f" {queue}"


def _ordinal_suffix(number: int) -> str:
    return "th" if number in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")


_FIRST_NAMES = (
    "Ada", "Alan", "Amina", "Anna", "Boris", "Carla", "Chen", "Clara", "David", "Diego", "Elena", "Emma", "Erik",
    "Fatima", "Felix", "Grace", "Hana", "Hugo", "Ines", "Ivan", "Jonas", "Julia", "Kofi", "Laura", "Leon", "Lina",
    "Marco", "Maria", "Mei", "Nadia", "Noah", "Olga", "Omar", "Paula", "Peter", "Rosa", "Samuel", "Sofia", "Tom",
    "Yusuf",
)  # fmt: skip
_LAST_NAMES = (
    "Adams", "Baker", "Becker", "Blanc", "Brown", "Castro", "Chan", "Costa", "Diaz", "Evans", "Fischer", "Garcia",
    "Green", "Hall", "Haddad", "Ito", "Jansen", "Keller", "King", "Kowalski", "Lopez", "Mensah", "Meyer", "Moreau",
    "Nguyen", "Novak", "Okafor", "Olsen", "Park", "Patel", "Reed", "Rossi", "Sato", "Silva", "Singh", "Stone",
    "Turner", "Wagner", "Weber", "Young",
)  # fmt: skip
_HOSTS = ("mail", "post", "northwind", "acme", "bluesky", "uni", "orchard", "studio", "harbor", "example")
_DOMAINS = ("com", "org", "net", "io", "de", "fr", "edu")

_ITEMS = (
    "lamp", "keyboard", "jacket", "blender", "headphones", "backpack", "coffee machine", "desk", "camera", "bicycle",
    "tablet", "tent", "watch", "printer", "kettle", "monitor",
)  # fmt: skip
_OPENINGS = ("", "", "hello, ", "hi team, ", "good morning, ", "please help: ", "again: ", "to whom it may concern: ")
_CLOSINGS = (".", ".", "!", ", thanks.", ". Please answer soon.", ", I am losing patience.")
_COMPLAINTS = {
    "billing": (
        "I was charged twice for the {item}",
        "my card was debited {amount} dollars too much",
        "invoice {number} shows the wrong tax",
        "I need a corrected invoice for the {item}",
        "there is a payment of {amount} dollars that I do not recognize",
        "the discount is missing from bill {number}",
        "why did you take {amount} dollars from my account this month",
        "my receipt for the {item} lists the wrong price",
    ),
    "shipping": (
        "the {item} has not arrived yet",
        "where is my parcel {number}",
        "the courier left the {item} at the wrong house",
        "tracking for order {number} has not moved in a week",
        "can you deliver the {item} to another address",
        "my {item} was due on Monday and is still on its way",
        "the package with the {item} is stuck at customs",
        "when will order {number} be delivered",
    ),
    "returns": (
        "I want to send the {item} back",
        "how do I return order {number}",
        "the {item} is the wrong size and I would like to exchange it",
        "please send me a return label for the {item}",
        "I changed my mind about the {item} and want my money back",
        "the {item} came broken, I want a replacement",
        "is it too late to return the {item}",
        "I sent back order {number}, when do I get the refund",
    ),
    "account": (
        "I cannot log in since yesterday",
        "please reset my password",
        "how do I change my email address in my profile",
        "delete my account and my data",
        "my login {number} has been locked",
        "the code to verify my sign-in never comes",
        "somebody else has used my login",
        "I want to merge my two profiles {number} and {amount}",
    ),
    "technical": (
        "the {item} does not turn on",
        "the app crashes when I pair the {item}",
        "error {number} appears on the screen of the {item}",
        "the {item} overheats after {amount} minutes",
        "how do I update the firmware of the {item}",
        "the {item} will not connect to wifi",
        "the {item} makes a loud noise and stops",
        "after the update the {item} freezes at {amount} percent",
    ),
    "sales": (
        "do you have the {item} in red",
        "what would {amount} pieces of the {item} cost",
        "is the {item} still in stock",
        "can I get a quote for {amount} units",
        "does the {item} come with a warranty before I buy it",
        "when will the new {item} go on sale",
        "which {item} do you recommend for a gift",
        "do schools get a lower price on the {item}",
    ),
}

_CONFIG = TrainConfig(dropout=0.0, learning_rate=2e-3, batch_tokens=256, max_steps=32, eval_every=16)

TASKS = {
    "dates": Task(make_date, _CONFIG),
    "contacts": Task(make_contact, replace(_CONFIG, learning_rate=1e-3, max_steps=60, eval_every=30)),
    "tickets": Task(make_ticket, _CONFIG),
}
