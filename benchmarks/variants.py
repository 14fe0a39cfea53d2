"""Ways to do one step on a case: plain training, our engines, and peers where they are installed.

A step is forward, backward and, where private, the clipped sum; no noise and no optimizer. Each peer
gets a model of its own with the same weights, and its sum is compared with the sequential engine's.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cases import Case, example_losses, library_losses
from hf_dp.clipping import FlatClipping
from hf_dp.engines import GradientEngine, engine_named
from hf_dp.engines.owners import Owners

CLIPPING_NORM = 0.1
RIGHT = 1e-3  # a sum further than this from the sequential engine's, relative to its norm, is wrong
Grads = dict[str, Tensor]


@dataclass
class Variant:
    """One way to do a step.

    Attributes:
        step: Does it, and returns what must stay alive: the gradients.
        grads: The same with the gradients by parameter name; None for plain training.
    """

    name: str
    step: Callable[[], object]
    grads: Callable[[], Grads] | None = None


class NotAvailable(Exception):
    """A variant that cannot run here, and why."""


def plain(case: Case) -> Variant:
    """Gradients of the summed loss with respect to every trainable parameter."""
    model, inputs = case.model(), case.batch()
    parameters = [p for p in model.parameters() if p.requires_grad]

    def step() -> object:
        return torch.autograd.grad(example_losses(model, inputs).sum(), parameters)

    return Variant("plain", step)


def ours(
    case: Case,
    engine: str | GradientEngine = "book_keeping",
    *,
    name: str | None = None,
    owners: Owners | None = None,
) -> Variant:
    """One of this library's engines, flat clipping; of each owner's mean gradient where there are any."""
    runner = engine_named(engine) if isinstance(engine, str) else engine
    model, inputs = case.model(), case.batch()
    losses = library_losses(inputs)

    def grads() -> Grads:
        summed = runner.clipped_sum(
            model,
            inputs,
            example_loss=losses,
            clipping=FlatClipping(CLIPPING_NORM),
            owners=owners,
        )
        return dict(summed.grads)

    return Variant(name or runner.name, grads, grads)


def opacus(case: Case, mode: str) -> Variant:
    """Opacus: "ghost" (two backward passes) or "hooks" (per-example gradients kept)."""
    try:
        import opacus.grad_sample as gs  # type: ignore[import-not-found,unused-ignore]
    except ImportError as missing:
        raise NotAvailable("not installed") from missing
    if case.tied and mode == "ghost":
        raise NotAvailable("refuses tied weights")
    model, inputs = case.model(), case.batch()
    if mode == "ghost":
        return _opacus_ghost(gs, model, inputs)
    wrapped = gs.GradSampleModule(model, loss_reduction="sum", strict=False)
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}

    def grads() -> Grads:
        wrapped.zero_grad(set_to_none=True)
        with _quiet():
            example_losses(wrapped, inputs).sum().backward()
            norms = [p.grad_sample.flatten(1).norm(2, dim=1) for p in parameters.values()]  # type: ignore[attr-defined]
            weights = _weights(torch.stack(norms).norm(2, dim=0))
            found = {
                n: torch.einsum("b,b...->...", weights, p.grad_sample)  # type: ignore[attr-defined]
                for n, p in parameters.items()
            }
        for p in parameters.values():
            p.grad_sample, p.grad = None, None  # type: ignore[attr-defined]
        return found

    return Variant("opacus hooks", grads, grads)


def _opacus_ghost(gs: Any, model: nn.Module, inputs: dict[str, Tensor]) -> Variant:
    wrapped = gs.GradSampleModuleFastGradientClipping(
        model,
        loss_reduction="sum",
        strict=False,
        max_grad_norm=CLIPPING_NORM,
        use_ghost_clipping=True,
    )
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}

    def grads() -> Grads:
        wrapped.zero_grad(set_to_none=True)
        with _quiet():
            losses = example_losses(wrapped, inputs)
            losses.sum().backward(retain_graph=True)
            weights = wrapped.get_clipping_coef().detach()
            wrapped.zero_grad(set_to_none=True)
            wrapped.disable_hooks()
            (weights * losses).sum().backward()
            wrapped.enable_hooks()
        found = {n: p.grad for n, p in parameters.items() if p.grad is not None}
        for p in parameters.values():
            p.grad = None
        return found

    return Variant("opacus ghost", grads, grads)


def fastdp(case: Case) -> Variant:
    """The book-keeping of fastDP in its best setting.

    That is the mixed mode, with its ghost differentiation (origin parameters) where they are trained.
    """
    try:
        with _quiet():
            from fastDP import PrivacyEngine, transformers_support  # type: ignore[import-not-found,unused-ignore]
    except Exception as missing:
        raise NotAvailable("not installed") from missing
    # its own forward functions are of a transformers that is gone; positions are given row by row
    transformers_support.forward_swapper = lambda module: None
    model, inputs = case.model(), case.batch()
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    first = ["word_embeddings", "position_embeddings", "token_type", "wte", "wpe", "embed_tokens"]
    with _quiet():
        PrivacyEngine(
            model,
            batch_size=case.examples,
            sample_size=10_000,
            epochs=1,
            noise_multiplier=0.0,
            max_grad_norm=CLIPPING_NORM,
            clipping_mode="MixOpt",
            clipping_fn="Abadi",
            clipping_style="all-layer",
            loss_reduction="sum",
            origin_params=None if case.lora_rank else first,
        )
    parameters: dict[str, Any] = dict(model.named_parameters())

    def grads() -> Grads:
        for p in parameters.values():
            p.grad = None
        with _quiet():
            example_losses(model, inputs).sum().backward()
        found = {}
        for name in names:
            if hasattr(parameters[name], "private_grad"):
                found[name] = parameters[name].private_grad
                del parameters[name].private_grad
        return found

    return Variant("fastDP", grads, grads)


def _weights(norms: Tensor) -> Tensor:
    return (CLIPPING_NORM / (norms + 1e-6)).clamp(max=1.0)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def distance(found: Grads, expected: Grads) -> float:
    """How far a clipped sum is from the right one, relative to its norm; a missing part is zero."""
    apart = sum(
        float((found[n].double() - g.double()).square().sum())
        if n in found
        else float(g.double().square().sum())
        for n, g in expected.items()
    )
    whole = sum(float(g.double().square().sum()) for g in expected.values())
    return float((apart / whole) ** 0.5)
