"""Running the real code without its numbers: floats have shapes only, integers have values.

What decides shapes in this code base are integers: ids of experts, positions of tokens, counts.
These are computed. Floats, which are nearly all of the work and of the memory, are torch's fake
tensors. Where integers come from floats, as ids come from scores, a rule stands in: loads are even.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map

from moebius.parallel.planner.live import LiveBytes

aten: Any = torch.ops.aten
TRUE = ("lt", "le", "gt", "ge", "eq", "logical_not")
"""comparisons that hold where the numbers are not known"""


class Shapes(LiveBytes):
    """See the module. Tensors on the device `meta` are left alone."""

    def __init__(self) -> None:
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.rules: dict[Any, Callable[..., Any]] = {
            aten._local_scalar_dense.default: lambda x: 1 if _is_whole(x) else 1.0,
            aten._grouped_mm.default: self._grouped_mm,
            aten._fused_adamw_.default: lambda *args, **kwargs: None,
            aten._fused_adamw_.tensor_lr: lambda *args, **kwargs: None,
        }

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        self._count(func, args)
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if any(isinstance(tensor, FakeTensor) for tensor in inputs):
            out = self._shaped(func, args, kwargs)
        elif any(t.device.type == "meta" for t in inputs) or not self._makes_floats(
            func, inputs, kwargs
        ):
            out = func(*args, **kwargs)
        else:
            with self.fake:
                out = func(*args, **kwargs)
        self._follow_all(out)
        return out

    def _makes_floats(self, func: Any, inputs: Sequence[Tensor], kwargs: dict[str, Any]) -> bool:
        """Whether an operation on numbers makes a tensor of floats out of nothing."""
        if str(kwargs.get("device")) == "meta":
            return False
        if inputs and not (func.name().startswith("aten::new_") or "_like" in func.name()):
            return False
        usual = inputs[0].dtype if inputs else torch.get_default_dtype()
        dtype = kwargs.get("dtype") or usual
        if func.name().startswith("aten::arange") and kwargs.get("dtype") is None:
            dtype = torch.int64
        return bool(dtype.is_floating_point)

    def _shaped(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        rule = self.rules.get(func)
        if rule is not None:
            return rule(*args, **kwargs)
        if func is aten.index.Tensor or func is aten.index_put_.default:
            args = (args[0], _as_positions(args[1]), *args[2:])
        out = func(*args, **kwargs)
        if not any(isinstance(leaf, FakeTensor) and _is_whole(leaf) for leaf in tree_leaves(out)):
            return out
        name = func.name().removeprefix("aten::").partition(".")[0]
        if name in ("sort", "argsort", "topk"):
            dim = next((a for a in args[1:] if isinstance(a, int) and not isinstance(a, bool)), -1)
            if name == "topk":
                dim = args[2] if len(args) > 2 else -1
            dim = kwargs.get("dim", dim)
            return tree_map(lambda t: _in_turn(t, dim) if _is_fake_whole(t) else t, out)
        value = name in TRUE or func is aten.ne.Scalar
        return tree_map(lambda t: _filled(t, value) if _is_fake_whole(t) else t, out)

    def _grouped_mm(self, a: Tensor, b: Tensor, offs: Tensor, *rest: Any, **more: Any) -> Tensor:
        """Its own shape function refuses fp32, which it computes."""
        with self.fake:
            if b.dim() == 3:
                return torch.empty(a.shape[0], b.shape[2], dtype=a.dtype)
            return torch.empty(len(offs), a.shape[0], b.shape[1], dtype=a.dtype)


def _is_whole(tensor: Tensor) -> bool:
    return not (tensor.dtype.is_floating_point or tensor.dtype.is_complex)


def _is_fake_whole(value: Any) -> bool:
    return isinstance(value, FakeTensor) and _is_whole(value)


def _as_positions(indices: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Masks as numbers: how many are true decides a shape."""
    found: list[Tensor | None] = []
    for index in indices:
        if index is not None and index.dtype == torch.bool and not isinstance(index, FakeTensor):
            found += [part.contiguous() for part in index.nonzero().unbind(1)]
        else:
            found.append(index)
    return found


def _filled(like: Tensor, value: bool) -> Tensor:
    return torch.full(like.shape, value, dtype=like.dtype)


def _in_turn(like: Tensor, dim: int) -> Tensor:
    """Ids along a dimension, in every row beginning with another one: loads are even."""
    size = like.shape[dim]
    shape = [1] * like.dim()
    shape[dim] = size
    ids = torch.arange(size, dtype=like.dtype).view(shape)
    rows = [n for d, n in enumerate(like.shape) if d != dim % like.dim()]
    first = torch.arange(math.prod(rows), dtype=like.dtype).view(rows).unsqueeze(dim)
    return (ids + first) % size
