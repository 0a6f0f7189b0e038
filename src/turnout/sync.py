"""The client for programs without asyncio: the same classes, whose methods wait."""

from turnout.workers.waiting import (
    Client,
    DynamicModelRegistry,
    HealthMonitor,
    ModelSwitcher,
    ModelVersionManager,
    SwitchOperation,
    connect,
)

__all__ = [
    "Client",
    "DynamicModelRegistry",
    "HealthMonitor",
    "ModelSwitcher",
    "ModelVersionManager",
    "SwitchOperation",
    "connect",
]
