"""Every setting, once. Flags, environment variables and YAML keys all come from the fields of the classes here.

Precedence: flag, then environment (`LORAPLEX_…`), then the file of `--config`, then the default.
"""

from collections.abc import Callable
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import click
import yaml

from server.errors import ConfigError

Command = TypeVar("Command", bound=Callable[..., Any])


def setting(default: Any, text: str, *, choices: tuple[str, ...] = (), low: int | None = None) -> Any:
    """A field that is also a flag: its default, its help, and what values it takes."""
    return field(default=default, metadata={"help": text, "choices": choices, "low": low})


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """What the engine is made from."""

    model: str = setting("smollm2-135m", "Base model: a Hugging Face folder, a hub name, or a fetched embedded model.")
    device: str = setting("auto", "Device; auto takes CUDA when there is one.", choices=("auto", "cpu", "cuda"))
    dtype: str = setting("auto", "Number format of the weights.", choices=("auto", "float32", "bfloat16", "float16"))
    kernels: str = setting("auto", "Kernels; torch: the plain ones, everywhere.", choices=("auto", "torch"))
    cuda_graphs: bool = setting(True, "Replay decode steps as CUDA graphs (CUDA, Triton kernels).")
    quantization: str = setting("none", "Stores the base's linear layers in 8 bits (CPU).", choices=("none", "int8"))
    max_num_seqs: int = setting(64, "Most requests in one step.", low=1)
    max_num_batched_tokens: int = setting(2048, "Most tokens in one step; longer prompts run in chunks.", low=1)
    max_model_len: int = setting(0, "Most tokens of a request, prompt and output; 0: what the model allows.", low=0)
    block_size: int = setting(0, "Tokens per KV block; 0: chosen for the device.", low=0)
    prefix_cache: bool = setting(True, "Reuse the KV blocks of equal prompt beginnings on the same adapter.")
    kv_cache_bytes: int = setting(0, "Memory for the KV cache in bytes; 0: chosen for the device.", low=0)
    kv_cache_dtype: str = setting(
        "auto",
        "Number format of the KV cache (CPU); auto: that of --dtype.",
        choices=("auto", "float32", "bfloat16"),
    )
    adapter_slots: int = setting(32, "Adapters on the device at a time.", low=1)
    max_lora_rank: int = setting(64, "Largest rank of an adapter.", low=1)
    lora_dtype: str = setting(
        "auto",
        "Number format of adapters in memory; auto: as --dtype says, with float32 as they were saved (CPU).",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    merge_policy: str = setting(
        "manual",
        "Whether an adapter may be merged into the base's weights: on request, or as measured costs tell.",
        choices=("off", "manual", "auto"),
    )
    threads: int = setting(0, "Compute threads; 0: one per core.", low=0)

    def __post_init__(self) -> None:
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"--max-num-batched-tokens {self.max_num_batched_tokens} is less than --max-num-seqs "
                f"{self.max_num_seqs}: every running request needs one token a step"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """What `loraplex serve` is made from, beside the engine."""

    adapters_dir: Path = setting(Path("adapters-store"), "Folder of adapters: NAME/ or NAME/VERSION/ in PEFT's format.")
    listen: str = setting("127.0.0.1:50051", "Address of the gRPC server.")
    admin_listen: str = setting(
        "", "Address that serves the Adapters service beside all others; empty: --listen serves it too."
    )
    metrics_listen: str = setting("127.0.0.1:9090", "Address of the Prometheus endpoint; empty: none.")
    metrics_adapters: int = setting(20, "Adapters with metrics of their own; the others share 'other'.", low=0)
    otlp_endpoint: str = setting("", "Where OpenTelemetry traces go, as http://HOST:4317; empty: see OTEL_ variables.")
    adapter_host_bytes: int = setting(4 << 30, "Most host memory for adapters in bytes.", low=1)
    adapter_poll_seconds: int = setting(2, "How often the adapters folder is looked at for changes; 0: never.", low=0)
    max_upload_bytes: int = setting(2 << 30, "Largest adapter that UploadAdapter takes, in bytes.", low=1)
    upload_idle_seconds: int = setting(60, "How long UploadAdapter waits for the next message.", low=1)
    upload_seconds: int = setting(3600, "How long an upload may take until its last byte is here.", low=1)
    max_waiting: int = setting(1024, "Most requests in the queue; more are answered RESOURCE_EXHAUSTED.", low=0)
    max_message_bytes: int = setting(16 << 20, "Largest gRPC message in bytes.", low=1024)
    max_connection_age: int = setting(
        0, "Seconds until a connection takes no new calls, so that clients spread anew over replicas; 0: no end.", low=0
    )
    drain_seconds: int = setting(30, "How long SIGTERM waits for running requests.", low=0)
    reflection: bool = setting(True, "Serve gRPC reflection.")
    compression: str = setting("none", "Of answers, for clients that accept it.", choices=("none", "gzip"))
    tls_cert: str = setting("", "PEM file of the server's certificate chain; empty: no TLS.")
    tls_key: str = setting("", "PEM file of the certificate's private key.")
    tls_client_ca: str = setting("", "PEM file of the authorities that sign clients' certificates; empty: none needed.")
    log_level: str = setting("info", "What is logged.", choices=("debug", "info", "warning", "error"))
    log_format: str = setting("text", "Log lines for people, or JSON objects.", choices=("text", "json"))

    def __post_init__(self) -> None:
        if bool(self.tls_cert) != bool(self.tls_key):
            raise ConfigError("--tls-cert and --tls-key go together: one of them is not set")
        if self.tls_client_ca and not self.tls_cert:
            raise ConfigError("--tls-client-ca needs --tls-cert and --tls-key: without TLS nobody shows a certificate")


def options(*classes: type) -> Callable[[Command], Command]:
    """Decorates a click command with a flag for every field of the classes, and with `--config`."""

    def decorate(command: Command) -> Command:
        for cls in reversed(classes):
            hints = get_type_hints(cls)
            for item in reversed(fields(cls)):
                command = _option(item, hints[item.name])(command)
        return config_option("LORAPLEX_CONFIG")(command)

    return decorate


def config_option(envvar: str) -> Callable[[Command], Command]:
    """Decorates a click command with `--config`, a file that may hold every other flag of it."""
    return click.option(
        "--config",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        is_eager=True,
        expose_value=False,
        callback=_read_config_file,
        envvar=envvar,
        show_envvar=True,
        help="YAML file of settings, keys as the flags.",
    )


def yaml_key(option: click.Option) -> str:
    """Its name in such a file."""
    return max(option.opts, key=len).removeprefix("--")


def take(cls: type, values: dict[str, Any]) -> Any:
    """An instance of a settings class from the values of a command, which lose the ones that are used."""
    return cls(**{item.name: values.pop(item.name) for item in fields(cls)})


def _option(item: "Field[Any]", hint: Any) -> Callable[[Command], Command]:
    flag = "--" + item.name.replace("_", "-")
    metadata = item.metadata
    kind: Any = hint
    if metadata["choices"]:
        kind = click.Choice(metadata["choices"])
    elif metadata["low"] is not None:
        kind = click.IntRange(min=metadata["low"])
    elif hint is Path:
        kind = click.Path(path_type=Path)
    if hint is bool:
        flag, kind = f"{flag}/--no-{flag[2:]}", None
    return click.option(
        flag,
        type=kind,
        default=item.default,
        envvar=f"LORAPLEX_{item.name.upper()}",
        help=f"{metadata['help']} YAML key: {item.name.replace('_', '-')}.",
        show_default=True,
        show_envvar=True,
    )


def _read_config_file(context: click.Context, _: click.Parameter, path: Path | None) -> None:
    """Makes the file's values the command's defaults, below flags and environment."""
    if path is None:
        return
    known = {yaml_key(option): option for option in context.command.params if isinstance(option, click.Option)}
    values: dict[str, Any] = {}
    for key, value in _read_mapping(path).items():
        if not isinstance(key, str):
            raise click.BadParameter(f"{path}: {str(key)[:80]} is no name of a setting")
        option = known.get(key.replace("_", "-"))
        if option is None or option.name is None or option.is_eager:
            raise click.BadParameter(f"{path}: unknown setting {key[:80]!r}")
        items = value if option.multiple and isinstance(value, list) else [value]
        for item in items:
            if not isinstance(item, str | int | float):
                raise click.BadParameter(
                    f"{path}: {key} is of type {type(item).__name__}; it takes text, a number or a bool"
                )
        values[option.name] = items if option.multiple else value
    context.default_map = {**(context.default_map or {}), **values}


def _read_mapping(path: Path) -> dict[Any, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader)):
            raise click.BadParameter(f"{path} holds an alias; settings are written out")  # a few can be gigabytes
        values = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        raise click.BadParameter(f"cannot read {path}: {error}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date or a number that is none
        raise click.BadParameter(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict | None):
        raise click.BadParameter(f"{path} holds no mapping of settings")
    return values or {}
