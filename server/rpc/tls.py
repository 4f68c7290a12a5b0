"""TLS for the listener. Certificates are read again when their files change: a renewal needs no restart."""

import logging
from pathlib import Path

import grpc

from server.config import ServerConfig
from server.errors import ConfigError

log = logging.getLogger(__name__)


def server_credentials(config: ServerConfig) -> grpc.ServerCredentials:
    """Credentials from the files of --tls-cert and --tls-key; with --tls-client-ca clients must show a certificate.

    Raises:
        ConfigError: a file cannot be read.
    """
    flags = {"--tls-cert": config.tls_cert, "--tls-key": config.tls_key, "--tls-client-ca": config.tls_client_ca}
    files = _CertificateFiles({flag: Path(path) for flag, path in flags.items() if path})
    return grpc.dynamic_ssl_server_credentials(
        files.read(),
        files.changed,  # type: ignore[arg-type]  # the stubs do not know None, which stands for "as before"
        require_client_authentication=bool(config.tls_client_ca),
    )


class _CertificateFiles:
    """Knows which state of the files is in use. `changed` runs in a thread of gRPC, at each handshake."""

    def __init__(self, paths: dict[str, Path]) -> None:
        self._paths = paths
        self._times: list[int] = []

    def read(self) -> grpc.ServerCertificateConfiguration:
        """Raises ConfigError if a file cannot be read."""
        contents = {}
        times = []
        for flag, path in self._paths.items():
            try:
                times.append(path.stat().st_mtime_ns)
                contents[flag] = path.read_bytes()
            except OSError as error:
                raise ConfigError(f"{flag} {path}: {error.strerror}") from error
        self._times = times
        return grpc.ssl_server_certificate_configuration(
            [(contents["--tls-key"], contents["--tls-cert"])], contents.get("--tls-client-ca")
        )

    def changed(self) -> grpc.ServerCertificateConfiguration | None:
        """The new certificates, if there are some and they can be read; else those in use stay."""
        try:
            if [path.stat().st_mtime_ns for path in self._paths.values()] == self._times:
                return None
            configuration = self.read()
        except (OSError, ConfigError) as error:
            log.warning("certificates stay as they are: %s", error)
            return None
        log.info("certificates read again")
        return configuration
