"""The clipped sum for people with their own training loop."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Hashable, Mapping, Sequence, Set
from typing import Any, get_args
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from hf_dp._validate import one_of
from hf_dp.clipping.flat import FlatClipping
from hf_dp.engines import (
    AutomaticEngine,
    ExampleLoss,
    GradientEngine,
    SequentialEngine,
    engine_named,
)
from hf_dp.engines.base import refuse_without_gradients
from hf_dp.engines.owners import Owners, UserReduction
from hf_dp.engines.rows import OneExample, batch_size, row, select_rows
from hf_dp.engines.sharded import is_sharded
from hf_dp.errors import ConfigurationError, explain
from hf_dp.events import Norm
from hf_dp.layers import DEFAULT_LAYER_RULES, LayerRules
from hf_dp.sums import ClippedSum
from hf_dp.training.alone import definition_loss, moved_to_the_front
from hf_dp.training.choice import Choice, choose
from hf_dp.training.dropped import Batches, Units
from hf_dp.training.joining import (
    MASK,
    TARGET_MASK,
    attended,
    marks_a_beginning,
    with_a_position,
)
from hf_dp.training.own_forward import state_of_loss
from hf_dp.training.packing import APART
from hf_dp.training.padding import padded_on_the_left
from hf_dp.training.positions import axis_of, reads_text
from hf_dp.training.refused_parts import refuse_model
from hf_dp.training.tasks import unwrapped
from hf_dp.training.unpadded import (
    from_the_first_token,
    is_padded,
    targets_at_the_front,
    unpadded,
)

logger = logging.getLogger(__name__)

_CHOICES: WeakKeyDictionary[nn.Module, dict[tuple[Hashable, ...], Choice]] = WeakKeyDictionary()


def clipped_sum(
    model: nn.Module,
    batch: Mapping[str, Any],
    *,
    clipping_norm: float,
    clipping_norm_type: Norm = "l2",
    engine: str | GradientEngine = "auto",
    example_loss: ExampleLoss | None = None,
    layer_rules: LayerRules = DEFAULT_LAYER_RULES,
    users: Sequence[Hashable] | None = None,
    user_reduction: UserReduction = "mean",
) -> ClippedSum:
    """Sum over a batch of each example's gradient, clipped to norm `clipping_norm`.

    With `users` the gradients of one user's examples are put together first, and clipped as one.

    The result is PRIVATE until noise of standard deviation ``noise_multiplier * clipping_norm`` is
    added to every coordinate; accounting, sampling and the ledger are then yours. Gaussian noise is
    accounted for by the L2 norm, Laplace noise by the L1 norm.

    A model under FSDP2 (``fully_shard``) is clipped by the two-pass engine: every rank passes as many
    examples of its own, and gets its shards (``DTensor``) of the sum over all ranks' examples; ``norms``
    and ``losses`` are its own examples'. Each rank then adds noise to its shards (``to_local()``).

    Args:
        model: Trainable parameters are those with ``requires_grad``; its mode is left as it is.
        batch: What the model takes, labels included; tensors have the examples first, ``(B, ...)``. Padding
            is what ``attention_mask`` hides, on either side, and what is ignored around targets of models
            that translate; without a mask all positions are the example's own.
        clipping_norm: Bound on each example's share, > 0.
        clipping_norm_type: In which norm: "l2", or "l1", the sum of absolute values. For "l1" gradients
            are written out for each example, which takes as many numbers as are trained.
        engine: "book_keeping", "two_pass", "sequential", or "auto", which chooses and falls back. In a
            loop pass one ``hf_dp.engines.engine_named("auto")`` to every call: an engine looks a new
            model over by running it a few times, and remembers it.
        example_loss: ``(model, batch) -> (B,)`` losses, each from its own row alone. By default the
            loss that the model itself returns for the example alone.
        layer_rules: Module type -> rule.
        users: Whose each example is, ``(B,)``, in any order.
        user_reduction: Whether a user's gradient is the "mean" or the "sum" of its examples' gradients.

    Returns:
        An object with ``grads`` (parameter name -> summed clipped gradient), ``norms`` ``(B,)``
        before clipping, and ``losses`` ``(B,)``; with `users` one entry for each user, in the order in which
        they come up first, and losses are means over a user's examples.

    Raises:
        ConfigurationError: An argument is out of range, or the model mixes examples.
        UncoveredParameterError: ``engine="book_keeping"`` and a parameter has no layer rule.
    """
    one_of(
        "clipped_sum.clipping_norm_type",
        clipping_norm_type,
        get_args(Norm),
        "It is the norm for which noise is accounted.",
    )
    refuse_without_gradients()
    clipping = FlatClipping(clipping_norm, clipping_norm_type)
    refuse_model(model)
    batch = with_a_position(batch, _padding_of(model))
    _refuse_target_mask(batch)
    owners: Owners | None = None
    if users is not None:
        batch, owners = _by_user(batch, users, user_reduction)
    chosen = engine_named(engine, layer_rules) if isinstance(engine, str) else engine
    if example_loss is None:
        return _by_default(model, batch, chosen, clipping, owners)
    if not bool(attended(batch).all()):
        example_loss = functools.partial(_of_attended, example_loss)
    return chosen.clipped_sum(
        model, batch, example_loss=example_loss, clipping=clipping, owners=owners
    )


def _by_default(
    model: nn.Module,
    batch: Mapping[str, Any],
    engine: GradientEngine,
    clipping: FlatClipping,
    owners: Owners | None,
) -> ClippedSum:
    """With the loss that the model returns for each example alone, without its neighbours' padding."""
    if not isinstance(batch, OneExample):
        batch = targets_at_the_front(model, from_the_first_token(batch))
        if _begins_with_padding(batch):
            batch = moved_to_the_front(model, batch) or batch
    loss, engine = _default_loss(model, batch, engine)
    each = functools.partial(_of_pieces, definition_loss(_own_loss, trim_padding=False))
    sizes = owners.sizes if owners else (1,) * batch_size(batch)

    def alone() -> list[Mapping[str, Any]]:
        return [unpadded(model, batch, index) for index in range(sum(sizes))]

    def again(pieces: Batches, of: Owners | None = None) -> ClippedSum:
        of = of or Owners((len(pieces),), owners.reduction if owners else "mean")
        return SequentialEngine().clipped_sum(
            model, {APART: pieces}, example_loss=each, clipping=clipping, owners=of
        )

    if loss is None:
        return again(alone(), owners or Owners(sizes))
    if not bool(attended(batch).all()):
        loss = functools.partial(_of_attended, loss)
    summed = engine.clipped_sum(model, batch, example_loss=loss, clipping=clipping, owners=owners)
    return summed if is_sharded(model) else Units(sizes, alone, again).with_dropped_again(summed)


def _of_pieces(example_loss: ExampleLoss, model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    return torch.cat([_of_attended(example_loss, model, piece) for piece in inputs[APART]])


def _of_attended(example_loss: ExampleLoss, model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """Zero for an empty text: attention to nothing is spread over the padding that others brought."""
    losses = example_loss(model, inputs)
    return losses.where(attended(inputs).to(losses.device), 0.0)


def _refuse_target_mask(batch: Mapping[str, Any]) -> None:
    """A decoder that may attend to nothing at first attends to what others' length made of it."""
    mask = batch.get(TARGET_MASK)
    if isinstance(mask, Tensor) and mask.dim() == 2 and not marks_a_beginning(mask):
        raise ConfigurationError(
            explain(
                "clipped_sum.batch",
                TARGET_MASK,
                "in each row ones, and then zeros",
                "Elsewhere a loss would depend on how far neighbours made the target be padded.",
                "Pad targets on the right, and leave out examples without any.",
            )
        )


def _by_user(
    batch: Mapping[str, Any], users: Sequence[Hashable], reduction: UserReduction
) -> tuple[Mapping[str, Any], Owners]:
    """The batch with each user's rows together, and how many those are."""
    rows: dict[Hashable, list[int]] = {}
    given = _listed(users)
    if len(given) != batch_size(batch):
        raise ConfigurationError(
            explain(
                "clipped_sum.users",
                f"{len(given)} of them",
                f"one for each of the {batch_size(batch)} examples",
                "An example without an owner would be clipped with nobody.",
                "Pass the owner of every row of the batch, in its order.",
            )
        )
    for index, user in enumerate(given):
        if not _names_one(user):
            raise ConfigurationError(
                explain(
                    "clipped_sum.users",
                    f"a {type(user).__name__}",
                    "a string, a number or another hashable value that names one user",
                    "Examples with the same value are protected together, and this one may name nobody.",
                    "Give every example one owner; leave out examples that have none, or several.",
                )
            )
        rows.setdefault(user, []).append(index)
    order = [index for mine in rows.values() for index in mine]
    owners = Owners(tuple(len(mine) for mine in rows.values()), reduction)
    return select_rows(batch, order), owners


def _listed(users: Sequence[Hashable]) -> list[Hashable]:
    """One owner after the other; a mapping's or a data frame's items are its keys, a set's have no order."""
    ordered = hasattr(users, "__len__") and hasattr(users, "__iter__")
    several = getattr(users, "ndim", 1) != 1  # a table's columns are no owners
    found = list(users) if ordered and not several else []
    if not ordered or several or isinstance(users, Mapping | Set) or len(found) != len(users):
        raise ConfigurationError(
            explain(
                "clipped_sum.users",
                f"a {type(users).__name__}",
                "a list with one owner for each example, in the batch's order",
                "What it holds is not in the order of the examples, or not theirs.",
                "Pass a list, such as list(frame['user_id']).",
            )
        )
    return found


def _names_one(user: object) -> bool:
    """Whether a value can name a user: a tensor's hash is its place in memory, and nan is never itself."""
    if user is None or isinstance(user, Tensor):
        return False
    if isinstance(user, tuple | frozenset) and not all(map(_names_one, user)):
        return False
    try:
        hash(user)
        return bool(user == user)
    except TypeError:
        return False


def _default_loss(
    model: nn.Module, batch: Mapping[str, Any], engine: GradientEngine
) -> tuple[ExampleLoss | None, GradientEngine]:
    """The loss of a whole batch; None where each example must be by itself, without padding."""
    one_by_one = isinstance(engine, SequentialEngine) or batch_size(batch) == 0
    if isinstance(batch, OneExample) or one_by_one:
        return None, SequentialEngine()
    choice = _choice(model, batch)
    untried = not _was_tried(model, batch, choice)
    if not (choice.alone or untried):
        return choice.example_loss, engine
    if not isinstance(engine, AutomaticEngine):
        if not (untried or is_padded(batch, translates=choice.tried(model).translates)):
            return definition_loss(_own_loss), engine
        raise ConfigurationError(
            explain(
                "clipped_sum.batch",
                "padding on the left, elsewhere than at the end, or where it matters",
                f"padding on the right, which changes no loss, with engine={engine.name!r}",
                "Otherwise an example's loss may depend on how far its neighbours made it be padded.",
                "Set tokenizer.padding_side = 'right', or use engine='auto', which then takes one "
                "example at a time.",
            )
        )
    logger.warning(
        "hf_dp: no vectorised loss was found to be the model's own whatever the padding, so examples "
        "are taken one at a time. Pass example_loss for speed."
    )
    return None, SequentialEngine()


def _was_tried(model: nn.Module, batch: Mapping[str, Any], choice: Choice) -> bool:
    """Whether examples that attend to anything are padded as the made-up ones are."""
    tried = choice.tried(model)
    if reads_text(batch):
        tried = dataclasses.replace(tried, least=1)
    texts = select_rows(batch, attended(batch).nonzero().flatten().tolist())
    mask = texts.get(MASK)
    padded = isinstance(mask, Tensor) and not bool((mask == 1).all())
    return tried.may_be_filled_up(texts) if padded else tried.covers(texts)


def _begins_with_padding(batch: Mapping[str, Any]) -> bool:
    """Whether some example's padding is on its left."""
    mask = batch.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != axis_of(batch) + 1:
        return False
    return padded_on_the_left(mask.flatten(0, -2))


def _choice(model: nn.Module, batch: Mapping[str, Any]) -> Choice:
    """Made once for a model, a set of columns and a way to pad, on made-up examples."""
    padding = _padding_of(model)
    padding = padding if _pads_with(batch, padding) else None

    def key() -> tuple[Hashable, ...]:
        return tuple(sorted(batch)), padding, state_of_loss(model)

    known = _CHOICES.setdefault(model, {})
    if key() not in known:
        before = key()  # models of transformers write their problem_type down when they first run
        known[before] = choose(
            model, row(batch, 0), _own_loss, given=None, trusted=True, padding_id=padding
        )
        known[key()] = known[before]
    return known[key()]


def _padding_of(model: nn.Module) -> int | None:
    return getattr(getattr(unwrapped(model), "config", None), "pad_token_id", None)


def _pads_with(batch: Mapping[str, Any], token: object) -> bool:
    ids, mask = batch.get("input_ids"), batch.get("attention_mask")
    if not isinstance(ids, Tensor) or not isinstance(mask, Tensor) or ids.shape != mask.shape:
        return False
    return isinstance(token, int) and bool((ids[mask == 0] == token).all())


def _own_loss(model: nn.Module, inputs: dict[str, Any]) -> Any:
    outputs = model(**inputs)
    return outputs["loss"] if isinstance(outputs, dict) else outputs[0]
