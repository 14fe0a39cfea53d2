"""What a private Trainer shows: its epsilon, its log lines, its metrics, its files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_dp.errors import ConfigurationError
from hf_dp.ledger import LEDGER_NAME
from hf_dp.reports.markdown import with_privacy
from hf_dp.reports.report import PrivacyReport
from hf_dp.training.arguments import DPArguments
from hf_dp.training.held_out import refuse_evaluation
from hf_dp.training.lines import Lines
from hf_dp.training.spending import Spending

if TYPE_CHECKING:
    from transformers import Trainer as _Host
else:
    _Host = object


class ShownMixin(_Host):
    """The half of `DPTrainerMixin` that trains nothing: only public methods are overridden."""

    dp_args: DPArguments
    _spending: Spending | None
    _lines: Lines

    @property
    def epsilon(self) -> float:
        """A proven upper bound on what has been spent so far; 0 before the first release."""
        return 0.0 if self._spending is None else self._spending.epsilon

    def privacy_report(self) -> PrivacyReport:
        """What is guaranteed, for whom, under which assumptions, read from the ledger."""
        return PrivacyReport.from_ledger(Path(self.args.output_dir) / LEDGER_NAME)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add epsilon and delta to training lines; `Lines` sees to the rest where they arrive."""
        self._lines.price(logs)
        super().log(logs, start_time)

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The host's evaluation; refused on the training data, whose metrics would be exact."""
        evaluated = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(evaluated, str):
            evaluated = self.eval_dataset[evaluated]
        refuse_evaluation(self.train_dataset, evaluated, self.dp_args.nonprivate_metrics)
        prefix = kwargs.get("metric_key_prefix", args[1] if len(args) > 1 else "eval")
        with self._lines.evaluation(prefix):
            metrics: dict[str, float] = super().evaluate(eval_dataset, *args, **kwargs)
        return metrics

    def predict(self, test_dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """The host's prediction; refused on the training data for the same reason."""
        refuse_evaluation(self.train_dataset, test_dataset, self.dp_args.nonprivate_metrics)
        return super().predict(test_dataset, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Copy the ledger first, then save the model as the host does."""
        if self._spending is not None:
            self._spending.copy_to(Path(output_dir or self.args.output_dir))
        super().save_model(output_dir, _internal_call=_internal_call)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The host's model card, with what is guaranteed below its title and at its end."""
        super().create_model_card(*args, **kwargs)
        card = Path(self.args.output_dir) / "README.md"
        if self.is_world_process_zero() and self._spending is not None:
            text = card.read_text(encoding="utf-8")
            card.write_text(with_privacy(text, self.privacy_report()), encoding="utf-8")

    def hyperparameter_search(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: every trial spends privacy, and their total is not accounted for."""
        raise ConfigurationError(
            "DPTrainer.hyperparameter_search: expected single runs. Every trial spends privacy on the same "
            "data, and choosing among them spends more. Tune on public data, or run train() per setting and "
            "add up the epsilons."
        )
