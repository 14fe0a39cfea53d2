from __future__ import annotations

import configparser
from pathlib import Path

import pytest

import hf_dp.demo
from hf_dp.errors import HfDpError


def test_a_missing_extra_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    hf_dp.demo.require_extra()
    monkeypatch.setattr(
        hf_dp.demo, "find_spec", lambda name: None if name == "peft" else "something"
    )
    with pytest.raises(HfDpError, match=r"hf_dp\.demo='peft'.*pip install 'hf_dp\[demo\]'"):
        hf_dp.demo.require_extra()


def test_the_extra_in_setup_cfg_holds_what_is_required() -> None:
    setup = configparser.ConfigParser()
    setup.read(Path(hf_dp.demo.__file__).parents[2] / "setup.cfg", "utf-8")
    lines = setup["options.extras_require"]["demo"].split()
    assert {line.partition(">")[0] for line in lines} == set(hf_dp.demo.EXTRA)
