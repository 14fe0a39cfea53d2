"""Everything that is refused: by name, before training, with nothing trained and no ledger written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from tiny_runs import Sentences, host_arguments, refused, tiny_bert, train_lines, trainer_for

from hf_dp import DPArguments, DPTrainer, PrivacyPlan
from hf_dp.clipping import FlatClipping, LossRelease
from hf_dp.errors import ConfigurationError
from hf_dp.noise import GaussianNoise
from hf_dp.sampling import PoissonSampling
from hf_dp.training.refusals import refuse_options


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("world_size", 2),
        ("n_gpu", 2),
        ("device", torch.device("mps")),
        ("deepspeed", "zero3.json"),
        ("fsdp", ["full_shard"]),
        ("parallelism_config", object()),
        ("fp16", True),
        ("tf32", True),
        ("torch_compile", True),
        ("use_liger_kernel", True),
        ("auto_find_batch_size", True),
        ("debug", "underflow_overflow"),
        ("skip_memory_metrics", False),
        ("train_sampling_strategy", "group_by_length"),
        ("train_sampling_strategy", "sequential"),
        ("neftune_noise_alpha", 5.0),
        ("optim", "lomo"),
        ("optim", "adalomo"),
        ("optim", "galore_adamw_layerwise"),
        ("packing", True),
        ("padding_free", True),
        ("gradient_checkpointing_kwargs", {"use_reentrant": True}),
        ("activation_checkpointing_kwargs", {"use_reentrant": True}),
    ],
)
def test_training_arguments_that_would_break_the_guarantee(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, field: str, value: object
) -> None:
    args = host_arguments(tmp_path)
    # Set on the class: several are properties, and most need hardware or packages to be accepted.
    monkeypatch.setattr(type(args), field, value, raising=False)
    vars(args).pop(field, None)
    model = tiny_bert()
    before = [p.detach().clone() for p in model.parameters()]
    dp_args = DPArguments(noise_multiplier=1.0)
    refused(
        tmp_path,
        rf"TrainingArguments\.{field}=.*expected",
        lambda: DPTrainer(model, args, train_dataset=Sentences(), dp_args=dp_args),
    )
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize(
    "options",
    [
        {"fp16": True},
        {"torch_compile": True},
        {"auto_find_batch_size": True},
        {"train_sampling_strategy": "group_by_length"},
        {"neftune_noise_alpha": 5.0},
        {"optim": "galore_adamw_layerwise"},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    ],
    ids=lambda options: next(iter(options)),
)
@pytest.mark.filterwarnings("ignore:.*checkpointing.*:FutureWarning")
def test_real_training_arguments_are_read_right(tmp_path: Path, options: dict[str, Any]) -> None:
    try:
        args = host_arguments(tmp_path, **options)
    except (ValueError, ImportError, RuntimeError) as error:
        pytest.skip(f"transformers itself refuses it here: {type(error).__name__}")
    with pytest.raises(ConfigurationError, match="TrainingArguments"):
        refuse_options(args)


def test_what_is_harmless_is_not_refused(tmp_path: Path) -> None:
    refuse_options(host_arguments(tmp_path))
    refuse_options(tf.Seq2SeqTrainingArguments(str(tmp_path)))
    refuse_options(
        host_arguments(tmp_path, bf16=True, label_smoothing_factor=0.1, torch_empty_cache_steps=2)
    )


def test_accumulation_cannot_come_in_through_accelerate(tmp_path: Path) -> None:
    config = {"gradient_accumulation_kwargs": {"num_steps": 4}}
    refused(
        tmp_path,
        "gradient_accumulation_kwargs",
        lambda: trainer_for(tmp_path, host={"accelerator_config": config}),
    )


def test_what_the_launcher_switches_on_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    refused(tmp_path, "accelerator='torch.compile", lambda: trainer_for(tmp_path))


class WithScaler:
    """An accelerator as fp16 or a spreading plugin would leave it."""

    state = object()

    def __init__(self, scaler: object = None, distributed_type: str = "NO") -> None:
        self.scaler, self.distributed_type = scaler, distributed_type


@pytest.mark.parametrize(
    ("options", "name"),
    [({"scaler": object()}, "scaler"), ({"distributed_type": "FSDP"}, "FSDP")],
)
def test_a_prepared_accelerator_is_looked_at(options: dict[str, Any], name: str) -> None:
    from hf_dp.training.refusals import refuse_launcher

    refuse_launcher(WithScaler())
    with pytest.raises(ConfigurationError, match=name):
        refuse_launcher(WithScaler(**options))


@pytest.mark.parametrize("given", [None, {"target_epsilon": 3.0}, 3.0])
def test_dp_args_are_required(tmp_path: Path, given: Any) -> None:
    refused(
        tmp_path,
        "DPTrainer.dp_args",
        lambda: DPTrainer(tiny_bert(), host_arguments(tmp_path), dp_args=given),
    )


def test_arguments_that_were_spoilt_after_they_were_checked(tmp_path: Path) -> None:
    dp_args = DPArguments(noise_multiplier=1.0)
    dp_args.noise_multiplier = 0.0
    refused(
        tmp_path,
        "noise_multiplier=0.0",
        lambda: DPTrainer(tiny_bert(), host_arguments(tmp_path), dp_args=dp_args),
    )


def test_searching_hyper_parameters(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="hyperparameter_search"):
        trainer_for(tmp_path).hyperparameter_search(n_trials=2)


@pytest.mark.parametrize(
    ("host", "dp", "match"),
    [
        ({}, {"expected_batch_size": 41}, "expected_batch_size=41: expected at most.*40"),
        ({"per_device_train_batch_size": 64}, {}, "expected_batch_size=128"),
        ({"max_steps": -1, "num_train_epochs": 0}, {}, "num_train_epochs.*at least one step"),
        ({"max_steps": 0}, {}, r"\(max_steps, num_train_epochs\)"),
        ({}, {"target_delta": 1 / 40}, "target_delta=0.025: expected less than 1"),
        ({}, {"target_delta": 0.5}, "target_delta"),
        ({}, {"target_epsilon": 1e-7, "target_delta": 1e-12}, "target_epsilon"),
    ],
)
def test_plans_that_cannot_be(
    tmp_path: Path, host: dict[str, Any], dp: dict[str, Any], match: str
) -> None:
    refused(tmp_path, match, lambda: trainer_for(tmp_path, host=host, dp=dp))


def plan(**options: Any) -> PrivacyPlan:
    parts: dict[str, Any] = {
        "sampler": PoissonSampling(0.25),
        "clipping": FlatClipping(0.5),
        "noise": GaussianNoise(1.2),
        "num_steps": 6,
        "expected_batch_size": 10.0,
    }
    return PrivacyPlan(**{**parts, **options})


def test_a_plan_for_another_number_of_steps(tmp_path: Path) -> None:
    refused(
        tmp_path,
        r"PrivacyPlan\.num_steps=7: expected 6",
        lambda: trainer_for(tmp_path, plan=plan(num_steps=7)),
    )
    trainer_for(tmp_path, plan=plan(num_steps=7), host={"max_steps": 7}).train()


def test_a_plan_that_passes_its_budget_at_once(tmp_path: Path) -> None:
    refused(
        tmp_path,
        "at least one step of the plan",
        lambda: trainer_for(
            tmp_path, plan=plan(noise=GaussianNoise(0.3)), dp={"target_epsilon": 1.0}
        ),
    )


def test_the_given_plan_is_what_is_done_and_said(tmp_path: Path) -> None:
    given = plan(loss_release=LossRelease(0.2, 3.0))
    trainer = trainer_for(
        tmp_path,
        plan=given,
        host={"max_steps": -1, "num_train_epochs": 1.5},
        dp={"noise_multiplier": 9.0},
    )
    trainer.train()
    assert trainer.plan is given
    assert trainer.state.global_step == 6  # 1.5 epochs of 40 / 10 steps
    assert trainer.privacy_report().to_json()["noise_multiplier"] == 1.2
    assert all("loss" in line for line in train_lines(trainer))
    silent = trainer_for(tmp_path / "silent", plan=plan())
    silent.train()
    assert not any("loss" in line for line in train_lines(silent)), "a zero would be no loss"


@pytest.mark.parametrize("value", ["all", "non_padding"])
def test_token_counts_are_switched_off_aloud(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, value: str
) -> None:
    trainer = trainer_for(tmp_path, host={"include_num_input_tokens_seen": value})
    trainer.train()
    assert "include_num_input_tokens_seen is switched off" in caplog.text
    assert not any("num_input_tokens_seen" in line for line in trainer.state.log_history)


@pytest.mark.parametrize("value", [True, False])
def test_no_draw_is_left_out_for_its_size(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, value: bool
) -> None:
    host = {"dataloader_drop_last": value, "max_steps": -1, "num_train_epochs": 1}
    seven = {"per_device_train_batch_size": 7, "gradient_accumulation_steps": 1}  # of 40 examples
    trainer = trainer_for(tmp_path, host={**host, **seven})
    trainer.train()
    assert trainer.state.global_step == 6
    assert ("dataloader_drop_last=True changes nothing" in caplog.text) == value


@pytest.mark.parametrize(
    ("value", "level"), [(0.3, "WARNING"), (1.0, "INFO"), (0.0, None)], ids=str
)
def test_clipping_of_the_noisy_gradient_is_switched_off_aloud(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, value: float, level: str | None
) -> None:
    with caplog.at_level("INFO", "hf_dp"):
        trainer = trainer_for(tmp_path, host={"max_grad_norm": value})
    assert trainer.args.max_grad_norm == 0
    said = [r.levelname for r in caplog.records if "max_grad_norm" in r.getMessage()]
    assert said == ([] if level is None else [level])


TWO_PROCESSES = """
import sys
from pathlib import Path
from tiny_runs import trainer_for
from hf_dp.errors import ConfigurationError
try:
    trainer_for(Path(sys.argv[1]))
except ConfigurationError as error:
    print(error)
    sys.exit(17)
"""


@pytest.mark.distributed
@pytest.mark.slow
def test_two_real_processes_are_refused_by_name(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_PROCESSES, str(tmp_path)],
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join([str(root), str(Path(__file__).parent)]),
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(20000 + os.getpid() % 20000),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in processes:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 17, err
        assert "TrainingArguments.world_size=2: expected one process" in out
    assert list(tmp_path.iterdir()) == []
