"""Placement: the device, dtype and matrix a module computes with, even if it is offloaded, packed, sharded or wrapped."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TypeGuard

import torch
from torch import Tensor, nn

from medusa.errors import UnsupportedBackbone

ROWS = 256  # rows of the identity matrix multiplied at a time


def device_of(module: nn.Module) -> torch.device:
    """The device on which a module computes: that of its weights, or the one to which accelerate moves them for a call."""
    hook = getattr(module, "_hf_hook", None)
    for part in getattr(hook, "hooks", (hook,)):
        if (device := getattr(part, "execution_device", None)) is not None:
            return torch.device(device)
    tensors = (*module.parameters(), *module.buffers())
    return next((tensor.device for tensor in tensors if not tensor.is_meta), torch.device("cpu"))


def weights_of(module: nn.Module) -> AbstractContextManager:
    """Within the context, the module's own weights are on the device where it computes, even if they are offloaded."""
    from accelerate.utils import align_module_device  # slow to import, and not needed by commands without a model

    return align_module_device(module)


def is_offloaded(module: nn.Module) -> bool:
    """Whether some of a module's weights are elsewhere until the module is called."""
    return any(parameter.is_meta for parameter in module.parameters())


def is_plain(linear: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a linear map is torch's own module with a dense weight and bias in memory."""
    return type(linear) is nn.Linear and all(
        type(parameter.data) is Tensor and parameter.is_floating_point() and not parameter.is_meta
        for parameter in linear.parameters()
    )


def linear_sizes(
    linear: nn.Module,  # d -> V
    width: int | None = None,  # d, for a module without in_features
) -> tuple[int, int]:  # V, d
    """The output and input size of a linear map; UnsupportedBackbone if its input size is neither stated nor given."""
    width = getattr(linear, "in_features", width)
    if width is None:
        raise UnsupportedBackbone(
            f"the LM head is a {type(linear).__name__}, which does not state its input size (in_features)"
        )
    with torch.no_grad():
        return linear(torch.zeros(1, width, device=device_of(linear), dtype=dtype_of(linear))).shape[-1], width


@torch.no_grad()
def linear_map(
    linear: nn.Module,  # d -> V
) -> tuple[Tensor, Tensor | None]:  # (V, d), (V,)
    """The matrix and the bias, if any, that a linear map computes with, dense and on its device.

    Offloaded weights are loaded. A map that is quantised, sharded or wrapped in an adapter is applied to every unit vector,
    which is exact, since all other products are zero.
    """
    with weights_of(linear):
        if is_plain(linear):
            return linear.weight.detach(), None if linear.bias is None else linear.bias.detach()
    _, width = linear_sizes(linear)
    unit = torch.eye(width, device=device_of(linear), dtype=dtype_of(linear))
    offset = linear(torch.zeros_like(unit[:1]))[0]
    matrix = torch.cat([linear(rows) for rows in unit.split(ROWS)])
    if not offset.any():
        return matrix.T.contiguous(), None
    return (matrix - offset).T.contiguous(), offset


def dtype_of(module: nn.Module) -> torch.dtype:
    """The dtype of a module's input."""
    return next((p.dtype for p in module.parameters() if p.is_floating_point() and p.element_size() > 1), torch.float32)
