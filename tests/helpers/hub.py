"""The environment of a Hub on loopback."""

from __future__ import annotations

import os

from tests.helpers.hub_server import TOKEN, HubServer


def environment(hub: HubServer, home, **extra: str) -> dict[str, str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    clean["HF_HUB_OFFLINE"] = "0"  # or `tests` sets it as forks import it
    return {**clean, "HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HOME": str(home), "OMP_NUM_THREADS": "1", **extra}
