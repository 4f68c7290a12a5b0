"""Runs workloads on contenders in turn, each run in a fresh process, one at a time, and keeps what came out."""

import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import peers
from benchmarks.contenders import OWN, PEERS, Contender
from benchmarks.material import Material
from benchmarks.process import RunFailed, run_process
from benchmarks.workload import Workload
from server.errors import ConfigError

Tokens = list[list[int]]  # of every request

_PEERS_FOLDER = str(Path(peers.__file__).parent)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What holds for all runs."""

    prompt_tokens: int
    output_tokens: int
    threads: int
    timeout: int  # seconds of one run, its loading included


@dataclass(frozen=True, slots=True)
class Run:
    """One timed run."""

    contender: str
    workload: str
    round: int
    out_tok_s: float
    wall_s: float


@dataclass(slots=True)
class Results:
    """Everything that was measured until now, whole or not."""

    runs: list[Run] = field(default_factory=list)
    failures: dict[tuple[str, str], str] = field(default_factory=dict)  # (contender, workload) → its error
    outputs: dict[tuple[str, str], Tokens] = field(default_factory=dict)  # of the first run
    versions: dict[str, str] = field(default_factory=dict)  # by contender

    def median(self, contender: str, workload: Workload) -> float | None:
        """Median of tokens per second over the rounds; None if it never ran."""
        values = [run.out_tok_s for run in self.runs if (run.contender, run.workload) == (contender, str(workload))]
        return statistics.median(values) if values else None


class Comparison:
    """Owns the paths of the peers, the material and the results."""

    def __init__(self, material: Material, paths: Mapping[str, Path], settings: Settings) -> None:
        self.material = material
        self.results = Results()
        self._paths = paths
        self._settings = settings

    def run(
        self,
        workloads: Sequence[Workload],
        contenders: Sequence[Contender],
        rounds: int,
        progress: Callable[[str], None],
    ) -> Iterator[Results]:
        """Gives the results after every run. Who fails a workload is not asked for it again; the rest goes on."""
        for round_number, workload, contender in schedule(workloads, contenders, rounds):
            key = (contender.name, str(workload))
            if key in self.results.failures:
                continue
            try:
                version, wall, outputs = self._run_once(contender, workload)
            except (RunFailed, ConfigError) as error:
                self.results.failures[key] = str(error)
                progress(f"round {round_number}, {workload}: {contender.name} failed: {error}")
            else:
                rate = round(workload.num_requests * self._settings.output_tokens / wall, 2)
                self.results.runs.append(Run(*key, round_number, rate, round(wall, 3)))
                self.results.outputs.setdefault(key, outputs)
                self.results.versions[contender.name] = version
                progress(f"round {round_number}, {workload}: {contender.name} {rate:.1f} tokens/s")
            yield self.results

    def _run_once(self, contender: Contender, workload: Workload) -> tuple[str, float, Tokens]:
        """Versions, wall seconds and tokens of one run."""
        with tempfile.TemporaryDirectory() as scratch:
            if contender.program == OWN:
                return self._run_own(contender, workload, Path(scratch))
            return self._run_peer(contender, workload, Path(scratch))

    def _run_own(self, contender: Contender, workload: Workload, scratch: Path) -> tuple[str, float, Tokens]:
        settings, prompts, tokens = self._settings, scratch / "prompts.json", scratch / "tokens.json"
        choices = scratch / "choices.json"
        prompts.write_text(json.dumps(self.material.prompts(workload.num_requests, settings.prompt_tokens)))
        flags = {
            "model": self.material.model,
            "prompts-file": prompts,
            "tokens-file": tokens,
            "output-tokens": settings.output_tokens,
            "num-adapters": workload.num_adapters,
            "adapter-slots": max(1, workload.num_adapters),
            "max-num-seqs": workload.num_requests,
            "max-model-len": settings.prompt_tokens + settings.output_tokens,
            "threads": settings.threads,
            **contender.options,
        }
        if workload.num_adapters:
            flags["adapters-dir"] = self.material.adapters_dir(workload.ranks, workload.num_adapters)
            flags["choices-file"] = choices
            choices.write_text(json.dumps(workload.choices))
        command = [sys.executable, "-m", "server.cli", "bench", "throughput", "--device", "cpu", "--json"]
        command += [f"--{name}={value}" for name, value in flags.items()]
        command += ["--unused-adapters"] if workload.variant == "unused" else []
        result = run_process(command, threads=settings.threads, timeout=settings.timeout)
        version = f"loraplex {result['version']}, torch {result['torch']}"
        return version, result["wall_s"], json.loads(tokens.read_text())

    def _run_peer(self, contender: Contender, workload: Workload, scratch: Path) -> tuple[str, float, Tokens]:
        settings, path, job_file = self._settings, self._paths[contender.program], scratch / "job.json"
        model, adapters = self._files(contender, workload)
        job = {
            "model": str(model),
            "adapters": [str(adapter) for adapter in adapters],
            "choices": workload.choices,
            "prompts": self.material.prompts(workload.num_requests, settings.prompt_tokens),
            "output_tokens": settings.output_tokens,
            "threads": settings.threads,
            "options": {**contender.options, "server": str(path)},
        }
        job_file.write_text(json.dumps(job))
        python = sys.executable if contender.program == "llama.cpp" else str(path)
        name = PEERS[contender.program].identifier
        command = [python, "-I", "-B", _PEERS_FOLDER, name, str(job_file)]
        result = run_process(command, threads=settings.threads, timeout=settings.timeout)
        outputs: Tokens = result["outputs"]
        if {len(tokens) for tokens in outputs} != {settings.output_tokens}:
            raise RunFailed(f"a request ended before its {settings.output_tokens} tokens")
        return result["version"], result["wall_s"], outputs

    def _files(self, contender: Contender, workload: Workload) -> tuple[Path, list[Path]]:
        """The model and the adapters in the contender's format."""
        material, count = self.material, workload.num_adapters
        if contender.program == "llama.cpp":
            model = material.gguf_model(contender.options["quantization"])
            return model, material.gguf_adapters(workload.ranks, count)
        if contender.program == "openvino":
            model = material.openvino_model(self._paths["openvino"], contender.options["dtype"])
            return model, material.adapters(workload.ranks, count)
        return material.model, material.adapters(workload.ranks, count)


def schedule(
    workloads: Sequence[Workload], contenders: Sequence[Contender], rounds: int
) -> Iterator[tuple[int, Workload, Contender]]:
    """Every round runs each contender once per workload. Only Loraplex is asked for unused adapters."""
    for number in range(1, rounds + 1):
        for workload in workloads:
            for contender in contenders:
                if contender.program == OWN or workload.variant != "unused":
                    yield number, workload, contender
