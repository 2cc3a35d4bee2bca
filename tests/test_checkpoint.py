"""Files: the same tensors from every form, the model that they are, and states in everyone's layout.

What a user sees of a file that cannot be used is in test_cli.py.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import rwkv_peft as rp
from conftest import RANDOM, PypiRwkv, difference, random_model, random_rwkv7, random_tokens
from rwkv_peft.checkpoint import fingerprint, read_tensors, write_tensors
from rwkv_peft.errors import CheckpointError, ConfigError, OutputError
from rwkv_peft.export.states import check_state
from rwkv_peft.files import write_atomic, write_text
from rwkv_peft.loading import check_model, load_model
from rwkv_peft.models import MODELS, ModelState, Rwkv5Sizes, Rwkv6Sizes, Rwkv7, Rwkv7aSizes, Rwkv7Sizes, Sizes

FORMS = (".pth", ".safetensors")


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Equal to the bit, names and types too."""
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


# --- reading and writing


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tensors_come_back_as_they_were(form: str, dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = random_rwkv7(layer0_v=True, dtype=dtype)
    write_tensors(tmp_path / f"a{form}", tensors)
    assert same(read_tensors(tmp_path / f"a{form}"), tensors)
    assert [p.name for p in tmp_path.iterdir()] == [f"a{form}"]


@pytest.mark.parametrize("form", FORMS)
def test_views_parameters_and_shared_storage_are_written_alone(form: str, tmp_path: Path) -> None:
    whole = torch.randn(1000, 10)
    tensors = {"a": whole[:2], "b": whole[:, 3], "c": whole[:5].T, "d": torch.nn.Parameter(whole[7])}
    write_tensors(tmp_path / f"a{form}", tensors)
    assert same(read_tensors(tmp_path / f"a{form}"), {n: t.detach() for n, t in tensors.items()})
    assert (tmp_path / f"a{form}").stat().st_size < 10_000  # not the 40,000 bytes behind the views


@pytest.mark.parametrize("form", FORMS)
def test_files_have_the_permissions_of_any_new_file(form: str, tmp_path: Path) -> None:
    (tmp_path / "new").touch()
    write_tensors(tmp_path / f"a{form}", {"x": torch.zeros(3)})
    assert (tmp_path / f"a{form}").stat().st_mode == (tmp_path / "new").stat().st_mode


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layer0_v", [True, False])
def test_every_form_gives_the_same_model(form: str, layer0_v: bool, tmp_path: Path) -> None:
    sizes = {"layers": 3, "width": 128, "ranks": (5, 7, 3, 11), "ffn": 200, "vocab_size": 300}
    tensors = random_rwkv7(layer0_v=layer0_v, **sizes)
    write_tensors(tmp_path / f"m{form}", tensors)
    model = load_model(tmp_path / f"m{form}")
    assert model.sizes == Rwkv7Sizes(3, 128, 64, 300, 200, rank_w=5, rank_a=7, rank_v=3, rank_g=11)
    assert same(dict(model.state_dict()), {n: t for n, t in tensors.items() if n not in Rwkv7.unused})
    assert (model.training, model.source, model.fingerprint) == (False, f"m{form}", fingerprint(tensors))


SIZES: dict[str, tuple[dict[str, Any], Sizes]] = {
    "x052": ({}, Rwkv5Sizes(3, 128, 32, 300, 200)),
    "x060": ({"ranks": (3, 5)}, Rwkv6Sizes(3, 128, 32, 300, 200, rank_mix=3, rank_decay=5)),
    "x070": (
        {"ranks": (5, 7, 3, 11)},
        Rwkv7Sizes(3, 128, 32, 300, 200, rank_w=5, rank_a=7, rank_v=3, rank_g=11),
    ),
    "x070a": (
        {"ranks": (5, 7, 3, 11), "rank_s": 6},
        Rwkv7aSizes(3, 128, 32, 300, 200, rank_w=5, rank_a=7, rank_v=3, rank_g=11, rank_s=6),
    ),
}


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("version", SIZES)
def test_every_version_keeps_names_and_shapes(version: str, flat: bool, tmp_path: Path) -> None:
    """Every size is the file's, and a vector may be (D,) or (1,1,D)."""
    own, sizes = SIZES[version]
    tensors = random_model(version, flat, layers=3, width=128, head_size=32, vocab_size=300, ffn=200, **own)
    assert any(t.shape[:2] == (1, 1) for t in tensors.values()) != flat
    write_tensors(tmp_path / "m.pth", tensors)
    model = load_model(tmp_path / "m.pth")
    assert (type(model), model.sizes, model.sizes.heads) == (MODELS[version], sizes, 4)
    assert same(dict(model.state_dict()), tensors)
    assert model.fingerprint == fingerprint(tensors)


@pytest.mark.parametrize("version", MODELS)
def test_the_part_time_is_what_official_names_say(version: str, load: Callable[..., Any]) -> None:
    model = load(version=version)
    got = {f"{n}.{p}" for n, m in model.named_modules() for p in getattr(m, "time_parameters", ()) if hasattr(m, p)}
    if version in ("x052", "x060"):
        want = {n for n, _ in model.named_parameters() if ".time_" in n}
    else:
        ends = (".w0", ".a0", ".v0", ".k_k", ".k_a", ".r_k")
        want = {n for n, _ in model.named_parameters() if ".x_" in n or n.endswith(ends)}
    assert got == want


def test_a_model_outlives_its_file(tmp_path: Path) -> None:
    """The file is memory-mapped while it loads, and may change afterwards."""
    tensors = random_rwkv7()
    write_tensors(tmp_path / "m.pth", tensors)
    model = load_model(tmp_path / "m.pth")
    with (tmp_path / "m.pth").open("r+b") as file:
        file.write(b"\0" * (tmp_path / "m.pth").stat().st_size)
    assert torch.equal(model.emb.weight, tensors["emb.weight"])


@pytest.mark.parametrize(
    ("dtype", "number"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_weights_are_cast(
    dtype: str, number: torch.dtype, stored: torch.dtype, model_file: Callable[..., Path]
) -> None:
    tensors = random_rwkv7(dtype=stored)
    model = load_model(model_file(dtype=stored), dtype)
    assert model.dtype == number
    assert same(dict(model.state_dict()), {n: t.to(number) for n, t in tensors.items()})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("blocks.1.att.w2"), r"tensor blocks\.1\.att\.w2 is missing"),
        (lambda w: w.pop("emb.weight"), r"tensor emb\.weight is missing"),
        (lambda w: w.update({"head.weight": w["head.weight"][:-1]}), r"tensor head\.weight has shape \(256, 64\)"),
        (lambda w: w.update({"blocks.1.att.w1": w["blocks.1.att.w1"][:, :-1]}), r"att\.w1 has shape \(64, 7\)"),
        (lambda w: w.update({"blocks.0.att.x": torch.zeros(1)}), r"holds 1 tensors .* blocks\.0\.att\.x"),
        (lambda w: w.update({"blocks.0.qkv.q_emb.weight": torch.zeros(1)}), r"holds an RWKV-7b model; supported are"),
        (lambda w: w["ln_out.bias"].fill_(float("nan")), r"tensor ln_out\.bias holds 64 NaN or Inf of 64"),
        (lambda w: w["blocks.0.ffn.key.weight"][3].fill_(float("inf")), r"ffn\.key\.weight holds 64 NaN or Inf"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_whole_model(change: Callable[[Any], Any], message: str, tmp_path: Path) -> None:
    tensors = random_rwkv7()
    change(tensors)
    write_tensors(tmp_path / "m.pth", tensors)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_model(tmp_path / "m.pth")
    assert str(caught.value).startswith(f"{tmp_path / 'm.pth'}: ")


def early(tensors: dict[str, Tensor], changes: dict[str, str], dropped: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """A 5.2 file made to look earlier: vectors of heads are (H,), some tensors are renamed or not there."""
    heads = {n: t[:, 0] if n.endswith((".time_decay", ".time_faaaa")) else t for n, t in tensors.items()}
    for old, new in changes.items():
        heads = {n.replace(old, new): t for n, t in heads.items()}
    return {n: t for n, t in heads.items() if not any(d in n for d in dropped)}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda w: early(w, {"time_faaaa": "time_first"}, ("gate", "mix_g", "ln_x")),
            "an RWKV-4 or early RWKV-5 model",
        ),
        (lambda w: early(w, {"time_faaaa": "time_first"}, ("gate", "mix_g")), "an RWKV-4 or early RWKV-5 model"),
        (lambda w: early(w, {}, ("gate", "mix_g")), r"an early RWKV-5 model \(time_decay \(2,\), not \(H,N\)\)"),
        (lambda w: early(w, {}), r"an early RWKV-5 model \(time_decay \(2,\), not \(H,N\)\)"),
        (
            lambda w: {n: t[..., None] if n.endswith("y") else t for n, t in early(w, {}).items()},
            "an early RWKV-5 model",
        ),
        (lambda w: {}, r"no RWKV model \(its first tensors are none\)"),
    ],
    ids=["4", "5.0", "5.0 with time_faaaa", "5.1", "5.1 (H,1)", "nothing"],
)
def test_other_versions_are_named(make: Callable[[Any], Any], message: str, tmp_path: Path) -> None:
    write_tensors(tmp_path / "m.pth", make(random_model("x052")))
    with pytest.raises(CheckpointError, match=f"m.pth: holds {message}.*get") as caught:
        load_model(tmp_path / "m.pth")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("version", "change", "message"),
    [
        ("x052", lambda w: w.pop("blocks.1.att.gate.weight"), r"tensor blocks\.1\.att\.gate\.weight is missing"),
        ("x052", lambda w: w.update({"blocks.1.att.time_decay": torch.zeros(1, 64)}), r"_decay has shape \(1, 64\)"),
        ("x060", lambda w: w.pop("blocks.0.att.time_maa_w2"), r"tensor blocks\.0\.att\.time_maa_w2 is missing"),
        ("x060", lambda w: w.update({"blocks.1.att.time_maa_w1": torch.zeros(64, 21)}), r"_w1 has shape \(64, 21\)"),
        ("x060", lambda w: w.update({"blocks.1.att.time_decay": torch.zeros(2, 32)}), r"_decay has shape \(2, 32\)"),
        ("x070a", lambda w: w.update({"blocks.1.ffn.s0": torch.zeros(64)}), r"s0 has shape \(64,\); .* \(1, 1, 256\)"),
        ("x070a", lambda w: w.update({"blocks.1.ffn.s1": torch.zeros(64, 31)}), r"s1 has shape \(64, 31\)"),
        ("x070a", lambda w: w.update({"blocks.0.ffn.s_emb.weight": torch.zeros(9, 9)}), r"emb\.weight .*1024"),
    ],
)  # fmt: skip
def test_tensors_of_a_version_that_do_not_fit(
    version: str, change: Callable[[Any], Any], message: str, tmp_path: Path
) -> None:
    tensors = random_model(version)
    change(tensors)
    write_tensors(tmp_path / "m.pth", tensors)
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path / "m.pth")


# --- a learned state in a model file (what it does is in test_models.py)

WKV_STATE = {f"blocks.{i}.att.time_state": torch.ones(2, 32, 32) for i in range(2)}
SHIFT_STATE = {f"blocks.{i}.{mix}.shift_state": torch.ones(64) for i in range(2) for mix in ("att", "ffn")}


@pytest.mark.parametrize("version", RANDOM)
@pytest.mark.parametrize("state", [WKV_STATE, SHIFT_STATE, WKV_STATE | SHIFT_STATE], ids=["wkv", "shift", "both"])
def test_a_state_is_loaded_under_its_names(version: str, state: dict[str, Tensor], tmp_path: Path) -> None:
    tensors = random_model(version, head_size=32)
    write_tensors(tmp_path / "m.pth", tensors | state)
    model = load_model(tmp_path / "m.pth")
    assert same(dict(model.state_dict()), tensors | state)
    assert model.fingerprint == fingerprint(tensors | state) != fingerprint(tensors)
    with torch.no_grad():
        start = model.initial_state(3)
    assert float(start.wkv.mean()) == ("blocks.0.att.time_state" in state)
    assert float(start.shift.mean()) == ("blocks.0.att.shift_state" in state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("blocks.1.att.time_state"), r"tensor blocks\.1\.att\.time_state is missing"),
        (lambda s: s.pop("blocks.0.ffn.shift_state"), r"tensor blocks\.0\.ffn\.shift_state is missing"),
        (lambda s: s.update({"blocks.2.att.time_state": torch.ones(2, 32, 32)}), r"tensor blocks\.2\..* is missing"),
        (lambda s: s.update({"blocks.1.att.time_state": torch.ones(2, 32, 31)}), r"time_state has shape \(2, 32, 31\)"),
        (lambda s: s.update({"blocks.1.att.shift_state": torch.ones(63)}), r"shift_state has shape \(63,\)"),
        (lambda s: s["blocks.1.att.time_state"].fill_(float("nan")), r"time_state holds 2048 NaN"),
    ],
)  # fmt: skip
def test_a_state_that_does_not_fit_its_file(change: Callable[[Any], Any], message: str, tmp_path: Path) -> None:
    state = {n: t.clone() for n, t in (WKV_STATE | SHIFT_STATE).items()}
    change(state)
    write_tensors(tmp_path / "m.pth", random_model("x060") | state)
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path / "m.pth")


def test_values_that_overflow_a_sum_are_finite(tmp_path: Path) -> None:
    """The quick check sums a tensor: a sum too large for float32 is no fault of the file."""
    tensors = random_rwkv7()
    tensors["head.weight"].fill_(3e38)
    write_tensors(tmp_path / "m.pth", tensors)
    load_model(tmp_path / "m.pth")


# --- fingerprint


def test_fingerprint_depends_on_the_weights_alone(tmp_path: Path) -> None:
    tensors = random_rwkv7()
    prints = {fingerprint(tensors), fingerprint({n: t.bfloat16() for n, t in tensors.items()})}
    prints |= {fingerprint(dict(reversed(tensors.items())))}
    for form in FORMS:
        write_tensors(tmp_path / f"m{form}", tensors)
        prints |= {fingerprint(read_tensors(tmp_path / f"m{form}")), load_model(tmp_path / f"m{form}").fingerprint}
        prints |= {load_model(tmp_path / f"m{form}", "bf16").fingerprint}
    assert len(prints) == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda w: w["ln_out.bias"].add_(1),
        lambda w: w["blocks.1.ffn.value.weight"].mul_(1.1),
        lambda w: w.update({"blocks.1.att.r_k": w["blocks.1.att.r_k"].reshape(2, 32)}),
        lambda w: w.pop("blocks.1.att.v0"),
    ],
)
def test_fingerprint_of_other_weights(change: Callable[[Any], Any]) -> None:
    tensors = random_rwkv7()
    before = fingerprint(tensors)
    change(tensors)
    assert fingerprint(tensors) != before


# --- atomic writing


def test_a_failing_writer_leaves_what_was_there(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "before")

    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OutputError, match=r"a\.txt: cannot be written \(No space left on device\); make room"):
        write_atomic(tmp_path / "a.txt", fail)
    assert (tmp_path / "a.txt").read_text() == "before"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_an_interrupted_writer_leaves_what_was_there(tmp_path: Path) -> None:
    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        raise KeyboardInterrupt

    write_text(tmp_path / "a.txt", "before")
    with pytest.raises(KeyboardInterrupt):
        write_atomic(tmp_path / "a.txt", fail)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a.txt", "before")]


def test_no_room_is_noticed_before_writing(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"needs 1,\d{3},.* bytes, the disk has"):
        write_atomic(tmp_path / "a", lambda path: pytest.fail("written"), size=10**18 + 10**15)
    assert not list(tmp_path.iterdir())


def test_an_unknown_ending(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"ends in \.bin; allowed are \.pth and \.safetensors"):
        write_tensors(tmp_path / "a.bin", {})


# --- states


def random_state(shift: bool) -> ModelState:
    torch.manual_seed(0)
    return ModelState(torch.randn(3, 1, 2, 64, 64), torch.randn(3, 2, 1, 128) if shift else torch.zeros(3, 2, 1, 128))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shift", [True, False])
def test_states_come_back_as_they_were(form: str, shift: bool, tmp_path: Path) -> None:
    state = random_state(shift)
    rp.save_state(state, tmp_path / f"s{form}")
    got = rp.load_state(tmp_path / f"s{form}")
    assert torch.equal(got.wkv, state.wkv)
    assert torch.equal(got.shift, state.shift)


def test_state_file_is_the_official_form(tmp_path: Path) -> None:
    """Three tensors and nothing else where only the wkv state was trained, row = value index."""
    state = random_state(shift=False)
    rp.save_state(state, tmp_path / "s.pth")
    found = torch.load(tmp_path / "s.pth", weights_only=True)
    assert same(found, {f"blocks.{i}.att.time_state": state.wkv[i, 0] for i in range(3)})


def test_state_is_pypi_rwkvs_runtime_state(
    tmp_path: Path, model_file: Callable[..., Path], pypi_rwkv: PypiRwkv
) -> None:
    """One that it reached, saved in our file, continues in our model as in its own."""
    path, tokens = model_file(layers=3, width=128), random_tokens(257, 1, 30)
    want, *_ = pypi_rwkv(path, tokens[0].tolist())
    _, wkv, shift = pypi_rwkv(path, tokens[0, :20].tolist())
    rp.save_state(ModelState(wkv[:, None], shift[:, :, None]), tmp_path / "s.pth")
    stored = torch.load(tmp_path / "s.pth", weights_only=True)
    assert all(torch.equal(stored[f"blocks.{i}.att.time_state"], wkv[i]) for i in range(3))
    with torch.no_grad():
        logits, _ = rp.load_model(path)(tokens[:, 20:], rp.load_state(tmp_path / "s.pth"))
    assert difference(logits[0], want[20:]) <= 1e-4


def test_a_state_of_several_documents_is_refused(tmp_path: Path) -> None:
    state = ModelState(torch.zeros(2, 3, 1, 64, 64), torch.zeros(2, 2, 3, 64))
    with pytest.raises(ConfigError, match=r"holds 3 documents; give one, e.g. state\[0:1\]"):
        rp.save_state(state, tmp_path / "s.pth")
    rp.save_state(state[1:2], tmp_path / "s.pth")
    assert rp.load_state(tmp_path / "s.pth").wkv.shape == (2, 1, 1, 64, 64)


@pytest.mark.parametrize(
    "tensors",
    [
        {},
        {"blocks.0.att.time_state": torch.zeros(64, 64)},
        {"blocks.1.att.time_state": torch.zeros(1, 64, 64)},
        {"blocks.0.att.time_state": torch.zeros(1, 64, 64), "blocks.1.att.time_state": torch.zeros(2, 64, 64)},
        {"emb.weight": torch.zeros(5, 5)},
        {"blocks.0.att.time_state": torch.zeros(1, 64, 64), "blocks.0.ffn.shift_state": torch.zeros(64)},
        {
            "blocks.0.att.time_state": torch.zeros(1, 64, 64),
            "blocks.0.att.shift_state": torch.zeros(32),
            "blocks.0.ffn.shift_state": torch.zeros(32),
        },
    ],
    ids=["nothing", "two axes", "a layer missing", "unequal", "a model", "half a shift", "a shift of another width"],
)
def test_a_file_that_is_no_state(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    write_tensors(tmp_path / "s.pth", tensors)
    with pytest.raises(CheckpointError, match="holds no whole state") as caught:
        rp.load_state(tmp_path / "s.pth")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_state_in_other_numbers_is_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {f"blocks.{i}.att.time_state": torch.randn(2, 32, 32).to(dtype) for i in range(2)}
    write_tensors(tmp_path / "s.pth", tensors)
    state = rp.load_state(tmp_path / "s.pth")
    assert state.wkv.dtype == state.shift.dtype == torch.float32
    assert torch.equal(state.wkv[:, 0], torch.stack(list(tensors.values())).float())


def test_nan_in_a_state_is_named(tmp_path: Path) -> None:
    write_tensors(tmp_path / "s.pth", {"blocks.0.att.time_state": torch.full((2, 32, 32), float("nan"))})
    with pytest.raises(CheckpointError, match=r"tensor blocks\.0\.att\.time_state holds 2048 NaN"):
        rp.load_state(tmp_path / "s.pth")


@pytest.mark.parametrize("version", RANDOM)
def test_a_state_of_another_model_is_refused(version: str, load: Callable[..., Any]) -> None:
    model = load(version=version, layers=2, width=64, head_size=32)
    check_state(model, ModelState.zeros(model, 3), "s.pth")
    for layers, heads, head_size in ((3, 2, 32), (2, 4, 32), (2, 1, 64)):
        wkv = torch.zeros(layers, 1, heads, head_size, head_size)
        wrong = ModelState(wkv, torch.zeros(layers, 2, 1, heads * head_size))
        message = f"s.pth: a state of {layers} layers with {heads} heads of {head_size}; the model has 2 layers with 2"
        with pytest.raises(CheckpointError, match=message):
            check_state(model, wrong, "s.pth")


def test_a_state_goes_to_a_device() -> None:
    state = ModelState(torch.zeros(1, 1, 1, 4, 4), torch.zeros(1, 2, 1, 4)).to("meta")
    assert {state.wkv.device.type, state.shift.device.type} == {"meta"}


# --- arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "fp64"}, "--dtype fp64: unknown; allowed are auto fp32 bf16 fp16"),
        ({"device": "tpu"}, "--device tpu: unknown"),
        ({"device": "meta"}, "--device meta: not supported"),
        ({"device": "cuda:99"}, r"--device cuda:99: torch sees \d GPUs"),
        ({"op": "cudda"}, "--op cudda: unknown"),
        ({"quant": "int3"}, "--quant int3: unknown; allowed are none int8"),
        ({"quant_head": True}, "--quant-head: only with --quant"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_wrong_arguments(arguments: dict[str, str], message: str, model_file: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match=message):
        load_model(model_file(), **arguments)


def test_check_model_reads_no_weights() -> None:
    """Shapes are enough, so that a file can be judged before it is loaded."""
    meta = {name: tensor.to("meta") for name, tensor in random_rwkv7(layers=2).items()}
    kind, sizes = check_model("m.pth", meta)
    assert (kind, sizes.layers, sizes.heads) == (Rwkv7, 2, 1)
