# SPDX-License-Identifier: Apache-2.0
"""The feature cache: right features, nothing half-written taken for whole, and errors that say what to do."""

import errno
import json
import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tiny_training import counting_responses, tiny_target

from vllm_dflash.training import feature_writing
from vllm_dflash.training.data import target_features
from vllm_dflash.training.feature_cache import FeatureCache
from vllm_dflash.training.feature_plan import cache_fingerprint, check_room, estimate_bytes
from vllm_dflash.training.feature_writing import write_cache
from vllm_dflash.training.responses import Response

pytestmark = pytest.mark.usefixtures("one_thread")

LAYERS, WIDTH, MAX_LENGTH = [0, 2], 2 * 32, 32
LENGTHS = [12, 40, 5, 31, 12, 33, 9, 20]  # two of them are cut at 32
CUT_LENGTHS = [min(length, MAX_LENGTH) for length in LENGTHS]
NEEDED = sum(CUT_LENGTHS) * WIDTH * 4  # bytes, float32
DiskUsage = namedtuple("DiskUsage", "total used free")


@pytest.fixture(scope="module")
def target_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("target")
    tiny_target().save_pretrained(folder)
    return folder


def responses() -> list[Response]:
    long = counting_responses(len(LENGTHS))
    return [
        Response(r.prompt_token_ids[:4], (r.prompt_token_ids + r.token_ids)[4:length], 0.0)
        for r, length in zip(long, LENGTHS, strict=True)
    ]


def write(folder: Path, target_dir: Path, **changes) -> FeatureCache:
    """Batches of 2, 2 and 4 sequences (80 padded tokens), the first in one shard (100 rows), the others in another."""
    options = dict(target=tiny_target(), responses=responses(), layer_ids=LAYERS, target_dir=target_dir)
    options |= dict(max_length=MAX_LENGTH, dtype=torch.float32, shard_bytes=100 * WIDTH * 4, batch_tokens=80)
    return write_cache(folder, **(options | changes))


def fingerprint(target_dir: Path) -> dict:
    return cache_fingerprint(target_dir, responses(), LAYERS, MAX_LENGTH, torch.float32)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


class Killed(BaseException):
    """No `except Exception` may swallow it."""


def kill_after(sequences: int):
    def progress(done: int, total: int) -> None:
        if done >= sequences:
            raise Killed

    return progress


def forbid_forwards(monkeypatch) -> None:
    def forward(*args):
        raise AssertionError("the target was run")

    monkeypatch.setattr(feature_writing, "target_features", forward)


# ---- Content ----


def test_features_are_those_computed_without_the_cache(tmp_path, target_dir):
    cache, target = write(tmp_path, target_dir), tiny_target()
    assert len(cache) == len(LENGTHS)
    for index, response in enumerate(responses()):
        ids = torch.tensor([(response.prompt_token_ids + response.token_ids)[:MAX_LENGTH]])
        assert cache.length(index) == CUT_LENGTHS[index]
        assert cache.features(index).shape == (CUT_LENGTHS[index], WIDTH)
        # Other batches, other order of sums.
        torch.testing.assert_close(cache.features(index), target_features(target, ids, LAYERS)[0], rtol=1e-3, atol=1e-3)


def test_layout_on_the_disk(tmp_path, target_dir):
    write(tmp_path, target_dir)
    index = json.loads((tmp_path / "index.json").read_text())
    assert index["fingerprint"] == fingerprint(target_dir)
    assert sorted(contents(tmp_path)) == ["index.json", "shard-00000.safetensors", "shard-00001.safetensors"]
    covered = {number: [] for number in range(2)}
    for shard, start, length in index["sequences"]:
        covered[shard] += range(start, start + length)
    for number, rows in covered.items():
        tensor = safe_open(tmp_path / f"shard-{number:05d}.safetensors", "pt").get_tensor("features")
        assert sorted(rows) == list(range(len(tensor)))  # no padding, no overlap
        assert len(tensor) <= 100 and tensor.shape[1] == WIDTH


def test_forwards_stay_within_batch_tokens_and_waste_little(tmp_path, target_dir, monkeypatch):
    shapes = []

    def forward(target, token_ids, layer_ids):
        shapes.append(tuple(token_ids.shape))
        return target_features(target, token_ids, layer_ids)

    monkeypatch.setattr(feature_writing, "target_features", forward)
    write(tmp_path, target_dir)
    assert shapes == [(2, 32), (2, 31), (4, 12)]


def test_two_reads_are_equal_and_a_read_may_be_changed(tmp_path, target_dir):
    cache = write(tmp_path, target_dir)
    first = cache.features(3)
    kept = first.clone()
    first.zero_()
    assert kept.abs().sum() > 0
    assert torch.equal(cache.features(3), kept)
    assert torch.equal(FeatureCache.open(tmp_path, fingerprint(target_dir)).features(3), kept)


def test_batch_is_padded_with_zeros_and_cut(tmp_path, target_dir):
    cache = write(tmp_path, target_dir)
    batch = cache.batch([2, 1, 2], 16)
    assert batch.shape == (3, 16, WIDTH)
    assert torch.equal(batch[0, :5], cache.features(2)) and torch.equal(batch[2], batch[0])
    assert not batch[0, 5:].any()
    assert torch.equal(batch[1], cache.features(1)[:16])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype_of_the_file(tmp_path, target_dir, dtype):
    exact = write(tmp_path / "exact", target_dir)
    cache = write(tmp_path / "short", target_dir, dtype=dtype, shard_bytes=100 * WIDTH * 2)
    assert all(torch.equal(cache.features(i), exact.features(i).to(dtype)) for i in range(len(LENGTHS)))


def test_sequence_without_tokens_has_no_features(tmp_path, target_dir):
    cache = write(tmp_path, target_dir, responses=[Response([], [], 0.0)])
    assert cache.features(0).shape == (0, WIDTH)
    assert not cache.batch([0], 3).any()


def test_batch_larger_than_a_shard_is_a_shard(tmp_path, target_dir):
    cache = write(tmp_path, target_dir, shard_bytes=1)
    assert len(list(tmp_path.glob("shard-*"))) == 3
    assert torch.equal(cache.features(6), write(tmp_path / "other", target_dir).features(6))


# ---- Interrupted ----


@pytest.mark.parametrize("sequences", [1, 3, 5])
def test_killed_and_resumed_has_the_same_bytes(tmp_path, target_dir, sequences):
    write(tmp_path / "whole", target_dir)
    folder = tmp_path / "killed"
    with pytest.raises(Killed):
        write(folder, target_dir, progress=kill_after(sequences))
    with pytest.raises(ValueError, match=r"no complete feature cache"):
        FeatureCache.open(folder, fingerprint(target_dir))
    write(folder, target_dir)
    assert contents(folder) == contents(tmp_path / "whole")


def test_complete_shards_are_kept(tmp_path, target_dir):
    with pytest.raises(Killed):
        write(tmp_path, target_dir, progress=kill_after(5))  # in the second shard
    kept = (tmp_path / "shard-00000.safetensors").stat()
    calls = []
    write(tmp_path, target_dir, progress=lambda *numbers: calls.append(numbers))
    assert calls == [(4, 8), (8, 8)]
    assert (tmp_path / "shard-00000.safetensors").stat().st_mtime_ns == kept.st_mtime_ns


def test_leftover_partial_files_are_not_taken_for_shards(tmp_path, target_dir):
    """As a power cut leaves them: nothing had time to remove them."""
    write(tmp_path / "whole", target_dir)
    folder = tmp_path / "killed"
    shutil.copytree(tmp_path / "whole", folder)
    (folder / "index.json").rename(folder / "index.json.partial")
    (folder / "shard-00001.safetensors").rename(folder / "shard-00001.safetensors.partial")
    (folder / "shard-00007.safetensors.partial").write_bytes(b"of a run with smaller shards")
    write(folder, target_dir)
    assert contents(folder) == contents(tmp_path / "whole")


def test_shards_of_other_batches_are_computed_again(tmp_path, target_dir, monkeypatch):
    """Killed before the index is written, with three shards where two are to be."""

    def killed(*args):
        raise Killed

    write(tmp_path / "whole", target_dir)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(feature_writing, "_write_index", killed)
        write(tmp_path / "killed", target_dir, shard_bytes=1)
    assert len(contents(tmp_path / "killed")) == 3
    write(tmp_path / "killed", target_dir)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_shard_of_the_same_rows_from_other_batches_is_computed_again(tmp_path, target_dir):
    """Its last bits could differ."""
    one_shard = dict(shard_bytes=NEEDED)
    write(tmp_path, target_dir, **one_shard)
    (tmp_path / "index.json").unlink()
    calls = []
    write(tmp_path, target_dir, **one_shard, batch_tokens=40, progress=lambda *numbers: calls.append(numbers))
    assert calls[-1] == (8, 8)


def test_complete_cache_is_opened_without_the_target(tmp_path, target_dir, monkeypatch):
    before = write(tmp_path, target_dir).features(0)
    forbid_forwards(monkeypatch)
    assert torch.equal(write(tmp_path, target_dir, budget=1, batch_tokens=40).features(0), before)


def test_damaged_shard_is_written_again(tmp_path, target_dir):
    write(tmp_path, target_dir)
    whole = contents(tmp_path)
    file = tmp_path / "shard-00001.safetensors"
    file.write_bytes(whole[file.name][:-10])
    with pytest.raises(Killed):
        write(tmp_path, target_dir, progress=kill_after(1))
    assert not (tmp_path / "index.json").exists()
    write(tmp_path, target_dir)
    assert contents(tmp_path) == whole


# ---- Another cache ----


@pytest.mark.parametrize("complete", [True, False])
@pytest.mark.parametrize(
    ("changes", "differing"),
    [
        (dict(layer_ids=[1, 2]), r"tapped layers \(\[0, 2\], now \[1, 2\]\)"),
        (dict(max_length=30), r"longest sequence \(32, now 30\)"),
        (dict(dtype=torch.bfloat16), r"dtype \(float32, now bfloat16\)"),
        (dict(responses=responses()[1:]), "responses"),
        (dict(responses=[replace(responses()[0], token_ids=[9] * 8), *responses()[1:]]), "responses"),
    ],
)
def test_cache_of_something_else_is_refused(tmp_path, target_dir, monkeypatch, complete, changes, differing):
    write(tmp_path, target_dir)
    if not complete:
        (tmp_path / "index.json").unlink()
    before = contents(tmp_path)
    forbid_forwards(monkeypatch)
    with pytest.raises(ValueError, match=rf"something else: {differing} differ\. Delete the folder.*--output"):
        write(tmp_path, target_dir, **changes)
    assert contents(tmp_path) == before


def test_open_refuses_another_fingerprint(tmp_path, target_dir):
    write(tmp_path, target_dir)
    with pytest.raises(ValueError, match="tapped layers"):
        FeatureCache.open(tmp_path, fingerprint(target_dir) | {"layer_ids": [3]})


def test_foreign_file_under_the_name_of_a_shard_is_left_alone(tmp_path, target_dir):
    shutil.copy(target_dir / "model.safetensors", tmp_path / "shard-00000.safetensors")
    with pytest.raises(ValueError, match=r"shard-00000\.safetensors is no shard of a feature cache"):
        write(tmp_path, target_dir)
    assert (tmp_path / "shard-00000.safetensors").exists()


def test_fingerprint_knows_another_target(tmp_path, target_dir):
    """In the same folder: one trained anew has the same config and files of the same sizes."""
    folder = tmp_path / "target"
    shutil.copytree(target_dir, folder)
    first = fingerprint(folder)
    assert first == fingerprint(folder) == json.loads(json.dumps(first))
    tiny_target(seed=1).save_pretrained(folder)
    assert [key for key, value in fingerprint(folder).items() if value != first[key]] == ["target_weights"]
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    assert fingerprint(folder)["target_config"] != first["target_config"]
    assert fingerprint(target_dir)["target"] != first["target"]


def test_fingerprint_tells_where_sequences_end(target_dir):
    def of(*sequences: list[int]) -> str:
        answers = [Response(ids[:1], ids[1:], 0.0) for ids in sequences]
        return cache_fingerprint(target_dir, answers, LAYERS, 8, torch.float32)["responses"]

    assert of([4, 5, 6], [7, 8]) != of([4, 5], [6, 7, 8])


def test_fingerprint_wants_a_model(tmp_path, target_dir):
    with pytest.raises(ValueError, match=r"no config\.json"):
        cache_fingerprint(tmp_path, [], LAYERS, 8, torch.float32)
    shutil.copy(target_dir / "config.json", tmp_path)
    with pytest.raises(ValueError, match="no safetensors"):
        cache_fingerprint(tmp_path, [], LAYERS, 8, torch.float32)
    with pytest.raises(ValueError, match=r"torch\.int8.*bfloat16"):
        cache_fingerprint(target_dir, [], LAYERS, 8, torch.int8)


# ---- Room ----


def test_estimate_is_the_size_of_the_features(tmp_path, target_dir):
    write(tmp_path, target_dir)
    assert estimate_bytes(CUT_LENGTHS, WIDTH, torch.float32) == NEEDED
    sizes = [safe_open(file, "pt").get_tensor("features").nbytes for file in tmp_path.glob("shard-*")]
    assert sum(sizes) == NEEDED


def test_too_large_for_the_budget(tmp_path):
    gib = 1 << 30
    with pytest.raises(ValueError, match=r"take 3\.00 GiB.*the budget is 2\.50 GiB.*GiB are free") as error:
        check_room(tmp_path, 3 * gib, int(2.5 * gib))
    assert "data.feature_cache_gb" in str(error.value) and "--output" in str(error.value)
    check_room(tmp_path, 2, 2)


def test_too_large_for_the_disk(tmp_path, monkeypatch):
    gib, asked = 1 << 30, []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: asked.append(path) or DiskUsage(9 * gib, 8 * gib, gib))
    folder = tmp_path / "not" / "there yet"
    with pytest.raises(ValueError, match=r"take 3\.00 GiB.*disk has left.*no budget is set, 1\.00 GiB are free"):
        check_room(folder, 3 * gib, None)
    assert asked == [tmp_path]
    check_room(folder, gib, None)


def test_no_room_is_found_before_anything_is_computed(tmp_path, target_dir, monkeypatch):
    forbid_forwards(monkeypatch)
    folder = tmp_path / "cache"
    with pytest.raises(ValueError, match="more than its budget"):
        write(folder, target_dir, budget=NEEDED - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: DiskUsage(NEEDED, 1, NEEDED - 1))
    with pytest.raises(ValueError, match="more than the disk has left"):
        write(folder, target_dir)
    assert not folder.exists()


def test_shards_that_are_there_need_no_more_room(tmp_path, target_dir, monkeypatch):
    with pytest.raises(Killed):
        write(tmp_path, target_dir, progress=kill_after(5))
    rows = len(safe_open(tmp_path / "shard-00000.safetensors", "pt").get_tensor("features"))
    missing = NEEDED - rows * WIDTH * 4
    monkeypatch.setattr(shutil, "disk_usage", lambda path: DiskUsage(NEEDED, 1, missing))
    write(tmp_path, target_dir)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_disk_that_gets_full_is_told_and_a_rerun_goes_on(tmp_path, target_dir, monkeypatch, number):
    write(tmp_path / "whole", target_dir)
    folder, write_rows, written = tmp_path / "full", feature_writing._write_rows, []

    def full_at_the_third_batch(out, rows):
        if len(written) == 2:
            out.write(b"a part")
            raise OSError(number, "full")
        written.append(len(rows))
        write_rows(out, rows)

    monkeypatch.setattr(feature_writing, "_write_rows", full_at_the_third_batch)
    with pytest.raises(ValueError) as error:
        write(folder, target_dir)
    size = (folder / "shard-00000.safetensors").stat().st_size
    for part in (f"{size} bytes", str(folder), f"{NEEDED} bytes are needed", "a rerun goes on"):
        assert part in str(error.value)
    assert list(contents(folder)) == ["shard-00000.safetensors"]
    monkeypatch.undo()
    write(folder, target_dir)
    assert contents(folder) == contents(tmp_path / "whole")


def test_other_errors_of_the_disk_stay_what_they_are(tmp_path, target_dir, monkeypatch):
    def broken(out, rows):
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(feature_writing, "_write_rows", broken)
    with pytest.raises(OSError, match="broken"):
        write(tmp_path, target_dir)
    assert not contents(tmp_path)


# ---- Damage ----


@pytest.mark.parametrize("keep", [-10, 100, 0])
def test_truncated_shard_is_named(tmp_path, target_dir, keep):
    write(tmp_path, target_dir)
    file = tmp_path / "shard-00001.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"shard-00001\.safetensors is truncated"):
        FeatureCache.open(tmp_path, fingerprint(target_dir))


def test_missing_shard_is_named(tmp_path, target_dir):
    write(tmp_path, target_dir)
    (tmp_path / "shard-00000.safetensors").unlink()
    with pytest.raises(ValueError, match=r"shard-00000\.safetensors of the feature cache is missing"):
        FeatureCache.open(tmp_path, fingerprint(target_dir))


def test_shard_of_another_shape_is_named(tmp_path, target_dir):
    write(tmp_path, target_dir)
    shutil.copy(tmp_path / "shard-00001.safetensors", tmp_path / "shard-00000.safetensors")
    with pytest.raises(ValueError, match=r"shard-00000\.safetensors holds features \[\d+, 64\]"):
        FeatureCache.open(tmp_path, fingerprint(target_dir))


def test_shard_of_another_dtype_is_named(tmp_path, target_dir):
    write(tmp_path, target_dir)
    write(tmp_path / "other", target_dir, dtype=torch.bfloat16, shard_bytes=100 * WIDTH * 2)
    shutil.copy(tmp_path / "other" / "shard-00001.safetensors", tmp_path)
    with pytest.raises(ValueError, match=r"shard-00001\.safetensors holds .* in BF16, not .* in F32"):
        FeatureCache.open(tmp_path, fingerprint(target_dir))


@pytest.mark.parametrize("text", ['{"fingerprint": ', "[]"])
def test_damaged_index_is_named(tmp_path, target_dir, text):
    write(tmp_path, target_dir)
    (tmp_path / "index.json").write_text(text)
    with pytest.raises(ValueError, match=r"index\.json is"):
        FeatureCache.open(tmp_path, fingerprint(target_dir))
