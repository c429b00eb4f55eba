"""The facts about a GPU that are part of a key."""

from __future__ import annotations

import re
from typing import Any

from attnrewrite.kernels.store.key import Device


def device_of(properties: Any) -> Device:
    """Return the device that ``torch.cuda.get_device_properties`` describes."""
    name = str(properties.name)
    mig = re.search(r"MIG (\S+)", name)
    shared = getattr(properties, "shared_memory_per_block_optin", 0) or properties.shared_memory_per_block
    return Device(name, properties.multi_processor_count, shared, properties.L2_cache_size, mig[1] if mig else "")
