"""DPArguments: the one new thing a Trainer user passes."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from hf_dp._validate import one_of, open_unit_interval, positive, positive_integer
from hf_dp.accounting import ACCOUNTANTS, check_delta, default_delta
from hf_dp.engines import ENGINES
from hf_dp.engines.owners import UserReduction
from hf_dp.errors import ConfigurationError, explain
from hf_dp.training.noise_options import check_noise_options
from hf_dp.training.user_options import PRIVACY_UNITS, check_user_options

LEDGER_MODES = ("new", "continue")
SAMPLINGS = ("poisson", "truncated_poisson", "balls_in_bins", "shuffled", "fixed_size")


@dataclass
class DPArguments:
    """What privacy is asked for. Set exactly one of `target_epsilon` and `noise_multiplier`.

    Every option is explained in its ``metadata["help"]``; ``HfArgumentParser((TrainingArguments,
    DPArguments))`` parses both, and no name is shared with ``TrainingArguments``.

    Raises:
        ConfigurationError: A value is out of range; the message says what to write instead.
    """

    target_epsilon: float | None = field(
        default=None,
        metadata={
            "help": "Epsilon that the whole run must not pass; the accountant chooses the noise for it."
        },
    )
    target_delta: float | None = field(
        default=None,
        metadata={
            "help": "Delta of the guarantee, below 1 / number of examples (of users, with "
            "privacy_unit='user'). Default: that number ** -1.1."
        },
    )
    noise_multiplier: float | None = field(
        default=None,
        metadata={
            "help": "Standard deviation of the noise divided by clipping_norm, instead of target_epsilon."
        },
    )
    clipping_norm: float = field(
        default=1.0,
        metadata={
            "help": "Norm to which the gradient (and loss coordinate) of each example, or of each drawn "
            "user, is clipped."
        },
    )
    clipping_norm_type: str = field(
        default="l2",
        metadata={
            "help": "Which norm that is: 'l2', or 'l1', the sum of absolute values, up to the square root "
            "of the number of trained parameters as large; for 'l1' each example's gradient is written out."
        },
    )
    noise: str = field(
        default="gaussian",
        metadata={
            "help": "Noise that is added: 'gaussian'; 'laplace', which needs less of it for few numbers, or "
            "releases, under strong privacy; 'lmo', Laplace noise of a random scale whose law is searched "
            "for the target_epsilon; or 'auto', the least of the three."
        },
    )
    expected_batch_size: float | None = field(
        default=None,
        metadata={
            "help": "Mean number of examples in a logical batch. Default: per_device_train_batch_size x "
            "gradient_accumulation_steps x number of processes. Where users are drawn (user_sampling) it "
            "counts users, and the default is divided by max_examples_per_user."
        },
    )
    accountant: str = field(
        default="pld",
        metadata={
            "help": "Who computes epsilon: 'pld' (tight), 'edgeworth' (an estimate, certified by 'pld') "
            "or 'rdp'."
        },
    )
    sampling: str = field(
        default="poisson",
        metadata={
            "help": "How logical batches are drawn: 'poisson'; 'balls_in_bins' (each example once in every "
            "pass, in a batch drawn for it alone); 'truncated_poisson' (at most max_batch_size); "
            "'fixed_size' (one example then moves a sum by twice clipping_norm); or 'shuffled' (ordinary "
            "passes, from which privacy gains nothing: far more noise)."
        },
    )
    max_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Cap on a logical batch, with sampling='truncated_poisson' only. Default: the expected "
            "batch size plus ten times its square root."
        },
    )
    privacy_unit: str = field(
        default="example",
        metadata={
            "help": "Whose data is protected together: each 'example', or all examples of each 'user'."
        },
    )
    user_column: str = field(
        default="user_id",
        metadata={
            "help": "Column of train_dataset with the user of each example, if DPTrainer is given no "
            "`users`; in training it reaches neither collator nor model. Evaluation data that have it "
            "keep it under remove_unused_columns=False: drop it there."
        },
    )
    user_sampling: str = field(
        default="users",
        metadata={
            "help": "With privacy_unit='user': draw 'users', each with fresh examples of their own that are "
            "clipped as one; or draw 'examples' (sampling='poisson') from at most max_examples_per_user of "
            "each user, clipped one by one."
        },
    )
    max_examples_per_user: int | None = field(
        default=None,
        metadata={
            "help": "Examples that a user brings to a batch at most (user_sampling='users'; None for all), "
            "or to the whole training (user_sampling='examples', which needs it)."
        },
    )
    user_reduction: str = field(
        default="mean",
        metadata={
            "help": "What is clipped of a drawn user: the gradient of the 'mean' or of the 'sum' of the "
            "losses of the examples drawn with them."
        },
    )
    user_selection: str = field(
        default="random",
        metadata={
            "help": "Which examples a user keeps with user_sampling='examples': 'random', 'longest', or "
            "'first' in the data's order."
        },
    )
    engine: str = field(
        default="auto",
        metadata={
            "help": "How gradients are clipped per example: 'book_keeping' (one backward pass), "
            "'two_pass' (less memory under gradient checkpointing), "
            "'sequential' (one example at a time), or 'auto'."
        },
    )
    private_loss: bool = field(
        default=True,
        metadata={
            "help": "Release the training loss as one more noised coordinate and log it as 'loss'."
        },
    )
    loss_share: float = field(
        default=0.1,
        metadata={
            "help": "Part of clipping_norm that the released loss takes; 0.1 leaves 99.5% for the gradient, "
            "or 90% with clipping_norm_type='l1'."
        },
    )
    loss_ceiling: float | None = field(
        default=None,
        metadata={
            "help": "Losses above it count as this much in the released loss. Default: from the number of "
            "classes or the vocabulary."
        },
    )
    max_tokens_per_micro_batch: int | None = field(
        default=None,
        metadata={
            "help": "Cut each logical batch into micro-batches of at most so many tokens, padding included, "
            "instead of per_device_train_batch_size examples. A matter of memory and speed alone."
        },
    )
    preflight: bool = field(
        default=True,
        metadata={
            "help": "Before the first step, check engine, loss and clipping on made-up examples."
        },
    )
    nonprivate_metrics: bool = field(
        default=False,
        metadata={
            "help": "Log exact, unprotected quantities under 'nonprivate/', and all that hosts and callbacks "
            "add to lines. They are outside the guarantee."
        },
    )
    ledger: str = field(
        default="new",
        metadata={
            "help": "What to do with the ledger of an earlier run in output_dir: 'new' refuses to start, "
            "'continue' counts what it spent. Resuming from a checkpoint always continues."
        },
    )

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        check_noise_options(self)
        positive(
            "DPArguments.clipping_norm",
            self.clipping_norm,
            "It bounds what one example can add to the sum, and the noise is sized by it.",
            "Typical values are 0.1 to 1.",
        )
        open_unit_interval(
            "DPArguments.loss_share",
            self.loss_share,
            "It is the part of the sensitivity that the released loss takes.",
            "Use 0.1, or private_loss=False to release no loss.",
        )
        self._check_optional_numbers()
        self._check_choices()
        check_user_options(self)

    def _check_optional_numbers(self) -> None:
        if self.target_delta is not None:
            open_unit_interval(
                "DPArguments.target_delta",
                self.target_delta,
                "It is the probability with which the epsilon may fail to hold.",
                "Leave it out for the default, or use a value well below 1 / number of units.",
            )
        if self.expected_batch_size is not None:
            positive(
                "DPArguments.expected_batch_size",
                self.expected_batch_size,
                "It sets the sampling probability and divides every noisy sum.",
                "Use the batch size you would train with; larger is better under privacy.",
            )
        if self.loss_ceiling is not None:
            positive(
                "DPArguments.loss_ceiling",
                self.loss_ceiling,
                "Losses are clipped to it before they are released.",
                "Use about twice the loss of a model that guesses.",
            )
        self._check_max_batch_size()
        if self.max_tokens_per_micro_batch is not None:
            positive(
                "DPArguments.max_tokens_per_micro_batch",
                self.max_tokens_per_micro_batch,
                "It is how many tokens are in memory at once.",
                "Use a few thousand, or None for per_device_train_batch_size examples.",
            )

    def _check_max_batch_size(self) -> None:
        if self.max_batch_size is None:
            return
        positive_integer(
            "DPArguments.max_batch_size",
            self.max_batch_size,
            "A larger draw is cut to it.",
            "Use the expected batch size plus ten times its square root.",
        )
        if self.sampling != "truncated_poisson":
            raise ConfigurationError(
                explain(
                    "DPArguments.max_batch_size",
                    self.max_batch_size,
                    f"None with sampling={self.sampling!r}",
                    "Only sampling='truncated_poisson' has a cap, and it costs privacy there.",
                    "Leave it out; max_tokens_per_micro_batch and per_device_train_batch_size bound memory.",
                )
            )

    def _check_choices(self) -> None:
        choices = {
            "accountant": (ACCOUNTANTS, "It decides which epsilon is claimed."),
            "engine": (ENGINES, "It decides how gradients are clipped per example."),
            "ledger": (
                LEDGER_MODES,
                "Earlier spending must be counted or refused, never forgotten.",
            ),
            "privacy_unit": (PRIVACY_UNITS, "It is what the guarantee is about."),
            "sampling": (SAMPLINGS, "The accounting holds for the sampler that was used."),
        }
        for name, (allowed, why) in choices.items():
            one_of(f"DPArguments.{name}", getattr(self, name), allowed, why)

    @property
    def draws_users(self) -> bool:
        """Whether whole users are drawn, each clipped as one."""
        return self.privacy_unit == "user" and self.user_sampling == "users"

    @property
    def draws_contributions(self) -> bool:
        """Whether users are protected, and single examples of theirs drawn and clipped."""
        return self.privacy_unit == "user" and self.user_sampling == "examples"

    @property
    def reduction(self) -> UserReduction | None:
        """How the losses of a drawn user's examples make one; None where examples are drawn."""
        if not self.draws_users:
            return None
        return "sum" if self.user_reduction == "sum" else "mean"

    def delta_for(self, num_units: int) -> float:
        """The delta of the guarantee: `target_delta`, or the default for so many examples, or users."""
        delta = default_delta(num_units) if self.target_delta is None else self.target_delta
        check_delta(delta, num_units)
        return delta


def checked(dp_args: DPArguments | None) -> DPArguments:
    """A copy of `dp_args`, its values checked again, which nobody changes from outside.

    Raises:
        ConfigurationError: There are none, or a value was set out of range after construction.
    """
    if isinstance(dp_args, DPArguments):
        return replace(dp_args)
    raise ConfigurationError(
        explain(
            "DPTrainer.dp_args",
            dp_args,
            "a DPArguments",
            "Privacy has no default that suits everybody.",
            "Pass dp_args=DPArguments(target_epsilon=3.0), or use transformers.Trainer.",
        )
    )
