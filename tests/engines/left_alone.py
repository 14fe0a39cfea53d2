"""A check that a clipped sum leaves a model as it was: the same parameters, not copies of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn

from hf_dp.engines.tap import PointTap

# whether it is registered as a parameter, identity, kind, version (each change in place counts), whether it
# is trained, what its gradient is
State = tuple[bool, int, type[Tensor], int, bool, int | None]


def state_of(model: nn.Module) -> dict[str, State]:
    """Every parameter and buffer by each of its names, modules that are registered twice twice.

    Each call of PEFT's wrapper takes its parameter out and puts it back, which counts as a change.
    """
    put_back = {id(m.get_param()) for m in model.modules() if isinstance(m, ParamWrapper)}

    def state(t: Tensor, *, registered: bool) -> State:
        version = 0 if id(t) in put_back else t._version
        return registered, id(t), type(t), version, t.requires_grad, t.grad and id(t.grad)

    return {
        f"{name}.{key}": state(t, registered=tensors is module._parameters)
        for name, module in model.named_modules(remove_duplicate=False)
        for tensors in (module._parameters, module._buffers)
        for key, t in tensors.items()
        if t is not None
    }


@contextlib.contextmanager
def left_alone(model: nn.Module) -> Iterator[None]:
    """Within the context `model` may be run, and is to be as before afterwards."""
    before = state_of(model)
    modes = {name: module.training for name, module in model.named_modules()}
    yield
    after = state_of(model)
    assert [name for name in before if before[name] != after.get(name)] == []
    assert list(after) == list(before)
    assert {name: module.training for name, module in model.named_modules()} == modes
    hooks = [hook for module in model.modules() for hook in module._forward_hooks.values()]
    assert not any(isinstance(getattr(hook, "__self__", None), PointTap) for hook in hooks)
