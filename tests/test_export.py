"""Export: copies, casts and merges that ``from_pretrained`` loads, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="what is exported is trained first: pip install -e '.[train,dev]'")

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from launcher import base_model
from launcher.checkpoint import committed
from launcher.errors import ActionError, FtlaunchError, MissingError, UsageError
from launcher.export import Exported, Wanted, export
from launcher.plan import Container
from launcher.run import Run
from launcher.stage.child import Where
from launcher.train import assemble
from launcher.train.adapter import keep_nf4, quantisation
from launcher.train.export import export as child
from tests.train.training_runs import LORA, make_data, make_model, make_run, rewrite_plan, train_here

pytestmark = pytest.mark.train

FAMILIES = ("starcoder2", "gpt_bigcode", "llama")
NEEDS_BITSANDBYTES = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes: pip install -e '.[dev]'")
KINDS = ("lora", "rslora", "dora", pytest.param("qlora", marks=NEEDS_BITSANDBYTES))
TOKENS = torch.arange(1, 21)[None]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Runs of 8 steps, each made once: family, adapter's kind or None, further keys of the adapter."""
    root = tmp_path_factory.mktemp("runs")
    data = make_data(root / "data")
    made: dict[str, Run] = {}

    def run_of(family: str, kind: str | None, **more: Any) -> Run:
        name = f"{family}-{kind}-{'-'.join(more)}"
        if name not in made:
            model = root / family
            if not model.exists():
                make_model(model, family, tie_word_embeddings=family != "llama")
            adapter = "none" if kind is None else {**LORA, "kind": kind, **more}
            made[name] = make_run(root / name, model, data, adapter=adapter, training={"learning_rate": 3e-2})
            assert train_here(made[name]) == 0
        return made[name]

    return run_of


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The part that needs torch runs in this process: starting one with torch, transformers and peft takes seconds."""

    def run(self: Where, module: str, request: dict[str, Any], **_: Any) -> dict[str, Any]:
        assert module == "train.export"
        return child(json.loads(json.dumps(request)), self.say)

    monkeypatch.setattr(Where, "run", run)


def exported(run: Run, folder: Path, python: str = sys.executable, **wanted: Any) -> Exported:
    return export(run, folder, Wanted(**wanted), python=python, environ=dict(os.environ))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found = model.eval()(TOKENS).logits
    assert isinstance(found, torch.Tensor)
    return found.float()


def adapted_logits(run: Run, kind: str) -> torch.Tensor:
    """Of the final adapter on its base, by peft."""
    base = AutoModelForCausalLM.from_pretrained(run.plan().staged.model, **quantisation({"kind": kind}, "fp32"))  # type: ignore[union-attr]
    keep_nf4(base)
    return logits(PeftModel.from_pretrained(base, run.model))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_merged_model_is_the_adapter_on_its_base(tmp_path: Path, trained: Any, here: None, family: str, kind: str) -> None:
    run = trained(family, kind)
    made = exported(run, tmp_path / "out", merge=True)
    assert made.kind == "merged" and not (made.folder / "adapter_config.json").exists()
    merged, plain = (logits(AutoModelForCausalLM.from_pretrained(folder)) for folder in (made.folder, run.plan().staged.model))
    torch.testing.assert_close(merged, adapted_logits(run, kind), rtol=0, atol=2e-5)
    assert (merged - plain).abs().max() > 0.05, "the adapter changes something"
    assert AutoTokenizer.from_pretrained(made.folder).decode([3]) == "w3"


def test_modules_that_were_trained_whole_are_merged_too(tmp_path: Path, trained: Any, here: None) -> None:
    run = trained("llama", "lora", modules_to_save=["lm_head", "norm"])
    before, after = (
        load_file(folder / "model.safetensors")
        for folder in (Path(run.plan().staged.model), exported(run, tmp_path / "out", merge=True).folder)
    )
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {"lm_head.weight", "model.norm.weight"} < changed
    assert "model.embed_tokens.weight" not in changed and "model.layers.0.input_layernorm.weight" not in changed
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), adapted_logits(run, "lora"), rtol=0, atol=2e-5
    )


def test_a_merge_in_half_precision_in_several_files(tmp_path: Path, trained: Any, here: None, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trained("starcoder2", "lora")
    monkeypatch.setattr(assemble.write_model, "__kwdefaults__", {"shard_bytes": 8000})
    half, whole = (exported(run, tmp_path / str(dtype), merge=True, dtype=dtype).folder for dtype in ("bf16", None))
    index = json.loads((half / "model.safetensors.index.json").read_text())
    sizes = [(half / name).stat().st_size for name in set(index["weight_map"].values())]
    assert len(sizes) > 3 and index["metadata"]["total_size"] < sum(sizes)
    model = AutoModelForCausalLM.from_pretrained(half)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    reference = dict(AutoModelForCausalLM.from_pretrained(whole).named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, reference[name].to(torch.bfloat16)), name


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_copied_out_with_its_bases_name(tmp_path: Path, trained: Any, kind: str) -> None:
    run = trained("starcoder2", kind)
    made = exported(run, tmp_path / "out")
    config = json.loads((made.folder / "adapter_config.json").read_text())
    note = base_model.read_base(made.folder)
    assert (made.kind, config["base_model_name_or_path"], config["revision"]) == ("adapter", run.plan().staged.model, None)
    assert note is not None and note == made.base and note.weights == base_model.fingerprint(Path(note.folder))
    assert not (made.folder / "README.md").exists()
    assert (made.folder / "adapter_model.safetensors").read_bytes() == (run.model / "adapter_model.safetensors").read_bytes()
    assert AutoTokenizer.from_pretrained(made.folder).decode([3]) == "w3"


def test_the_base_of_a_hub_model_is_named_by_repository_and_commit(tmp_path: Path, trained: Any) -> None:
    run = make_run(
        tmp_path / "run",
        Path(trained("starcoder2", "lora").plan().staged.model),
        make_data(tmp_path / "data"),
        adapter=LORA,
        model={"name": "bigcode/starcoder2-3b"},
    )
    rewrite_plan(run, 0, staged={"model_revision": "c" * 40})
    assert train_here(run) == 0
    config = json.loads((exported(run, tmp_path / "out").folder / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("bigcode/starcoder2-3b", "c" * 40)


@pytest.mark.parametrize("kind", [*KINDS, None])
def test_the_last_checkpoint_exports_what_the_final_model_is(tmp_path: Path, trained: Any, here: None, kind: str | None) -> None:
    run = trained("llama", kind)
    step = committed(run)[-1].step
    final, checkpoint = (exported(run, tmp_path / str(number), step=number).folder for number in (None, step))
    name = "model.safetensors" if kind is None else "adapter_model.safetensors"
    one, other = (load_file(folder / name) for folder in (final, checkpoint))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    assert sorted(path.name for path in final.iterdir()) == sorted(path.name for path in checkpoint.iterdir())
    if kind is not None:
        configs = [json.loads((folder / "adapter_config.json").read_text()) for folder in (final, checkpoint)]
        for config in configs:
            config["target_modules"] = sorted(config["target_modules"])
        assert configs[0] == configs[1]
        merged = [
            load_file(exported(run, tmp_path / f"m{number}", step=number, merge=True).folder / "model.safetensors")
            for number in (None, step)
        ]
        assert all(torch.equal(merged[0][key], merged[1][key]) for key in merged[0])


def test_a_checkpoint_of_an_adapter_with_whole_modules(tmp_path: Path, trained: Any, here: None) -> None:
    run = trained("llama", "lora", modules_to_save=["lm_head", "norm"])
    final, checkpoint = (exported(run, tmp_path / str(number), step=number).folder for number in (None, committed(run)[-1].step))
    base = Path(run.plan().staged.model)
    one, other = (logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)) for folder in (final, checkpoint))
    assert torch.equal(one, other)


def test_a_whole_model_in_another_dtype(tmp_path: Path, trained: Any, here: None) -> None:
    run = trained("gpt_bigcode", None)
    plain, half = (exported(run, tmp_path / str(dtype), dtype=dtype).folder for dtype in (None, "fp16"))
    assert (plain / "model.safetensors").read_bytes() == (run.model / "model.safetensors").read_bytes()
    model = AutoModelForCausalLM.from_pretrained(half)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}
    weights = load_file(plain / "model.safetensors")
    assert all(torch.equal(tensor, weights[name].half()) for name, tensor in load_file(half / "model.safetensors").items())


def test_the_process_that_has_torch(tmp_path: Path, trained: Any) -> None:
    run, said = trained("starcoder2", "lora"), list[str]()
    export(run, tmp_path / "out", Wanted(merge=True), python=sys.executable, environ=dict(os.environ), say=said.append)
    assert (tmp_path / "out" / "model.safetensors").exists() and "merging the lora adapter" in said[0]
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "nothing else is left"


def test_the_runs_image_is_what_has_torch(tmp_path: Path, trained: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run, image = trained("starcoder2", "rslora"), tmp_path / "x.sif"
    image.write_text("")
    plan = dataclasses.replace(run.plan(), container=Container("apptainer", str(image), "1" * 64, command="/bin/false"))
    monkeypatch.setattr(Run, "plan", lambda *_: plan)
    started: list[list[str]] = []
    real = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda argv, **more: started.append(argv) or real(argv, **more))
    with pytest.raises(ActionError, match=r"export\.log: the export ended with 1 without an answer"):
        exported(run, tmp_path / "out" / "model", merge=True)
    (argv,) = started
    assert argv[:2] == ["/bin/false", "exec"] and argv[-4:-1] == ["python3", "-m", "launcher.train.export"]
    read_only = {f"type=bind,source={folder},destination={folder},ro" for folder in (run.root, plan.staged.model)}  # type: ignore[union-attr]
    assert read_only < set(argv), "the run and the base"
    assert not list((tmp_path / "out").iterdir())


def test_an_interpreter_without_torch(tmp_path: Path, trained: Any) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
    with pytest.raises(MissingError, match=r"has no torch, safetensors, transformers.*pip install 'ftlaunch\[train\]'"):
        exported(trained("starcoder2", "lora"), tmp_path / "out", str(tmp_path / "bare/bin/python"), merge=True)
    assert exported(trained("starcoder2", "lora"), tmp_path / "out", str(tmp_path / "bare/bin/python")).kind == "adapter"


def _no_model(run: Run, _: Path) -> dict[str, Any]:
    run.model.rename(run.root / "gone")
    return {}


def _damaged(run: Run, _: Path) -> dict[str, Any]:
    (run.checkpoint(8) / "model.safetensors").write_bytes(b"short")
    return {"step": 8}


def _other_base(run: Run, _: Path) -> dict[str, Any]:
    path = Path(run.plan().staged.model) / "model.safetensors"  # type: ignore[union-attr]
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    return {"merge": True}


def _base_gone(run: Run, _: Path) -> dict[str, Any]:
    Path(run.plan().staged.model).rename(run.root / "base")  # type: ignore[union-attr]
    return {"merge": True}


def _no_image(run: Run, _: Path) -> dict[str, Any]:
    rewrite_plan(run, 0, container={"use": "apptainer", "image": "/nowhere/x.sif"})
    return {"merge": True}


def _out_exists(_: Run, out: Path) -> dict[str, Any]:
    out.mkdir()
    return {}


REFUSED = {
    "no final model": (_no_model, UsageError, "has no final model (when it is finished: ftlaunch status run; a checkpoint of it: --from"),
    "damaged checkpoint": (_damaged, ActionError, "the checkpoint is damaged: "),
    "other weights below": (_other_base, ActionError, "are not those that the adapter was trained on"),
    "base gone": (_base_gone, MissingError, "the model that the run started from is not here any more"),
    "image gone": (_no_image, MissingError, "the run's image /nowhere/x.sif is not here any more, and export needs its torch"),
    "out is there": (_out_exists, UsageError, "is there already (name a folder that is not there yet)"),
    "dtype of an adapter": (lambda *_: {"dtype": "bf16"}, UsageError, "an adapter stays in the fp32 that it was trained in (--merge"),
}


@pytest.mark.parametrize(("prepare", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(tmp_path: Path, prepare: Any, error: type[FtlaunchError], message: str) -> None:
    model = make_model(tmp_path / "model")
    run = make_run(tmp_path / "run", model, make_data(tmp_path / "data", 60), adapter=LORA)
    assert train_here(run) == 0
    out = tmp_path / "out"
    with pytest.raises(error) as caught:
        exported(run, out, **prepare(run, out))
    assert message in str(caught.value)
    assert not list(tmp_path.glob(".out-*")) and (prepare is _out_exists or not out.exists())


def test_a_run_of_all_weights_has_nothing_to_merge(tmp_path: Path, trained: Any) -> None:
    with pytest.raises(UsageError, match="trained all weights: there is nothing to merge"):
        exported(trained("gpt_bigcode", None), tmp_path / "out", merge=True)


def test_the_command(tmp_path: Path, trained: Any) -> None:
    run = trained("starcoder2", "dora")
    run.record_file.write_text("{}")
    environ = {**os.environ, "FTLAUNCH_RUNS": str(run.root.parent), "PYTHONPATH": str(Path(__file__).parents[1])}

    def ftlaunch(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "launcher.cli", "export", *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environ)

    done = ftlaunch(str(run.root), "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert (document["kind"], document["folder"]) == ("adapter", str(tmp_path / run.id))
    assert (tmp_path / run.id / "adapter_config.json").is_file()
    done = ftlaunch(str(run.root), "--from", "epoch-7")
    assert done.returncode == 2 and "has no checkpoint 'epoch-7' (there are: epoch-1)" in done.stderr
    assert ftlaunch(str(run.root), "--dtype", "int8").returncode == 2
