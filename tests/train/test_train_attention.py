"""Every kind of attention computes the same, padded, flattened and packed, as each document alone; and what was planned is what runs.

Kernels that need a GPU have dense stand-ins here, so that what they are handed is checked everywhere. The kernels themselves: the last
tests, on a machine that has them.
"""

import importlib.util
import warnings
from contextlib import contextmanager

import numpy as np
import pytest
from training_runs import SEQUENCE, VOCABULARY, make_data, make_model, make_run, torch, train_here
from transformers import AutoConfig, AutoModelForCausalLM

from launcher.bench.measure import only_backend
from launcher.errors import GateError
from launcher.run import Run
from launcher.train import attention, xformers_attention
from launcher.train import model as model_module
from launcher.train.attention import TRANSFORMERS_4, attention_name, fit_attention
from launcher.train.batches import NO_TARGET, MicroBatch
from launcher.train.borders import block_numbers, borders, form_for, require_borders
from launcher.train.watch import require_attention

pytestmark = pytest.mark.train

CPU = torch.device("cpu")
FAMILIES = ["starcoder2", "gpt_bigcode", "llama"]
LAYOUTS = ["padded", "flatten", "documents"]
WINDOW = 5
LENGTHS = (7, 11, 3, 9, 10, 4)
GENERATOR = np.random.default_rng(3)
DOCUMENTS = [torch.from_numpy(GENERATOR.integers(1, VOCABULARY, length)) for length in LENGTHS]


def batch_of(layout: str) -> MicroBatch:
    """All documents: a row each with pads; one row; or two rows of three, the shorter one with pads at its end."""
    if layout == "padded":
        return rows_of([[document] for document in DOCUMENTS], marked=True)
    return rows_of([DOCUMENTS] if layout == "flatten" else [DOCUMENTS[:3], DOCUMENTS[3:]], marked=False)


def rows_of(rows, *, marked: bool) -> MicroBatch:
    shape = (len(rows), max(sum(map(len, row)) for row in rows))
    ids, targets, mask = torch.zeros(shape, dtype=torch.int64), torch.full(shape, NO_TARGET), torch.zeros(shape, dtype=torch.int64)
    positions, documents = torch.zeros(shape, dtype=torch.int64), torch.full(shape, -1)
    for b, row in enumerate(rows):
        start = 0
        for number, document in enumerate(row):
            here = slice(start, start + len(document))
            ids[b, here], mask[b, here], documents[b, here] = document, 1, number
            targets[b, start : start + len(document) - 1] = document[1:]
            positions[b, here] = torch.arange(len(document))
            start += len(document)
    return MicroBatch(ids, targets, mask) if marked else MicroBatch(ids, targets, None, positions, documents)


def forward(model, form, batch: MicroBatch):
    arguments = {} if batch.position_ids_BS is None else {"position_ids": batch.position_ids_BS.to(model.device)}
    with borders(model, form, batch.documents_BS, batch.attention_mask_BS, tuple(batch.input_ids_BS.shape)) as kept_apart:
        return model(batch.input_ids_BS.to(model.device), use_cache=False, **arguments, **kept_apart).logits.float()


def real_logits(logits_BSV, batch: MicroBatch):
    real_BS = batch.attention_mask_BS == 1 if batch.documents_BS is None else batch.documents_BS >= 0
    return logits_BSV[real_BS.to(logits_BSV.device)]


def loss_sum(logits_BSV, batch: MicroBatch):
    targets = batch.targets_BS.to(logits_BSV.device).flatten()
    return torch.nn.functional.cross_entropy(logits_BSV.flatten(0, 1), targets, reduction="sum", ignore_index=NO_TARGET)


def gradients(model):
    return {name: parameter.grad.cpu() for name, parameter in model.named_parameters() if parameter.grad is not None}


def alone(folder):
    """Logits and gradients of each document by itself, eager, in fp32 on CPU."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    logits = []
    for document in DOCUMENTS:
        batch = rows_of([[document]], marked=True)
        out = forward(model, form_for(model.config.model_type, "eager"), batch)
        loss_sum(out, batch).backward()
        logits.append(out.detach()[0])
    return torch.cat(logits), gradients(model)


BY_BLOCKS = "sdpa by blocks"
KINDS = ["eager", "sdpa", "xformers", *([] if TRANSFORMERS_4 else [BY_BLOCKS])]


def build(folder, kind: str):
    config = AutoConfig.from_pretrained(folder)
    name = attention_name(kind.split()[0], config, by_blocks=kind == BY_BLOCKS)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=name)
    fit_attention(model, kind)
    return model.eval()


def form_of(model_type: str, kind: str):
    return form_for(model_type, kind.split()[0], by_blocks=kind == BY_BLOCKS)


def dense(query_THD, key_THD, value_THD, visible_TT, scale: float):
    scores_HTT = torch.einsum("qhd,khd->hqk", query_THD, key_THD) * scale
    return torch.einsum("hqk,khd->qhd", scores_HTT.masked_fill(~visible_TT, float("-inf")).softmax(-1), value_THD)


def visible(lengths, window: int | None):
    numbers = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    seen_TT = (numbers[:, None] == numbers[None, :]).tril()
    return seen_TT if window is None else seen_TT.triu(1 - window)


@pytest.fixture
def xformers_stand_in(monkeypatch):
    """xformers' operator, computed densely from its mask: its own where the package is installed, else one like it."""

    class Mask:
        def __init__(self, lengths, window):
            self._visible = visible(lengths, window)

        def materialize(self, shape):
            return torch.zeros(shape).masked_fill(~self._visible, float("-inf"))

    def operator(query, key, value, bias, dropout, scale):
        total = query.shape[1]
        return dense(query[0], key[0], value[0], bias.materialize((total, total)) == 0, scale)[None]

    monkeypatch.setattr(xformers_attention, "operator", operator)
    if importlib.util.find_spec("xformers") is None:
        monkeypatch.delitem(attention._LIBRARIES, "xformers")
        monkeypatch.setattr(xformers_attention, "causal_bias", lambda lengths, window, device: Mask(lengths, window))


@pytest.fixture
def flash_stand_in(monkeypatch):
    """flash-attn's varlen function, computed densely, below transformers' own entry."""
    import transformers.modeling_flash_attention_utils as flash

    def varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, softmax_scale, dropout_p=0.0, window_size=(-1, -1)):
        lengths = cu_seqlens_q.diff().tolist()
        assert causal and max_seqlen_q == max_seqlen_k == max(lengths) and torch.equal(cu_seqlens_q, cu_seqlens_k)
        group = q.shape[1] // k.shape[1]
        window = None if window_size[0] < 0 else window_size[0] + 1
        return dense(q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), visible(lengths, window), softmax_scale)

    varlen.__module__ = "flash_attn.flash_attn_interface"
    process = flash._lazy_define_process_function(varlen)
    monkeypatch.setattr(flash, "_flash_varlen_fn", varlen)
    monkeypatch.setattr(flash, "lazy_import_flash_attention", lambda *_, **__: ((None, varlen, None, None, None), (process, process)))


@contextmanager
def flex_uncompiled():
    """Compiling for every shape would take minutes; what is compiled is the same function."""
    from torch.nn.attention import flex_attention as torch_flex
    from transformers.integrations import flex_attention as flex

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        patch.setattr(
            flex, "compile_friendly_flex_attention", lambda *tensors, training, **rest: torch_flex.flex_attention(*tensors, **rest)
        )
        yield


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Family and window → a model's folder, and the logits and gradients of each document alone; made once."""
    made = {}

    def prepare(model_type: str, window: int | None = None):
        if (model_type, window) not in made:
            folder = make_model(tmp_path_factory.mktemp("model"), model_type, **({"sliding_window": window} if window else {}))
            made[model_type, window] = (folder, *alone(folder))
        return made[model_type, window]

    return prepare


def check_kind(prepared, kind: str, layout: str, *, backward: bool = True) -> None:
    """Logits and gradients of the batch are those of its documents alone."""
    folder, expected_logits, expected_gradients = prepared
    batch, model = batch_of(layout), build(folder, kind)
    model_type = model.config.model_type
    with torch.set_grad_enabled(backward):
        logits = forward(model, form_of(model_type, kind), batch)
    torch.testing.assert_close(real_logits(logits, batch), expected_logits, rtol=0, atol=3e-6)
    if backward:
        loss_sum(logits, batch).backward()
        torch.testing.assert_close(gradients(model), expected_gradients, rtol=0, atol=2e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_logits_and_gradients_are_those_of_the_documents_alone(prepared, xformers_stand_in, model_type, kind, layout):
    check_kind(prepared(model_type), kind, layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_beyond_the_sliding_window(prepared, xformers_stand_in, kind, layout):
    check_kind(prepared("starcoder2", WINDOW), kind, layout)


@pytest.mark.parametrize("kind", KINDS)
def test_a_window_of_5_sees_5_positions(tmp_path, xformers_stand_in, kind):
    make_model(tmp_path, "starcoder2", sliding_window=WINDOW, num_hidden_layers=1)
    model, form = build(tmp_path, kind), form_of("starcoder2", kind)
    document = torch.arange(1, 13)
    logits = {}
    for changed in (None, 11 - WINDOW + 1, 11 - WINDOW):
        tokens = document.clone()
        if changed is not None:
            tokens[changed] = 40
        logits[changed] = forward(model, form, rows_of([[tokens]], marked=True))[0, 11]
    assert torch.equal(logits[None], logits[11 - WINDOW]) and not torch.equal(logits[None], logits[11 - WINDOW + 1])


@pytest.mark.skipif(TRANSFORMERS_4, reason="flex came with transformers 5")
@pytest.mark.parametrize(
    ("model_type", "window", "layout"),
    [("starcoder2", None, "padded"), ("starcoder2", WINDOW, "flatten"), ("starcoder2", WINDOW, "documents"), ("llama", None, "documents")],
)
def test_flex_forward(prepared, model_type, window, layout):
    with flex_uncompiled():
        check_kind(prepared(model_type, window), "flex", layout, backward=False)


@pytest.mark.skipif(TRANSFORMERS_4, reason="transformers 4 has its own class for each model, and no borders: the planner refuses them")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("model_type", "window"), [(name, None) for name in FAMILIES] + [("starcoder2", WINDOW)])
def test_flash_attention_gets_the_borders(prepared, flash_stand_in, model_type, window, layout):
    folder, expected_logits, expected_gradients = prepared(model_type, window)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    model.config._attn_implementation = "flash_attention_2"  # from_pretrained would look for the library
    form, batch = form_for(model_type, "flash2"), batch_of(layout)
    logits = forward(model, form, batch)
    loss_sum(logits, batch).backward()
    torch.testing.assert_close(real_logits(logits, batch), expected_logits, rtol=0, atol=3e-6)
    torch.testing.assert_close(gradients(model), expected_gradients, rtol=0, atol=2e-5)
    require_borders(model, form, CPU)
    assert require_attention(model, "flash2", form, SEQUENCE, "flatten").layers == 2
    with pytest.raises(GateError, match="the plan says flash3 in all 2 layers, the model computes with flash2 in 2 layers"):
        require_attention(model, "flash3", form, SEQUENCE, "flatten")


@pytest.mark.parametrize("lengths", [(3, 5), (6, 1, 2)])
@pytest.mark.parametrize("window", [None, 2], ids=["whole", "window"])
def test_the_stand_in_masks_as_xformers_does(lengths, window):
    pytest.importorskip("xformers", reason="compares with xformers' own masks: pip install --no-deps xformers", exc_type=ImportError)
    total = sum(lengths)
    mask = xformers_attention.causal_bias(lengths, window, CPU).materialize((total, total)) == 0
    assert torch.equal(mask, visible(lengths, window))


def test_a_block_ends_with_its_document_its_pads_and_its_row():
    documents_BS = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 2]])
    mask_BS = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    assert block_numbers(documents_BS, mask_BS, (2, 4)).tolist() == [[0, 0, 1, 2], [3, 4, 4, 5]]
    assert block_numbers(None, None, (2, 3)).tolist() == [[0, 0, 0], [1, 1, 1]]


# what was planned is what runs


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_operators_that_run_are_counted(prepared, xformers_stand_in, model_type, kind):
    model, form = build(prepared(model_type)[0], kind), form_of(model_type, kind)
    kind = kind.split()[0]
    before = torch.nn.functional.scaled_dot_product_attention, xformers_attention.operator
    for packing in ("none", "flatten", "documents", "concatenate"):
        ran = require_attention(model, kind, form, SEQUENCE, packing)
        assert ran.layers == 2 and bool(ran.operators) == (kind == "sdpa") and set(ran.operators) <= {"flash", "math"}
    assert before == (torch.nn.functional.scaled_dot_product_attention, xformers_attention.operator)
    assert not any(module._forward_pre_hooks for module in model.modules())
    for other in {"eager", "sdpa", "xformers", "flex", "flash2", "flash3"} - {kind}:
        with pytest.raises(GateError, match=f"the plan says {other} in all 2 layers, the model computes with {kind} in 2 layers"):
            require_attention(model, other, form, SEQUENCE, "flatten")


def test_a_layer_of_another_kind_is_found(prepared):
    model, stranger = (build(prepared("llama")[0], kind) for kind in ("sdpa", "eager"))
    model.model.layers[1].self_attn = stranger.model.layers[1].self_attn
    with pytest.raises(GateError, match=r"the plan says sdpa in all 2 layers, the model computes with (eager|sdpa) in 1 layers"):
        require_attention(model, "sdpa", "visible" if not TRANSFORMERS_4 else "additive", SEQUENCE, "flatten")


@pytest.mark.parametrize("backend", ["flash", "math"])
def test_sdpa_says_which_backend_ran(prepared, backend):
    model = build(prepared("starcoder2")[0], "sdpa")
    with only_backend(backend):
        assert require_attention(model, "sdpa", "additive", SEQUENCE, "concatenate").operators == (backend,)


@pytest.mark.parametrize(("planned", "loaded"), [("sdpa", "eager"), ("eager", "sdpa")])
def test_training_stops_when_it_falls_back_from_the_plan(tmp_path, monkeypatch, planned, loaded):
    run = make_run(tmp_path / "run", make_model(tmp_path / "model"), make_data(tmp_path / "data", 8), attention=planned)
    monkeypatch.setattr(model_module, "attention_name", lambda *_, **__: loaded)
    with pytest.raises(GateError, match=f"the plan says {planned} in all 2 layers, the model computes with {loaded}"):
        train_here(run)
    assert not run.metrics_file.exists()


def test_a_run_records_its_attention(tmp_path):
    run = make_run(tmp_path / "run", make_model(tmp_path / "model"), make_data(tmp_path / "data", 8), data={"packing": "flatten"})
    assert train_here(run) == 0
    (event,) = Run(run.root).events("attention")
    assert (event["kind"], event["layers"]) == ("sdpa", 2) and event["operators"] == ["flash"]


@pytest.mark.parametrize(
    ("kind", "config", "message"),
    [
        ("flash2", {}, "flash2 needs the Python package flash_attn"),
        ("flash3", {}, "flash3 needs the Python package flash_attn_interface|no flash3"),
        ("flex", {"model_type": "gpt_bigcode"}, "gpt_bigcode has no flex attention|no flex"),
        ("flex", {"attention_dropout": 0.1}, "flex has no dropout, this model's attention has 0.1|no flex"),
    ],
)
def test_what_cannot_be_is_refused_before_the_model_is_loaded(kind, config, message):
    if importlib.util.find_spec("flash_attn") is not None and kind.startswith("flash"):
        pytest.skip("flash-attn is installed here")
    values = dict(config)
    with pytest.raises(GateError, match=message):
        attention_name(kind, AutoConfig.for_model(values.pop("model_type", "starcoder2"), **values))


# the kernels themselves

GPU_KINDS = ["sdpa", "flash2", "flash3", "xformers", "flex"]


def missing_for(kind: str, model_type: str) -> str | None:
    """What this machine lacks to run a kind."""
    if not torch.cuda.is_available():
        return "needs an NVIDIA GPU"
    capability = torch.cuda.get_device_capability()
    library = {"flash2": "flash_attn", "flash3": "flash_attn_interface", "xformers": "xformers"}.get(kind)
    if library is not None and importlib.util.find_spec(library) is None:
        return f"needs the Python package {library}"
    if capability < {"flash2": (8, 0), "flash3": (9, 0)}.get(kind, (7, 0)):
        return f"{kind} does not run on compute capability {capability}"
    if kind == "flex" and (model_type == "gpt_bigcode" or TRANSFORMERS_4):
        return "gpt_bigcode and transformers 4 have no flex attention"
    if kind == "flash2" and TRANSFORMERS_4:
        return "flash attention of transformers 4 knows no borders"
    return None


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("window", [None, 32], ids=["whole", "window"])
@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("kind", GPU_KINDS)
def test_on_a_gpu(tmp_path, kind, model_type, window, layout):
    """In bf16 by autocast as in training, against fp32 on CPU: heads of 64, which every kernel takes."""
    reason = missing_for(kind, model_type)
    if reason is not None:
        pytest.skip(reason)
    wide = {"n_embd": 256} if model_type == "gpt_bigcode" else {"hidden_size": 256}
    make_model(tmp_path, model_type, **wide, **({"sliding_window": window} if window and model_type == "starcoder2" else {}))
    expected_logits, expected_gradients = alone(tmp_path)
    model, batch, form = build(tmp_path, kind).to("cuda"), batch_of(layout), form_for(model_type, kind)
    dtype = torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float16
    with torch.autocast("cuda", dtype):
        logits = forward(model, form, batch)
        require_borders(model, form, torch.device("cuda"))
        require_attention(model, kind, form, SEQUENCE, {"padded": "none"}.get(layout, layout))
    loss_sum(logits, batch).backward()
    torch.testing.assert_close(real_logits(logits, batch).cpu(), expected_logits, rtol=0.03, atol=0.03)
    for name, gradient in gradients(model).items():
        distance = (gradient - expected_gradients[name]).norm() / expected_gradients[name].norm().clamp(min=1e-6)
        assert distance < 0.05, f"{name}: {distance:.3f}"
