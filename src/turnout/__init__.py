"""turnout: switch the model behind a served name while requests are running.

The public names are imported when they are used, so that ``import turnout`` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from turnout.core.config import ModelSwitchingConfig
    from turnout.core.strategies import ABTestSwitch, CanarySwitch, GradualRollout, ImmediateSwitch, SwitchingStrategy
    from turnout.events.model import EngineSpec, Probe
    from turnout.events.store import Unavailable
    from turnout.workers.client import (
        Client,
        CommandRejected,
        DynamicModelRegistry,
        HealthMonitor,
        ModelSwitcher,
        ModelVersionManager,
        SwitchOperation,
        connect,
    )
    from turnout.workers.registry import BaseRegistry, find_engines

    __version__: str

__all__ = [
    "ABTestSwitch",
    "BaseRegistry",
    "CanarySwitch",
    "Client",
    "CommandRejected",
    "DynamicModelRegistry",
    "EngineSpec",
    "GradualRollout",
    "HealthMonitor",
    "ImmediateSwitch",
    "ModelSwitcher",
    "ModelSwitchingConfig",
    "ModelVersionManager",
    "Probe",
    "SwitchOperation",
    "SwitchingStrategy",
    "Unavailable",
    "__version__",
    "connect",
    "find_engines",
]

_HOMES = {
    "ModelSwitchingConfig": "core.config",
    "ABTestSwitch": "core.strategies",
    "CanarySwitch": "core.strategies",
    "GradualRollout": "core.strategies",
    "ImmediateSwitch": "core.strategies",
    "SwitchingStrategy": "core.strategies",
    "EngineSpec": "events.model",
    "Probe": "events.model",
    "Unavailable": "events.store",
    "BaseRegistry": "workers.registry",
    "find_engines": "workers.registry",
}


def __getattr__(name: str) -> object:
    if name == "__version__":
        from turnout.events.version import VERSION

        return VERSION
    if name not in __all__:
        raise AttributeError(f"module 'turnout' has no attribute {name!r}")
    return getattr(importlib.import_module(f"turnout.{_HOMES.get(name, 'workers.client')}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
