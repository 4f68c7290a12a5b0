"""TLS for the listener. Certificates are read again when their files change: a renewal needs no restart."""

import logging
import ssl
from pathlib import Path

import grpc

from server.config import ServerConfig
from server.errors import ConfigError

log = logging.getLogger(__name__)


def server_credentials(config: ServerConfig) -> grpc.ServerCredentials:
    """Credentials from the files of --tls-cert and --tls-key; with --tls-client-ca clients must show a certificate.

    Raises:
        ConfigError: a file cannot be read or used.
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
        """Raises ConfigError if a file cannot be read or used."""
        contents = {}
        times = []
        for flag, path in self._paths.items():
            try:
                times.append(path.stat().st_mtime_ns)
                contents[flag] = path.read_bytes()
            except OSError as error:
                raise ConfigError(f"{flag} {path}: {error.strerror}") from error
        self._try()
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

    def _try(self) -> None:
        """gRPC would not say what is wrong with the files; the standard library does."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            context.load_cert_chain(self._paths["--tls-cert"], self._paths["--tls-key"], password="")
            if "--tls-client-ca" in self._paths:
                context.load_verify_locations(self._paths["--tls-client-ca"])
        except OSError as error:  # ssl.SSLError is one
            named = ", ".join(f"{flag} {path}" for flag, path in self._paths.items())
            raise ConfigError(f"{named}: not PEM, or not of one pair ({error})") from error
