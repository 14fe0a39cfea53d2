"""DPTrainerMixin: everything that makes a Trainer private. Only public methods are overridden.

One item of the loader is one logical batch, one optimizer step and one release. `training_step` is
the whole story, in the order of the law: sum, budget, ledger, noise, average. Callbacks only observe.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import TrainingArguments

from hf_dp.accounting import accountant_named
from hf_dp.accounting.base import Accountant
from hf_dp.coins import Coins, SecretCoins
from hf_dp.engines import ExampleLoss, engine_named
from hf_dp.engines.base import trainable_parameters
from hf_dp.engines.given_losses import with_own_batches
from hf_dp.errors import PrivacyError
from hf_dp.layers import DEFAULT_LAYER_RULES, LayerRules
from hf_dp.plan import PrivacyPlan
from hf_dp.training.arguments import DPArguments, checked
from hf_dp.training.batches import (
    LogicalBatchCollator,
    LogicalBatchSampler,
    drawn,
    logical_loader,
)
from hf_dp.training.checkpoints import resolve_checkpoint
from hf_dp.training.chosen_noise import num_noised, warn_of_dear_noise
from hf_dp.training.held_out import refuse_evaluation
from hf_dp.training.joining import USUAL_FILLS
from hf_dp.training.lines import Lines, guard, without_talk_of_no_examples
from hf_dp.training.losses import default_loss_ceiling
from hf_dp.training.memory import MemoryLimit
from hf_dp.training.ownership import Ownership, announce_users, given_dataset
from hf_dp.training.packing import UserCollator
from hf_dp.training.planning import Schedule, plan_for, schedule
from hf_dp.training.refusals import private_copy, refuse_launcher, refuse_options
from hf_dp.training.refused_parts import (
    announce_unused_step,
    refuse_collator,
    refuse_dataset,
    refuse_model,
    refuse_optimizer,
    refuse_preparing,
    refuse_sampler,
)
from hf_dp.training.rehearsal import rehearse
from hf_dp.training.settled import SettledMixin
from hf_dp.training.shown import ShownMixin
from hf_dp.training.spending import Claim, Spending
from hf_dp.training.step import clipped_sum_of, released_loss, set_gradients, tracked
from hf_dp.training.tasks import recognise_task
from hf_dp.training.trained_before import announce_earlier, earlier_runs, for_header, remember

logger = logging.getLogger(__name__)


class DPTrainerMixin(SettledMixin, ShownMixin):
    """Put it before a Trainer class: ``class DPSFTTrainer(DPTrainerMixin, SFTTrainer)``.

    It takes the Trainer's arguments and these; `dp_args` is the only one that is needed.

    Args:
        dp_args: What privacy is asked for.
        plan: The parts as objects, where the strings of `dp_args` are not enough. Then `dp_args` sets
            delta, accountant and, as a budget, target_epsilon; the plan's own noise is used.
        layer_rules: Module type -> rule, instead of ``DEFAULT_LAYER_RULES``.
        example_loss: ``(model, inputs) -> (B,)`` losses, each from its own row alone.
        users: The user of each training example, with ``privacy_unit="user"``, in place of a column.
        coins: Where randomness comes from. Anything but the operating system is for tests, and the
            ledger and the report then say "not private".

    Guarantees:
        * Every release is in ``output_dir/privacy_ledger.jsonl`` before it can change a parameter.
        * With a target epsilon, no release is made that would pass it.
        * Neither holds less when callbacks are removed or added.
    """

    def __init__(
        self,
        *args: Any,
        dp_args: DPArguments | None = None,
        plan: PrivacyPlan | None = None,
        layer_rules: LayerRules = DEFAULT_LAYER_RULES,
        example_loss: ExampleLoss | None = None,
        users: Sequence[Any] | None = None,
        coins: Coins | None = None,
        **kwargs: Any,
    ) -> None:
        """Check everything that can be checked before training, then build the host."""
        self.dp_args = checked(dp_args)
        # By type and not by place: a host class may take *args and hand them on.
        given = [v for v in (*args, *kwargs.values()) if isinstance(v, TrainingArguments)]
        if not given:
            given = [TrainingArguments("tmp_trainer")]
            kwargs["args"] = given[0]
        refuse_options(given[0])
        self._accumulation: int = given[0].gradient_accumulation_steps
        mine = private_copy(given[0])
        given_data = given_dataset(super().__init__, args, kwargs)
        given_eval = given_dataset(super().__init__, args, kwargs, "eval_dataset")
        refuse_evaluation(given_data, given_eval, self.dp_args.nonprivate_metrics)
        self._ownership = Ownership(self.dp_args, users, given_data)
        super().__init__(
            *(mine if value is given[0] else value for value in args),
            **{name: mine if value is given[0] else value for name, value in kwargs.items()},
        )
        refuse_launcher(self.accelerator)
        self.accountant: Accountant = accountant_named(self.dp_args.accountant)
        self.coins: Coins = coins or SecretCoins()
        self.engine = engine_named(self.dp_args.engine, layer_rules)
        self._set_aside = None
        self._given_plan = plan
        self._given_loss = example_loss and with_own_batches(example_loss)
        self._choice = None
        self._claim: Claim | None = None
        self._schedule: Schedule | None = None
        self._num_noised: int | None = None
        self._spending: Spending | None = None
        self._run_id: str | None = None
        self._rehearsed = False
        self._memory = MemoryLimit()
        self._lines = Lines(self.dp_args.nonprivate_metrics)
        guard(self.callback_handler, self._lines)
        self._refuse_parts()
        if self.train_dataset is not None:
            self._make_claim()

    def _refuse_parts(self) -> None:
        refuse_model(self.model)
        refuse_collator(self.data_collator)
        refuse_preparing(self)
        announce_unused_step(self, DPTrainerMixin)

    # ---- what is claimed ------------------------------------------------------------------------

    @property
    def plan(self) -> PrivacyPlan:
        """Sampler, clipping, noise and number of steps of the coming run."""
        return self._make_claim().plan

    def _make_claim(self) -> Claim:
        """Plan and curve, made anew when the arguments or the data changed."""
        size = refuse_dataset(self.train_dataset)
        refuse_evaluation(self.train_dataset, self.eval_dataset, self.dp_args.nonprivate_metrics)
        users = self._ownership.of(self.train_dataset)
        when = schedule(
            self.args,
            self.dp_args,
            given=self._given_plan,
            accumulation=self._accumulation,
            num_examples=size,
            users=users,
        )
        noised = num_noised(self.model, self.dp_args)
        if self._claim is None or (when, noised) != (self._schedule, self._num_noised):
            labels = {"labels": torch.zeros(1, 1)}
            ceiling = default_loss_ceiling(self.model, recognise_task(self.model, labels))
            plan = self._given_plan or plan_for(
                self.dp_args, when, self.accountant, ceiling, noised
            )
            self._claim = Claim.of(
                plan, self.accountant, self.dp_args, when.num_units, self._ownership.claimed(users)
            )
            self._schedule, self._num_noised = when, noised
        return self._claim

    def get_total_train_batch_size(self, args: TrainingArguments) -> int:
        """The expected logical batch, rounded, for the host's messages and throughput."""
        return round(self._make_claim().plan.expected_batch_size)

    # ---- the host's loop ------------------------------------------------------------------------

    def train(
        self, resume_from_checkpoint: str | os.PathLike[str] | bool | None = None, **kwargs: Any
    ) -> Any:
        """Train, or go on where a checkpoint and its ledger left off."""
        claim = self._make_claim()
        self._refuse_parts()
        self._rehearsed = not self.dp_args.preflight
        trainable_parameters(self.model)  # refuses a model without any, while nothing is begun
        checkpoint = resolve_checkpoint(resume_from_checkpoint, self.args.output_dir)
        earlier = earlier_runs(self.model)
        self._spending = Spending.begin(
            claim,
            output_dir=Path(self.args.output_dir),
            checkpoint=None if checkpoint is None else Path(checkpoint),
            header={**claim.header(self.coins, self.dp_args), **for_header(earlier)},
            known_run=self._run_id,
            continues=self.dp_args.ledger == "continue",
            fresh_weights=self.model_init is not None,
        )
        self._run_id = self._spending.ledger.run_id
        self._lines.begin(self._spending)
        guard(self.callback_handler, self._lines)
        claim.announce(self.dp_args)
        warn_of_dear_noise(claim.plan)
        announce_earlier(earlier, self._spending)
        try:
            with without_talk_of_no_examples():
                return super().train(resume_from_checkpoint=checkpoint, **kwargs)
        finally:
            remember(self.model, self._spending)
            self._spending.close()

    def num_examples(self, dataloader: DataLoader[Any]) -> int:
        """What the host counts as examples: of training, those that a sampler draws from; users, say."""
        drawing = dataloader.batch_sampler
        if isinstance(drawing, LogicalBatchSampler):
            return drawing.num_units
        return int(super().num_examples(dataloader))

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Logical batches, drawn by the plan's sampler, with the host's dataset and collator."""
        claim = self._make_claim()
        assert self._schedule is not None
        if self._spending is not None:
            self._spending.require(claim)
        host = super().get_train_dataloader()
        refuse_sampler(host)
        choice = self._settle_loss(host)
        key = self._main_input
        sampler = LogicalBatchSampler(
            claim.plan.sampler,
            self._schedule.drawn_from,
            self._schedule.steps_per_epoch,
            self.coins,
            self._ownership.examples_of(self.train_dataset, host.dataset, key, self.coins),
        )
        size = 1 if choice.alone else self.args.per_device_train_batch_size
        tokens = None if choice.alone else self.dp_args.max_tokens_per_micro_batch
        reduction = self.dp_args.reduction
        usual = {**USUAL_FILLS, **self._fills}
        fills = {name: usual[name] for name in choice.padded.intersection(usual)}
        parts = (host.collate_fn, size, key, tokens, fills, choice.tried(self.model))
        collator = (
            LogicalBatchCollator(*parts) if reduction is None else UserCollator(*parts, reduction)
        )
        announce_users(self.dp_args, size, tokens)
        self._lines.exact.users_cut = self._ownership.num_cut(self.train_dataset)
        check = self._ownership.check_of(self.train_dataset, host.dataset)
        return logical_loader(host, sampler, collator, self._ownership.column, check)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], None]:
        """The next logical batch, or none once the budget is spent: then stop, and save.

        None either where a finished run is resumed: the host itself would make one step more.

        The number of items is never passed on: a loss divided by the whole batch's token count would
        let one example change every other's gradient.
        """
        spending = self._open_spending()
        if spending.exhausted:
            logger.warning(
                "hf_dp: stopping at step %d: one more release would pass epsilon = %s (spent: %.4g). "
                "To train longer, plan it from the start: a new trainer with more steps or a larger "
                "target_epsilon, and another output_dir. On the same data the epsilons add up.",
                self.state.global_step,
                spending.claim.target_epsilon,
                spending.epsilon,
            )
            self.control.should_training_stop = True
            self.control.should_save = True
            return [], None
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return [], None
        with self.coins.for_library_code():
            samples, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        return samples, None

    def training_step(
        self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None
    ) -> Tensor:
        """One release: sum, budget, ledger, noise, average. Returns the private training loss."""
        spending = self._open_spending()
        plan = spending.claim.plan
        model.train()
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()
        refuse_optimizer(self.optimizer, model)
        batch = drawn(inputs)
        with self._while_losses_are_computed():
            self._rehearse(model, plan)
            summed = clipped_sum_of(
                model,
                map(self._on_device, batch.micro_batches),
                engine=self.engine,
                example_loss=self._loss_of_each,
                plan=plan,
                limit=self._memory,
                owned=batch.owned,
                alone=lambda place: map(self._on_device, batch.alone[place] or ()),
            )
        self._lines.observe(summed)
        spending.record(batch.place, step=self.state.global_step)
        released = plan.noise.release(
            summed, sensitivity=plan.clipping.sensitivity, coins=self.coins
        )
        set_gradients(model, released, plan.expected_batch_size)
        return self._lines.released(released_loss(released, plan, self.args.device))

    def _rehearse(self, model: nn.Module, plan: PrivacyPlan) -> None:
        """The preflight, once, when host and model are as every step will find them."""
        if not self._rehearsed:
            assert self._choice is not None
            size, budget = (
                self.args.per_device_train_batch_size,
                self.dp_args.max_tokens_per_micro_batch,
            )
            rehearse(
                model,
                self._choice,
                engine=self.engine,
                example_loss=self._loss_of_each,
                plan=plan,
                one_by_one=size == 1 and budget is None,
                width=size if budget is None else max(1, budget // self._choice.longest),
                user_reduction=self.dp_args.reduction,
            )
            self._rehearsed = True

    def _open_spending(self) -> Spending:
        if self._spending is None:
            raise PrivacyError(
                "DPTrainer.training_step: expected to be called by train(). Only train() opens the ledger, "
                "and nothing may be released without it. Call trainer.train()."
            )
        return self._spending

    def _on_device(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        return tracked(self._prepare_inputs(batch))
