"""The HTTP client that asks vLLM servers: one per process, and a connection for each request."""

from functools import lru_cache

import httpx2


@lru_cache(maxsize=1)
def http_client() -> httpx2.Client:
    """The client; made once, since loading the certificates takes 50 ms. Connections are not kept: a server may end,
    and another one start at its port. A proxy in the environment is for the way out of a cluster: it does not reach a
    server on this machine, and one of an unknown kind would be an error here."""
    limits = httpx2.Limits(max_keepalive_connections=0)
    trusted = httpx2.create_ssl_context()  # of the environment (SSL_CERT_FILE), which `trust_env` leaves out
    return httpx2.Client(verify=trusted, limits=limits, follow_redirects=True, trust_env=False)
