"""Int8 linear maps whose every row is computed by itself, so that a node of a tree gets what its token gets alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from medusa.kernels.build import load_kernels


class Int8Linear(nn.Module):
    """A frozen linear map with int8 weights, one scale for each output, and inputs rounded to int8, one scale for each token.

    Products of integers are summed without rounding, and a token's scale depends on that token alone: results are the same
    bit for bit for one token and for many. On a CPU.
    """

    weight: Tensor  # (N, K) int8
    scale: Tensor  # (N,) float32
    offset: Tensor  # (N,) int32: what inputs shifted by 128 add to the products
    bias: Tensor | None  # (N,) float32

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self._kernel = load_kernels()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach().float()
        scale = (weight.abs().amax(1) / 127).clamp(min=torch.finfo(torch.float32).tiny)
        rounded = (weight / scale[:, None]).round().to(torch.int8)
        self.register_buffer("weight", rounded)
        self.register_buffer("scale", scale)
        self.register_buffer("offset", 128 * rounded.sum(1, dtype=torch.int32))
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().float())

    def forward(self, x: Tensor) -> Tensor:  # (..., K) bfloat16 or float32 to (..., N)
        biases = [] if self.bias is None else [self.bias]
        if self._kernel:
            return torch.ops.medusa.linear_int8(x, [self.weight], [self.scale], [self.offset], biases)[0]
        most = x.float().abs().amax(-1, keepdim=True)
        inverse = torch.where(most > 0, most.new_tensor(127.0) / most, 0)
        rounded = (x.float() * inverse).round().to(torch.int8)
        sums = torch._int_mm(rounded.flatten(0, -2), self.weight.T).view(*x.shape[:-1], -1)
        result = sums.float() * self.scale * (most / 127)
        return (result if self.bias is None else result + self.bias).to(x.dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def quantize_int8(model: nn.Module) -> None:
    """Replace the linear maps of a model's decoder by `Int8Linear`, in place. The LM head, which heads may share, is kept."""
    lm_head = model.get_output_embeddings()  # type: ignore[operator]
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear and child is not lm_head:
                setattr(module, name, Int8Linear(child))
