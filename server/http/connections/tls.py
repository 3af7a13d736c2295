"""Makes the TLS context of the server from its certificate and its private key."""

from __future__ import annotations

import ssl

from jamba_server.engine.errors import ConfigError
from jamba_server.server.config import ServerConfig


def tls_context(config: ServerConfig) -> ssl.SSLContext | None:
    """Returns the context for connections with TLS, or None if the server has no certificate.

    Raises ConfigError if the certificate or the key cannot be read, or if they do not belong together.
    """
    if config.ssl_certfile is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # With an empty password, an encrypted key is an error. Without a password, OpenSSL would ask on the terminal.
        context.load_cert_chain(config.ssl_certfile, config.ssl_keyfile, password="")
    except OSError as error:  # this clause also catches ssl.SSLError, which is a subclass of OSError
        raise ConfigError(f"ssl_keyfile and ssl_certfile cannot be used: {error}.") from error
    return context
