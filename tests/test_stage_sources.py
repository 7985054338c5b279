"""Which local files are meant, whether a model folder is complete, and when a content hash changes. No torch, no process."""

from __future__ import annotations

import json
import os
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest

from launcher.errors import UsageError
from launcher.stage.sources import check_model, content_sha, find_local, find_model, find_stdlib, leaves, split_of, tokenizer_sha


def fill(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"content of {name}")
    return root


@pytest.mark.parametrize(
    ("names", "kind", "found"),
    [
        pytest.param(["b.py", "a/c.py", "a.txt"], "files", ("a/c.py", "b.py"), id="sources"),
        pytest.param([".git/x.py", "a/.hidden.py", "b.py"], "files", ("b.py",), id="hidden files are left out"),
        pytest.param(["b.jsonl", "a.parquet", "notes.txt"], "records", ("a.parquet", "b.jsonl"), id="records"),
        pytest.param(["train/a.parquet", "valid/a.parquet"], "records", ("train/a.parquet", "valid/a.parquet"), id="splits as folders"),
        pytest.param(["a.py", "tests/fixture.jsonl"], "files", ("a.py",), id="records below sources are theirs"),
    ],
)
def test_a_folder_is_sources_or_records(tmp_path: Path, names: list[str], kind: str, found: tuple[str, ...]) -> None:
    local = find_local(fill(tmp_path, *names), "**/*.py")
    assert (local.kind, local.files) == (kind, found)


@pytest.mark.parametrize(
    ("names", "path", "glob", "key", "message"),
    [
        pytest.param([], "none", "**/*.py", "data.path", "does not exist", id="missing"),
        pytest.param(["a.csv"], "a.csv", "**/*.py", "data.path", r"neither \.jsonl nor \.parquet", id="another kind of file"),
        pytest.param(["a.txt"], ".", "**/*.py", "data.path", r"nothing that \*\*/\*\.py matches", id="nothing in it"),
        pytest.param(["a.py", "a.jsonl"], ".", "**/*.py", "data.path", "also a.py", id="both kinds"),
        pytest.param(["a.py"], ".", "/etc/*", "data.glob", "no pattern", id="absolute pattern"),
        pytest.param(["d/a.py", "a.py"], "d", "../*.py", "data.path", "nothing that", id="pattern that leaves"),
    ],
)
def test_what_is_no_data_is_said(tmp_path: Path, names: list[str], path: str, glob: str, key: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        find_local(fill(tmp_path, *names) / path, glob)
    assert caught.value.findings[0].key == key


@pytest.mark.parametrize(
    ("name", "split"),
    [("valid.jsonl", "valid"), ("valid-00000-of-00012.parquet", "valid"), ("valid/x.jsonl", "valid"), ("my-data.jsonl", "my-data")],
)
def test_split_of_a_file(name: str, split: str) -> None:
    assert split_of(name) == split


def test_the_standard_library_is_sources_without_tests() -> None:
    local = find_stdlib()
    assert local.root == sysconfig.get_paths()["stdlib"]
    assert {"json/decoder.py", "argparse.py"} <= set(local.files)
    assert not [name for name in local.files if "site-packages" in name or "/tests/" in name or name.startswith("test/")]
    assert list(local.files) == sorted(local.files)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda root: (root / "a.py").write_text("content of b.py"), id="content of the same size"),
        pytest.param(lambda root: (root / "a.py").rename(root / "c.py"), id="name"),
        pytest.param(lambda root: (root / "b.py").unlink(), id="a file less"),
    ],
)
def test_the_hash_changes_with_what_changes_the_data(tmp_path: Path, change: Callable[[Path], object]) -> None:
    root, cache = fill(tmp_path / "data", "a.py", "b.py"), tmp_path / "cache"
    before = content_sha(find_local(root, "**/*.py"), cache)
    change(root)
    assert content_sha(find_local(root, "**/*.py"), cache) != before


def test_the_hash_is_of_content_not_of_places_or_times(tmp_path: Path) -> None:
    one, two = fill(tmp_path / "one", "a.py", "b.py"), fill(tmp_path / "two", "a.py", "b.py")
    os.utime(two / "a.py", (1, 1))
    assert content_sha(find_local(one, "**/*.py")) == content_sha(find_local(two, "**/*.py"))


def test_the_hash_of_old_files_is_remembered(tmp_path: Path) -> None:
    root, cache = fill(tmp_path / "data", "a.py"), tmp_path / "cache"
    local = find_local(root, "**/*.py")
    content_sha(local, cache)
    assert not cache.exists(), "a file of this moment may change again without its time moving"
    os.utime(root / "a.py", (1_000_000_000, 1_000_000_000))
    sha = content_sha(local, cache)
    (remembered,) = cache.iterdir()
    assert json.loads(remembered.read_text())["sha256"] == sha
    remembered.write_text(json.dumps({"sha256": "from the cache"}))
    assert content_sha(local, cache) == "from the cache"


def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    local = find_local(fill(tmp_path, "a.py", "b.py"), "**/*.py")
    (tmp_path / "b.py").unlink()
    with pytest.raises(UsageError, match=r"b\.py: data\.path: cannot be read: No such file"):
        content_sha(local)


def test_links_out_of_a_folder(tmp_path: Path) -> None:
    fill(tmp_path, "outside.py", "data/a.py")
    (tmp_path / "data/in.py").symlink_to("a.py")
    (tmp_path / "data/out.py").symlink_to("../outside.py")
    assert [leaves(tmp_path / "data", name) for name in ("a.py", "in.py", "out.py")] == [False, False, True]


MODEL = ("config.json", "model.safetensors", "tokenizer.json")


def test_a_whole_model_passes(tmp_path: Path) -> None:
    check_model(fill(tmp_path, *MODEL), "model.path")


@pytest.mark.parametrize(
    ("lacks", "what"), [(MODEL[0], "config.json"), (MODEL[1], "safetensors weights"), (MODEL[2], "tokenizer")], ids=MODEL
)
def test_what_a_model_lacks_is_named(tmp_path: Path, lacks: str, what: str) -> None:
    fill(tmp_path, *MODEL)
    (tmp_path / lacks).write_text("")
    with pytest.raises(UsageError, match=f"has no {what}") as caught:
        check_model(tmp_path, "model.path")
    assert caught.value.findings[0].key == "model.path"


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    fill(tmp_path, "config.json", "tokenizer.json", "model-00001-of-00002.safetensors")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    with pytest.raises(UsageError, match=r"no model-00002-of-00002\.safetensors, which its index names"):
        check_model(tmp_path, "model.path")


def test_the_hash_of_a_model_sees_what_a_training_reads(tmp_path: Path) -> None:
    fill(tmp_path, "config.json", "tokenizer.json", "parts/1.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "parts/1.safetensors"}}))

    def sha() -> str:
        return content_sha(find_model(tmp_path, "model.path"))

    before = sha()
    fill(tmp_path, "README.md", "optimizer.pt", "checkpoint-1/model.safetensors")
    assert sha() == before
    seen = {before}
    for name in ("parts/1.safetensors", "config.json", "tokenizer.json", "generation_config.json"):
        (tmp_path / name).write_text("another")
        seen.add(sha())
    assert len(seen) == 5


def test_the_tokenizer_hash_sees_only_the_tokenizer(tmp_path: Path) -> None:
    before = tokenizer_sha(fill(tmp_path, *MODEL))
    fill(tmp_path, "model.safetensors.index.json", "README.md")
    assert tokenizer_sha(tmp_path) == before
    (tmp_path / "tokenizer.json").write_text("another")
    assert tokenizer_sha(tmp_path) != before
