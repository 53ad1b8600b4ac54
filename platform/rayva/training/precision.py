"""Chooses the precision that a device computes natively."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from rayva.recipes.schema import Precision

_CPU_INFO = Path("/proc/cpuinfo")
_BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}
"""CPU flags of native bfloat16 products: x86's AVX-512 and AMX, and Arm's."""


def resolve_precision(wanted: Precision, device: torch.device) -> tuple[torch.dtype, str]:
    """The dtype to train in, and why; `auto` takes bf16 only where every rank's device is fast at it."""
    if wanted != "auto":
        return (torch.bfloat16 if wanted == "bfloat16" else torch.float32), "the recipe says so"
    native, why = _native_bf16(device)
    if dist.is_initialized() and dist.get_world_size() > 1:
        agreed = torch.tensor([int(native)], device=device)
        dist.all_reduce(agreed, op=dist.ReduceOp.MIN)
        if native and not agreed.item():
            native, why = False, "another worker's device does not compute bf16 natively"
    return (torch.bfloat16 if native else torch.float32), why


def _native_bf16(device: torch.device) -> tuple[bool, str]:
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return major >= 8, f"the GPU has compute capability {major}.{minor}"
    flags = cpu_flags() & _BF16_FLAGS
    if flags:
        return True, f"the CPU has {', '.join(sorted(flags))}"
    return False, "the CPU has no native bf16 products"


def cpu_flags() -> set[str]:
    """Feature flags of the first CPU; empty where the system does not tell."""
    if not _CPU_INFO.exists():
        return set()
    for line in _CPU_INFO.read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip().lower() in {"flags", "features"}:
            return set(value.split())
    return set()
