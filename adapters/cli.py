"""The command `train`. Its flags are the fields of `TrainConfig`; torch is loaded only when it runs."""

from collections.abc import Callable, Sequence
from dataclasses import Field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from adapters.train_config import TrainConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from adapters.train_job import StepReport, TrainJob

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_FOLDER = click.Path(file_okay=False, path_type=Path)


def train_command(resolve: Callable[[str], str] = str) -> click.Command:
    """Makes the command; `resolve` turns the value of `--model` into a folder or a hub name."""

    @click.command("train")
    @click.option("--model", required=True, help="Base model.")
    @click.option("--data", type=_FILE, required=True, multiple=True, help="JSON lines to train on.")
    @click.option("--out", type=_FOLDER, required=True, multiple=True, help="Folder of the adapter.")
    @click.option(
        "--eval-data", type=_FILE, multiple=True, help="JSON lines to evaluate on, in place of a share of the data."
    )
    @click.option(
        "--eval-share",
        type=click.FloatRange(0, 1, max_open=True),
        default=0.1,
        show_default=True,
        help="Share of the data kept for evaluation; 0: no evaluation.",
    )
    def command(
        model: str,
        data: tuple[Path, ...],
        out: tuple[Path, ...],
        eval_data: tuple[Path, ...],
        eval_share: float,
        **values: Any,
    ) -> None:
        """Train LoRA adapters on a frozen base model and write them in PEFT's format.

        With several --data, and as many --out, adapters are trained at once: where their batches are of like length
        they share the passes through the base. Each comes out as it would alone.
        """
        if len(set(out)) != len(data):
            raise click.UsageError(f"--data is given {len(data)} times: as many --out are needed, all different")
        if len(eval_data) not in (0, len(data)):
            raise click.UsageError(f"--data is given {len(data)} times, and --eval-data {len(eval_data)} times")
        base = resolve(model)
        from adapters.folder import check_writable
        from adapters.train_job import TrainingDiverged

        try:
            for folder in out:
                check_writable(folder)
            _train(base, model, data, out, eval_data, eval_share, TrainConfig(**values))
        except (OSError, ValueError, TrainingDiverged) as error:
            raise click.ClickException(str(error).partition("\n")[0]) from error

    hints = get_type_hints(TrainConfig, include_extras=True)
    command.params += [_option(item, *get_args(hints[item.name])) for item in fields(TrainConfig)]
    return command


def _train(
    base: str,
    base_name: str,
    data: Sequence[Path],
    out: Sequence[Path],
    eval_data: Sequence[Path],
    eval_share: float,
    config: TrainConfig,
) -> None:
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from adapters.base_fingerprint import base_fingerprint
    from adapters.lora import trainable_share
    from adapters.train import save_adapter, train_many

    transformers.utils.logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(base)
    jobs = [
        _job(tokenizer, file, eval_data[index] if eval_data else None, eval_share, config)
        for index, file in enumerate(data)
    ]
    cuda = torch.cuda.is_available()
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto" if cuda else torch.float32)
    if cuda:
        model.to("cuda")  # type: ignore[arg-type]  # transformers types it without self
    fingerprint = base_fingerprint(model)

    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
    names = [f"{folder}: " if len(out) > 1 else "" for folder in out]
    with _progress(console) as bar:
        tasks = [bar.add_task("training", total=None, loss="", eval_loss="", speed="") for _ in jobs]

        def show(index: int, report: "StepReport") -> None:
            if report.step == 1 and index == 0:
                trainable, total = trainable_share(model)
                console.print(f"trainable {trainable:,} of {total:,} parameters ({100 * trainable / total:.2f} %)")
            bar.update(
                tasks[index],
                total=report.num_steps,
                completed=report.step,
                loss=f"loss {report.loss:.4f}",
                speed=f"{report.num_tokens / report.seconds:,.0f} tokens/s",
            )
            if report.eval_loss is not None:
                bar.update(tasks[index], eval_loss=f"eval loss {report.eval_loss:.4f}")
                console.print(
                    f"{names[index]}step {report.step}: loss {report.loss:.4f}, eval loss {report.eval_loss:.4f}"
                )

        results = train_many(model, tokenizer, jobs, show)
    for folder, result in zip(out, results, strict=True):
        save_adapter(folder, model, result.layers, config, base_name, fingerprint)
        last = result.last
        console.print(
            f"{folder}: {last.step} steps, best at {result.best_step}, {last.num_tokens:,} tokens in "
            f"{last.seconds:.1f} s ({last.num_tokens / last.seconds:,.0f} tokens/s)"
        )


def _job(
    tokenizer: "PreTrainedTokenizerBase", data: Path, eval_data: Path | None, eval_share: float, config: TrainConfig
) -> "TrainJob":
    from adapters.data import read_examples, split_examples
    from adapters.train_job import TrainJob

    train_examples = read_examples(data, tokenizer, config.max_tokens)
    if eval_data:
        eval_examples = read_examples(eval_data, tokenizer, config.max_tokens)
    else:
        train_examples, eval_examples = split_examples(train_examples, eval_share, config.seed)
    return TrainJob(train_examples=train_examples, eval_examples=eval_examples, config=config, name=str(data))


def _progress(console: Console) -> Progress:
    texts = [TextColumn(f"{{task.fields[{name}]}}") for name in ("loss", "eval_loss", "speed")]
    columns = (BarColumn(), MofNCompleteColumn(), *texts, TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def _option(item: "Field[Any]", kind: Any, help: str) -> click.Option:
    flag = "--" + item.name.replace("_", "-")
    default: Any = item.default
    if kind is bool:
        return click.Option([f"{flag}/--no-{flag[2:]}"], default=default, show_default=True, help=help)
    if kind == tuple[str, ...]:
        names, help = ",".join(default), f"{help} Commas between."
        return click.Option([flag], default=names, show_default=True, help=help, callback=_split)
    return click.Option([flag], type=kind, default=default, show_default=True, help=help)


def _split(context: click.Context, parameter: click.Parameter, names: str) -> tuple[str, ...]:
    return tuple(names.split(","))
