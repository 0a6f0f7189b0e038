"""``turnout demo``: runs workers/demo.py and shows what it measured, what the log says, and what to try next."""

from __future__ import annotations

#: Flags that make the demo's real engine small enough for any machine.
_VLLM_ARGS = ("--enforce-eager", "--max-model-len=1024")
