"""How a request may use the prefix cache: the salt of its API key, and the field `cache`."""

from __future__ import annotations

from jamba_server.engine.types import CacheUse
from jamba_server.server.config import ServerConfig
from jamba_server.server.http.schemas.base import GenerationBody


def cache_use(body: GenerationBody) -> CacheUse:
    """Returns what the engine needs of the field `cache`. A request that pins its prefix is explained, too, so that the
    reply says whether the prefix was pinned."""
    cache = body.cache
    if cache is None:
        return CacheUse()
    return CacheUse(
        read=cache.read, write=cache.write, pin_seconds=cache.pin or 0.0, explain=cache.explain or bool(cache.pin)
    )


def cache_salt(salt: str | None, tenant: str, config: ServerConfig) -> str:
    """Returns the salt under which the engine finds prefixes. Unless the server runs with `--share-prefix-cache`, it
    has the owner of the API key, so that nobody can find out from the time of a reply what owners of other keys have
    sent. The name of an owner has no character NUL, so two different pairs of owner and salt give different salts."""
    return f"{tenant}\0{salt or ''}" if tenant and not config.share_prefix_cache else salt or ""
