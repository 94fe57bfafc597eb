"""Linear maps in 8 and 4 bits whose every row is computed by itself: a node of a tree gets what its token gets alone."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from medusa.kernels.build import load_kernels

GROUP = 32  # inputs that share a scale
BLOCK = 16  # outputs that the kernel computes at a time
ROWS = 256 * BLOCK  # outputs that are rounded at a time: an LM head in float32 would need several times the model's memory
LEAST = 2.0**-24  # the smallest number of float16


class QuantizedLinear(nn.Module):
    """A frozen linear map with rounded weights and inputs. On a CPU.

    A weight is a number of 8 or 4 bits times a scale plus a minimum, both float16, of its output and 32 inputs (GGUF's Q4_1):
    9 or 5 bits in all. Inputs are rounded to int8, with one scale for 32 of them. Products of integers are summed without
    rounding, and a token's scales depend on that token alone, so results are the same bit for bit for one token and for many.
    """

    weight: Tensor  # (N / 16, K / 32, 64 bits) uint8, in the kernel's order; N and K rounded up
    scale: Tensor  # (N / 16, K / 32, 2, 16) float16: scales, then minima
    bias: Tensor | None  # (N,) float32

    def __init__(self, linear: nn.Linear, bits: Literal[4, 8]):
        super().__init__()
        self._kernel = load_kernels()
        self.in_features, self.out_features, self.bits = linear.in_features, linear.out_features, bits
        parts = [_packed(rows, bits) for rows in linear.weight.detach().split(ROWS)]
        weight, scale = (torch.cat(part) for part in zip(*parts, strict=True))
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().float())

    def forward(self, x: Tensor) -> Tensor:  # (..., K) bfloat16 or float32 to (..., N)
        if self._kernel:
            biases = [] if self.bias is None else [self.bias]
            return torch.ops.medusa.linear_rounded(x, [self.weight], [self.scale], [self.out_features], biases)[0]
        result = self._without_kernel(x.float().flatten(0, -2)).view(*x.shape[:-1], -1)
        return (result if self.bias is None else result + self.bias).to(x.dtype)

    def _without_kernel(self, x: Tensor) -> Tensor:  # (M, K) to (M, N), without bias
        """The same, slowly: group by group, so that each row is summed in the same order however many there are."""
        fours = self.weight.unflatten(-1, (-1, BLOCK, 4))
        if self.bits == 4:
            fours = torch.cat([fours & 15, fours >> 4], 2)
        numbers = fours.permute(1, 0, 3, 2, 4).flatten(3).flatten(1, 2).float()  # (group, N, 32)
        scales = self.scale.float().permute(1, 2, 0, 3).flatten(2)  # (group, 2, N)
        result = x.new_zeros(len(x), scales.shape[2])
        for inputs, weights, (step, low) in zip(
            nn.functional.pad(x, (0, -self.in_features % GROUP)).split(GROUP, 1), numbers, scales, strict=True
        ):
            most = inputs.abs().amax(1, keepdim=True)
            rounded = (inputs * torch.where(most > 0, most.new_tensor(127.0) / most, 0)).round()
            products = (rounded @ weights.T) * step + rounded.sum(1, keepdim=True) * low
            result = result + products * (most / 127)
        return result[:, : self.out_features]

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, bits={self.bits}"
        )


def _packed(rows: Tensor, bits: Literal[4, 8]) -> tuple[Tensor, Tensor]:
    """The `weight` and `scale` of a `QuantizedLinear` for some of its outputs (n, K)."""
    weight = nn.functional.pad(rows.float()[None], (0, -rows.shape[1] % GROUP), mode="replicate")[0]
    weight = nn.functional.pad(weight, (0, 0, 0, -len(rows) % BLOCK))
    groups = weight.view(-1, BLOCK, weight.shape[1] // GROUP, GROUP)
    low, most = groups.amin(-1).half(), 2**bits - 1
    step = ((groups.amax(-1) - low.float()) / most).clamp(min=LEAST).half()
    numbers = ((groups - low.float()[..., None]) / step.float()[..., None]).round().clamp(0, most).to(torch.uint8)
    fours = numbers.unflatten(-1, (-1, 4)).permute(0, 2, 3, 1, 4)  # (block, group, four, output, input)
    if bits == 4:
        fours = fours[:, :, :4] | fours[:, :, 4:] << 4
    return fours.flatten(2), torch.stack([step, low], 2).permute(0, 3, 2, 1).contiguous()


class QuantizedHead(nn.Linear):
    """An LM head that makes its scores in int8. Its weight stays as it was, for heads and an embedding that share it."""

    def __init__(self, linear: nn.Linear):
        super().__init__(linear.in_features, linear.out_features, device="meta")
        self.weight, self.bias, self.rounded = linear.weight, linear.bias, QuantizedLinear(linear, 8)

    def forward(self, x: Tensor) -> Tensor:  # (..., d) to (..., V)
        return self.rounded(x)


def shared_map(lm_head: nn.Module) -> nn.Module:
    """What heads share of an LM head: all of it, or the map that a quantised one was made from."""
    return _linear(lm_head.weight, lm_head.bias) if isinstance(lm_head, QuantizedHead) else lm_head


def quantize_maps(model: nn.Module, bits: Literal[4, 8]) -> None:
    """Replace the linear maps of a model by `QuantizedLinear`, in place; the LM head is in 8 bits. Maps on the meta device
    become empty ones, to load quantised weights into."""
    lm_head = model.get_output_embeddings()  # type: ignore[operator]
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if child is lm_head:
                continue
            if type(child) is nn.Linear:
                setattr(module, name, QuantizedLinear(child, bits))
            elif type(child) is Conv1D:  # GPT-2's
                linear = _linear(child.weight.T, child.bias)  # type: ignore[operator, arg-type]
                setattr(module, name, QuantizedLinear(linear, bits))
    if type(lm_head) is nn.Linear:
        model.set_output_embeddings(QuantizedHead(lm_head))  # type: ignore[operator]


def _linear(weight: Tensor, bias: nn.Parameter | None) -> nn.Linear:  # (N, K), (N,)
    linear = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    linear.weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight, requires_grad=False)
    linear.register_parameter("bias", bias)
    return linear
