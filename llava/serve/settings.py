"""What whoever runs the server decides."""

import re
import ssl
from dataclasses import dataclass, field

from llava.errors import ConfigError
from llava.serve.access import Access
from llava.serve.limits import Limits


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Where a model is served, under which name, to whom and how much."""

    name: str  # of the model; adapters have their own
    access: Access
    limits: Limits = field(default_factory=Limits)
    port: int = 8000  # 0: any free port
    media_hosts: tuple[str, ...] = ()  # hosts from which pictures are fetched, over https
    otlp_endpoint: str | None = None  # of a collector for OpenTelemetry
    threads: int | None = None  # that compute on a CPU; None: one fewer than PyTorch would use
    page: bool = False  # show the chat page, which needs gradio
    log_prompts: bool = False  # log prompts and replies
    drain_s: float = 60.0  # seconds that running requests have to finish after SIGTERM
    certificate: str | None = None  # PEM files, for https
    private_key: str | None = None

    def __post_init__(self) -> None:
        for host in self.media_hosts:
            if not re.fullmatch(r"[A-Za-z0-9.-]+", host):
                raise ConfigError(f"--allow-media-host {host}: expected a host, such as pictures.example.org")
        if bool(self.certificate) != bool(self.private_key):
            raise ConfigError("https needs both a certificate and its key: set --certificate and --private-key")
        if self.certificate and self.private_key:
            _check_certificate(self.certificate, self.private_key)

    @property
    def scheme(self) -> str:
        """http or https."""
        return "https" if self.certificate else "http"


def _check_certificate(certificate: str, private_key: str) -> None:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, private_key)
    except OSError as error:  # ssl.SSLError is one
        is_ours = isinstance(error, ssl.SSLError) or not error.strerror
        reason = "they are not PEM files that belong together" if is_ours else error.strerror
        raise ConfigError(
            f"--certificate {certificate} --private-key {private_key}: cannot be used ({reason}); "
            "choose a certificate with its own key"
        ) from None
