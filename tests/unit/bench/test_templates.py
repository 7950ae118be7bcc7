# SPDX-License-Identifier: Apache-2.0
"""Chat templates that refuse, and tokenizers that have none."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from jinja2 import TemplateError
from typer.testing import CliRunner

from tests.e2e.engines import DRAFTER, TARGET
from vllm_dflash.benchmark import offline_runs
from vllm_dflash.benchmark.templates import prompt_ids, templated_text
from vllm_dflash.cli import app


class Refusing:
    def apply_chat_template(self, messages: Any, **options: Any) -> Any:
        raise TemplateError("roles must alternate")


def test_what_a_template_refuses_is_a_value_error() -> None:
    for make in (lambda: prompt_ids(Refusing(), [], True, None), lambda: templated_text(Refusing(), [], False)):
        with pytest.raises(ValueError, match="the chat template refuses these messages: TemplateError: roles must"):
            make()


@pytest.mark.parametrize("backend", ["offline", "transformers"])
def test_a_model_without_a_template_is_found_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    monkeypatch.setattr(offline_runs, "CHILD", (sys.executable, "-c", "raise SystemExit('an engine was started')"))
    shutil.copytree(TARGET, tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors"))
    config = tmp_path / "base" / "tokenizer_config.json"
    kept = {key: value for key, value in json.loads(config.read_text()).items() if key != "chat_template"}
    config.write_text(json.dumps(kept))
    command = ["bench", "--backend", backend, "--target", f"{tmp_path}/base", "--drafter", str(DRAFTER)]
    found = CliRunner().invoke(app, command, env={"COLUMNS": "250"})
    assert found.exit_code == 1
    assert (
        f"--target {tmp_path}/base: its tokenizer has no chat template; --raw sends prompts as they are" in found.output
    )
