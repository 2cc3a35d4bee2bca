"""Matrices in few bits: the formats against bitsandbytes, what is stored and loaded, every method on each of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import rwkv_peft as rp
from conftest import difference, random_model, random_tokens
from rwkv_peft.adapters import merge_adapter
from rwkv_peft.checkpoint import read_tensors, write_tensors
from rwkv_peft.cli import main
from rwkv_peft.errors import CheckpointError, ConfigError
from rwkv_peft.export.quantised import export_quantised
from rwkv_peft.models import Rwkv
from rwkv_peft.ops import triton
from rwkv_peft.ops.loss import next_token_loss
from rwkv_peft.ops.matrix import Dense, Linear, frozen_matrix
from rwkv_peft.ops.quant import QUANTS, QuantizedLinear, blocks, quantize
from rwkv_peft.packed import Packed

quants = pytest.mark.parametrize("quant", QUANTS)
versions = pytest.mark.parametrize("version", ["x070", "x060", "x052"])
CPU = torch.device("cpu")
FORMS = [(256, 1024), (64, 64), (3, 64), (5, 40), (7, 33), (1, 1), (1000, 48)]
LARGEST_ERROR = {"int8": 0.03, "nf4": 0.13, "fp4": 0.2, "fp8": 0.04}  # of a normal matrix, relative


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02).to(dtype)


# --- the formats


@pytest.fixture(scope="module")
def bitsandbytes() -> Any:
    return pytest.importorskip("bitsandbytes.functional")


def test_numbers_are_those_of_bitsandbytes(bitsandbytes: Any) -> None:
    assert torch.equal(blocks.quant_map("int8", CPU), bitsandbytes.create_dynamic_map())
    for quant in ("nf4", "fp4"):
        assert torch.equal(blocks.quant_map(quant, CPU), bitsandbytes.get_4bit_type(quant, device="cpu"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", FORMS)
def test_int8_is_stored_as_by_bitsandbytes(shape: tuple[int, int], dtype: torch.dtype, bitsandbytes: Any) -> None:
    weight = normal(*shape, dtype=dtype)
    weight[: len(weight) // 2] = 0
    index, state = bitsandbytes.quantize_blockwise(weight, blocksize=256)
    layer = quantize(weight, "int8", dtype)
    assert torch.equal(layer.weight, index)
    assert torch.equal(layer.get_buffer("absmax"), state.absmax)
    assert torch.equal(layer.dense(), bitsandbytes.dequantize_blockwise(index, state))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("quant", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", FORMS)
def test_4_bits_are_stored_as_by_bitsandbytes(
    shape: tuple[int, int], quant: str, dtype: torch.dtype, bitsandbytes: Any
) -> None:
    weight = normal(*shape, dtype=dtype)
    weight[: len(weight) // 2] = 0
    index, state = bitsandbytes.quantize_4bit(weight, quant_type=quant, compress_statistics=True)
    layer = quantize(weight, quant, dtype)
    ours, theirs = (
        layer.to_file(),
        {"weight": index} | {f"weight.{name}": tensor for name, tensor in state.as_dict(packed=True).items()},
    )
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert (tensor.dtype, tensor.shape) == (ours[name].dtype, ours[name].shape), name
        if ".quant_state." in name:
            assert settings_of(ours[name]) == settings_of(tensor)
        else:
            assert torch.equal(tensor.view(torch.uint8), ours[name].view(torch.uint8)), name
    if shape[1] % 64 == 0:  # its kernel for CPUs is wrong where rows end within a block
        assert torch.equal(layer.dense(), bitsandbytes.dequantize_4bit(index, state))


def settings_of(tensor: Tensor) -> dict[str, Any]:
    return json.loads(bytes(tensor.tolist()))  # type: ignore[no-any-return]


def test_fp8_rounds_to_the_nearest_e4m3_of_a_row() -> None:
    weight = normal(50, 96, dtype=torch.bfloat16)
    weight[3] = 0
    layer = quantize(weight, "fp8", torch.float32)
    scale = weight.float().abs().amax(1) / 448
    for row in (0, 17, 49):
        quotient = weight[row].double() / scale[row].double()
        step = torch.exp2(quotient.abs().log2().floor().clamp(min=-6) - 3)  # between neighbours of e4m3
        error = (layer.dense()[row].double() / scale[row].double() - quotient).abs()
        assert bool((error <= 0.501 * step).all())
    assert not layer.dense()[3].any()


@quants
@pytest.mark.parametrize("shape", FORMS)
def test_what_is_stored(quant: str, shape: tuple[int, int]) -> None:
    """Its layout is the one that is announced; its bytes are counted right; the error is that of the format."""
    weight = normal(*shape)
    layer = quantize(weight, quant, torch.float32)
    assert {n: (tuple(b.shape), b.dtype) for n, b in layer.named_buffers()} == layer.layout(*shape)
    assert sum(b.nbytes for b in layer.buffers()) == layer.bytes_of(*shape)
    assert not list(layer.parameters())
    assert difference(layer.dense(), weight) < LARGEST_ERROR[quant]
    assert torch.equal(layer.dense(torch.bfloat16), layer.dense().bfloat16())


@quants
def test_parts_and_rows(quant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large matrix is taken in parts; single rows are those of the whole, also where they begin within a block."""
    weight = normal(40, 96)
    layer = quantize(weight, quant, torch.float32)
    monkeypatch.setattr(blocks, "PART", 512)
    again = quantize(weight, quant, torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(layer.buffers(), again.buffers(), strict=True))
    for rows in (slice(0, 8), slice(8, 40), slice(3, 7), slice(39, 40)):
        assert torch.equal(again.dense(rows=rows), layer.dense()[rows])


@quants
def test_products(quant: str) -> None:
    weight, x = normal(48, 64), normal(2, 5, 64, seed=1).requires_grad_()
    layer = quantize(weight, quant, torch.float32)
    assert frozen_matrix(layer, x) is layer
    y = layer(x)
    want = torch.nn.functional.linear(x, layer.dense())
    assert difference(y, want) < 1e-6
    dy = normal(2, 5, 48, seed=2)
    (dx,) = torch.autograd.grad(y, x, dy)
    assert difference(dx, torch.autograd.grad(want, x, dy)[0]) < 1e-6
    assert layer(x.bfloat16()).dtype == torch.bfloat16


@quants
def test_the_loss_through_a_quantised_head(quant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In parts of the vocabulary, as with its dense weight; also where a part begins within a block."""
    layer = quantize(normal(300, 48), quant, torch.float32)
    head = Linear(48, 300)
    head.weight = torch.nn.Parameter(layer.dense(), requires_grad=False)
    labels = torch.arange(20) * 7 % 300
    labels[3] = -100
    found = []
    for matrix in (layer, head):
        monkeypatch.setattr("rwkv_peft.ops.loss.MOST_WEIGHTS", 48 * 70)
        hidden = normal(20, 48, seed=3).mul(50).requires_grad_()
        total, loss = next_token_loss(hidden, matrix, labels, 1e-2)
        (total / 19).backward()  # type: ignore[no-untyped-call]
        found.append((total.detach(), loss, hidden.grad))
    for ours, plain in zip(*found, strict=True):
        assert difference(ours, plain) < 1e-5


# --- files


@versions
@quants
def test_export_is_what_loading_makes(quant: str, version: str, tmp_path: Path) -> None:
    torch.save(random_model(version, dtype=torch.bfloat16), tmp_path / "m.pth")
    for head in (False, True):
        file = export_quantised(tmp_path / "m.pth", tmp_path / f"{head}.safetensors", quant, head)
        made = rp.load_model(tmp_path / "m.pth", quant=quant, quant_head=head)
        read = rp.load_model(file)
        tokens = random_tokens(257, 2, 20)
        assert torch.equal(made(tokens)[0], read(tokens)[0])
        assert (read.quant, read.fingerprint, read.shapes()) == (quant, made.fingerprint, made.shapes())
        assert isinstance(read.head, QuantizedLinear) == head
        assert all(isinstance(m, QuantizedLinear) for n, m in read.named_modules() if n.endswith((".key", ".value")))
    with pytest.raises(ConfigError, match=f"holds {quant} already"):
        rp.load_model(file, quant=next(q for q in QUANTS if q != quant))
    with pytest.raises(CheckpointError, match="quantised already"):
        export_quantised(file, tmp_path / "x.safetensors", quant)


def test_bitsandbytes_file_is_read(tmp_path: Path, bitsandbytes: Any) -> None:
    """One whose matrices bitsandbytes itself has quantised and named."""
    tensors = random_model()
    torch.save(tensors, tmp_path / "m.pth")
    for name in [n for n in tensors if n.endswith(("key.weight", "value.weight"))]:
        index, state = bitsandbytes.quantize_4bit(tensors.pop(name), quant_type="nf4", compress_statistics=True)
        own = {k: v.clone() for k, v in state.as_dict(packed=True).items()}
        tensors |= {name: index} | {f"{name}.{key}": value for key, value in own.items()}
    write_tensors(tmp_path / "bnb.safetensors", tensors)
    model = rp.load_model(tmp_path / "bnb.safetensors")
    want = rp.load_model(tmp_path / "m.pth", quant="nf4").blocks[0].att.key.dense()
    assert torch.equal(model.blocks[0].att.key.dense(), want)
    assert isinstance(model.blocks[0].att.receptance, QuantizedLinear)  # the others are quantised here


@pytest.mark.parametrize("quant", ["nf4", "fp4"])
def test_bitsandbytes_reads_an_export(quant: str, tmp_path: Path, bitsandbytes: Any) -> None:
    torch.save(random_model(), tmp_path / "m.pth")
    tensors = read_tensors(export_quantised(tmp_path / "m.pth", tmp_path / "q.safetensors", quant), whole_numbers=True)
    name = "blocks.1.ffn.value.weight"
    own = {key.removeprefix(f"{name}."): t for key, t in tensors.items() if key.startswith(f"{name}.")}
    state = bitsandbytes.QuantState.from_dict(own, device=CPU)
    want = rp.load_model(tmp_path / "m.pth", quant=quant).blocks[1].ffn.value.dense()
    assert torch.equal(bitsandbytes.dequantize_4bit(tensors[name], state), want)


@pytest.mark.parametrize(
    "damage", ["absmax", "state", "shape", "map", "json", "deep", "infinite", "blocksize", "format"]
)
def test_damaged_quantised_files(damage: str, tmp_path: Path) -> None:
    torch.save(random_model(), tmp_path / "m.pth")
    file = export_quantised(tmp_path / "m.pth", tmp_path / "q.safetensors", "nf4")
    tensors = read_tensors(file, whole_numbers=True)
    name = "blocks.0.att.key.weight"
    state = f"{name}.quant_state.bitsandbytes__nf4"
    if damage == "absmax":
        del tensors[f"{name}.absmax"]
    elif damage == "state":
        del tensors[state]
    elif damage == "shape":
        tensors[name] = tensors[name][:-1]
    elif damage == "map":
        tensors[f"{name}.quant_map"] = tensors[f"{name}.quant_map"] * 1.01
    elif damage == "json":
        tensors[state] = tensors[state][:-3]
    elif damage == "deep":
        tensors[state] = torch.full((4000,), ord("["), dtype=torch.uint8)
    elif damage == "infinite":
        changed = json.dumps(settings_of(tensors[state]) | {"shape": [float("inf"), 1]})
        tensors[state] = torch.tensor(list(changed.encode()), dtype=torch.uint8)
    elif damage == "blocksize":
        changed = json.dumps(settings_of(tensors[state]) | {"blocksize": 128})
        tensors[state] = torch.tensor(list(changed.encode()), dtype=torch.uint8)
    else:
        tensors[f"{name}.quant_state.bitsandbytes__af4"] = tensors.pop(state)
    write_tensors(tmp_path / "bad.safetensors", tensors)
    with pytest.raises(
        CheckpointError, match=r"bad.safetensors: tensor blocks.0.att.key.weight: is .*; get .* file"
    ) as error:
        rp.load_model(tmp_path / "bad.safetensors")
    assert "\n" not in str(error.value)


def test_an_fp8_matrix_that_lost_its_scale(tmp_path: Path) -> None:
    torch.save(random_model(), tmp_path / "m.pth")
    tensors = read_tensors(export_quantised(tmp_path / "m.pth", tmp_path / "q.safetensors", "fp8"))
    del tensors["blocks.0.att.key.weight_scale"]
    write_tensors(tmp_path / "bad.safetensors", tensors)
    with pytest.raises(CheckpointError, match=r"blocks.0.att.key.weight is fp8 without its .*_scale; get the file"):
        rp.load_model(tmp_path / "bad.safetensors")


@pytest.mark.parametrize("metadata", ["[1]", '{"fingerprint": 5}', '{"fingerprint": {}}', '"text"'])
def test_metadata_that_are_no_text(metadata: str, tmp_path: Path) -> None:
    write_tensors(tmp_path / "m.safetensors", random_model())
    content = (tmp_path / "m.safetensors").read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = b'{"__metadata__":' + metadata.encode() + b"," + content[9 : 8 + size].rstrip()
    (tmp_path / "m.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + content[8 + size :])
    with pytest.raises(CheckpointError, match=r"m.safetensors: is .*; download it again") as error:
        rp.load_model(tmp_path / "m.safetensors")
    assert "\n" not in str(error.value)


def test_formats_are_not_mixed(tmp_path: Path) -> None:
    torch.save(random_model(), tmp_path / "m.pth")
    mixed, other = (
        read_tensors(export_quantised(tmp_path / "m.pth", tmp_path / f"{q}.safetensors", q), whole_numbers=True)
        for q in ("nf4", "int8")
    )
    name = "blocks.0.att.key.weight"
    mixed = {n: t for n, t in mixed.items() if not n.startswith(name)}
    write_tensors(tmp_path / "mixed.safetensors", mixed | {n: t for n, t in other.items() if n.startswith(name)})
    with pytest.raises(CheckpointError, match="holds matrices in int8 and nf4; get a file with one format"):
        rp.load_model(tmp_path / "mixed.safetensors")


@pytest.mark.parametrize("quant", QUANTS)
def test_fp8_numbers_without_a_scale_are_quantised_as_any(quant: str, tmp_path: Path) -> None:
    tensors = {n: t.to(torch.float8_e4m3fn) for n, t in random_model().items()}
    torch.save(tensors, tmp_path / "m.pth")
    torch.save({n: t.float() for n, t in tensors.items()}, tmp_path / "wide.pth")
    got, want = (rp.load_model(tmp_path / f"{n}.pth", quant=quant).blocks[1].att.key for n in ("m", "wide"))
    assert difference(got.dense(), want.dense()) < 0.05


def test_numbers_too_large_for_a_format(tmp_path: Path) -> None:
    """Whose scales would be Inf."""
    tensors = random_model()
    tensors["blocks.0.att.key.weight"] = torch.full_like(
        tensors["blocks.0.att.key.weight"], 3.3e38, dtype=torch.float32
    )
    torch.save(tensors, tmp_path / "m.pth")
    for make in (
        lambda: rp.load_model(tmp_path / "m.pth", quant="nf4"),
        lambda: export_quantised(tmp_path / "m.pth", tmp_path / "q.safetensors", "nf4"),
    ):
        with pytest.raises(CheckpointError, match=r"blocks.0.att.key.weight holds numbers that are too large for nf4"):
            make()
    assert not (tmp_path / "q.safetensors").exists()


def test_pissa_needs_the_dense_matrix(tmp_path: Path) -> None:
    """Its factors are those of the dense weight; a file that holds only the quantised one is refused."""
    torch.save(random_model(), tmp_path / "m.pth")
    config = rp.AdapterConfig(peft="pissa", rank=4, svd_iterations=0)
    dense = rp.attach_adapter(rp.load_model(tmp_path / "m.pth"), config)
    quantised = rp.attach_adapter(rp.load_model(tmp_path / "m.pth", quant="nf4"), config)
    product, want = (m.blocks[1].ffn.key.start_b @ m.blocks[1].ffn.key.start_a for m in (quantised, dense))
    assert difference(product, want) < 1e-5
    file = export_quantised(tmp_path / "m.pth", tmp_path / "q.safetensors", "nf4")
    with pytest.raises(ConfigError, match="starts from dense matrices"):
        rp.attach_adapter(rp.load_model(file), config)


# --- every method on each format and version

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 8}, "dora": {"rank": 8, "dora": True}, "pissa": {"peft": "pissa", "rank": 8},
    "bone": {"peft": "bone", "rank": 8}, "bat": {"peft": "bat", "rank": 8}, "state": {"peft": "state"},
}  # fmt: skip


@versions
@quants
@pytest.mark.parametrize("method", METHODS)
def test_train_save_load_merge(method: str, quant: str, version: str, tmp_path: Path) -> None:
    base = tmp_path / "m.pth"
    torch.save(random_model(version), base)
    tokens = random_tokens(257, 2, 24)

    def load() -> Rwkv:
        return rp.load_model(base, quant=quant, quant_head=True)

    model = rp.attach_adapter(load(), rp.AdapterConfig(**METHODS[method]), train_parts=("time", "ln"))
    before = model(tokens)[0].detach()
    assert difference(before, load()(tokens)[0]) < 1e-5  # an adapter changes nothing at first
    losses = train_a_little(model, tokens)
    assert losses[-1] < 0.9 * losses[0]
    after = model(tokens)[0].detach()
    rp.save_adapter(model, tmp_path / "adapter")
    again = rp.load_adapter(load(), tmp_path / "adapter")
    assert torch.equal(again(tokens)[0], after)

    rounding = difference(load()(tokens)[0], rp.load_model(base)(tokens)[0])
    for onto, most in (("trained", 1e-5), ("dense", 3 * rounding)):
        rp.merge(base, tmp_path / "adapter", tmp_path / f"{onto}.pth", onto=onto)
        merged = rp.load_model(tmp_path / f"{onto}.pth")(tokens)[0]
        assert difference(merged, after) < most, onto
    if method != "state":
        with pytest.raises(ConfigError, match=f"the base is {quant}"):
            merge_adapter(again)


def train_a_little(model: Rwkv, tokens: Tensor, steps: int = 6) -> list[float]:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.Adam(trained, lr=1e-2), []
    for _ in range(steps):
        optimizer.zero_grad()
        logits = model(tokens[:, :-1])[0]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@quants
def test_gradients_are_those_of_the_rounded_base(quant: str, load: Callable[..., Rwkv], tmp_path: Path) -> None:
    """In float64, of a dense model with the rounded matrices."""
    torch.save(random_model(), tmp_path / "m.pth")
    quantised = rp.load_model(tmp_path / "m.pth", quant=quant, quant_head=True)
    tensors = dict(read_tensors(tmp_path / "m.pth"))
    for name, entry in tensors.items():
        module = quantised.get_submodule(name.rpartition(".")[0]) if name.endswith(".weight") else None
        if isinstance(module, QuantizedLinear):
            tensors[name] = module.dense().view(entry.shape)
    torch.save(tensors, tmp_path / "dense.pth")
    models = [quantised, rp.load_model(tmp_path / "dense.pth").double()]
    tokens, gradients = random_tokens(257, 2, 30), []
    for model in models:
        torch.manual_seed(1)
        rp.attach_adapter(model, rp.AdapterConfig(rank=4), ("time", "ln"))
        torch.manual_seed(2)
        for p in (p for p in model.parameters() if p.requires_grad):
            p.data += torch.randn(p.shape).to(p.dtype) * 0.02
        model(tokens)[0].square().mean().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    for name, gradient in gradients[1].items():
        assert difference(gradients[0][name], gradient) < 1e-4, name


def test_onto_trained_needs_a_quantised_training(tmp_path: Path) -> None:
    torch.save(random_model(), tmp_path / "m.pth")
    model = rp.attach_adapter(rp.load_model(tmp_path / "m.pth"), rp.AdapterConfig(rank=4))
    rp.save_adapter(model, tmp_path / "adapter")
    with pytest.raises(ConfigError, match="--onto trained: only for"):
        rp.merge(tmp_path / "m.pth", tmp_path / "adapter", tmp_path / "o.pth", onto="trained")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("quant", QUANTS)
def test_merging_onto_an_exported_base(quant: str, precision: str, tmp_path: Path) -> None:
    """The same file as onto the dense base, to the bit, whatever the precisions of the base and of the training."""
    number = torch.bfloat16 if precision == "fp32" else torch.float32  # the base has the other one
    torch.save({n: t.to(number) for n, t in random_model().items()}, tmp_path / "m.pth")
    files = tmp_path / "m.pth", export_quantised(tmp_path / "m.pth", tmp_path / "q.safetensors", quant, quant_head=True)
    found = []
    for base in files:
        model = rp.load_model(base, precision, quant=quant, quant_head=True)
        rp.attach_adapter(model, rp.AdapterConfig(rank=4))
        for i, (name, p) in enumerate(model.named_parameters()):
            if "lora_B" in name:
                p.data = normal(*p.shape, seed=i) * 0.1
            elif "lora_A" in name:
                p.data = normal(*p.shape, seed=i)
        rp.save_adapter(model, tmp_path / base.stem)
        for onto in files:
            out = tmp_path / f"{base.stem}-{onto.stem}.pth"
            found.append(read_tensors(rp.merge(onto, tmp_path / base.stem, out, onto="trained")))
    for one in found:
        assert {n: t.dtype for n, t in one.items()} == {n: t.dtype for n, t in found[0].items()}
        assert all(torch.equal(t, found[0][n]) for n, t in one.items())


def test_onto_trained_is_refused_where_the_file_is_not_what_was_trained_on(tmp_path: Path) -> None:
    torch.save(random_model(), tmp_path / "m.pth")
    model = rp.attach_adapter(rp.load_model(tmp_path / "m.pth", quant="nf4"), rp.AdapterConfig(rank=4))
    rp.save_adapter(model, tmp_path / "adapter")
    heads = export_quantised(tmp_path / "m.pth", tmp_path / "head.safetensors", "nf4", quant_head=True)
    other = export_quantised(tmp_path / "m.pth", tmp_path / "int8.safetensors", "int8")
    for file, holds in ((heads, "the head dense, and .* holds head.weight in nf4"), (other, "holds matrices in int8")):
        with pytest.raises(ConfigError, match=f"--onto trained: the adapter was trained against nf4, .*{holds}; name"):
            rp.merge(file, tmp_path / "adapter", tmp_path / "o.pth", onto="trained")
    with pytest.raises(ConfigError, match="--onto traind: unknown; allowed are dense trained"):
        rp.merge(tmp_path / "m.pth", tmp_path / "adapter", tmp_path / "o.pth", onto="traind")
    with pytest.raises(ConfigError, match="--embedding disk: unknown; allowed are cpu gpu"):
        rp.load_model(tmp_path / "m.pth", embedding="disk")


# --- kernels

on_gpu = torch.cuda.is_available()
gpu = [pytest.mark.gpu, pytest.mark.skipif(not on_gpu, reason="torch sees no GPU")]


@pytest.mark.parametrize("quant", ["int8", "nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(70, 256), (3, 64), (5, 40), (130, 100)])
def test_kernel_of_dense_weights(shape: tuple[int, int], dtype: torch.dtype, quant: str) -> None:
    """To the bit as the plain one; on the CPU by Triton's interpreter."""
    device = torch.device("cuda" if on_gpu else "cpu")
    plain = quantize(normal(*shape), quant, dtype)
    layer = Packed(quant, shape, plain.to_file(), settings(plain)).layer(dtype, device)
    for rows in (slice(None), slice(0, 2), slice(2, 3)):
        want = plain.dense(rows=rows)
        if rows.start is None or rows.start * shape[1] % layer.block == 0:  # type: ignore[operator]
            got = torch.full(want.shape, float("nan"), dtype=dtype, device=device)
            layer.fill_by_kernel(got, (rows.start or 0) * shape[1])  # type: ignore[operator]
            # the interpreter cuts numbers off to bf16, and does not round them
            tolerance = 0 if on_gpu or dtype != torch.bfloat16 else 2**-7
            torch.testing.assert_close(got.cpu(), want, rtol=tolerance, atol=0)


def settings(layer: QuantizedLinear) -> dict[str, Any]:
    return layer.settings() if hasattr(layer, "settings") else {}  # type: ignore[no-any-return, operator]


def test_kernel_that_turns_a_matrix() -> None:
    device = torch.device("cuda" if on_gpu else "cpu")
    x = torch.randint(0, 255, (300, 200), dtype=torch.uint8, device=device)
    assert torch.equal(triton.turned(x), x.T)


@pytest.mark.parametrize("quant", [pytest.param(q, marks=gpu) for q in QUANTS])
def test_quantised_alike_on_a_gpu(quant: str) -> None:
    weight = normal(512, 768, dtype=torch.bfloat16)
    ours, there = quantize(weight, quant, torch.bfloat16), quantize(weight.cuda(), quant, torch.bfloat16)
    for name, buffer in ours.named_buffers():
        assert torch.equal(buffer.view(torch.uint8), there.get_buffer(name).cpu().view(torch.uint8)), name
    assert torch.equal(ours.dense(), there.dense().cpu())


@pytest.mark.parametrize(("n", "shape"), [pytest.param(*p, marks=gpu) for p in ((17, (64, 128)), (1024, (768, 3072)))])
def test_fp8_products(n: int, shape: tuple[int, int]) -> None:
    """Both factors are rounded: two roundings of e4m3 apart from the exact product."""
    layer = quantize(normal(*shape, dtype=torch.bfloat16).cuda(), "fp8", torch.bfloat16)
    x, dy = (normal(n, m, dtype=torch.bfloat16, seed=4).cuda() for m in reversed(shape))
    plain = Dense(layer.dense(torch.float64))
    assert layer.multiplies(x)  # type: ignore[operator]
    assert difference(layer.times(x), plain.times(x.double())) < 0.04
    assert difference(layer.back(dy), plain.back(dy.double())) < 0.05


@pytest.mark.parametrize("quant", [pytest.param(q, marks=gpu) for q in ("none", *QUANTS)])
def test_a_model_on_a_gpu(quant: str, tmp_path: Path) -> None:
    """Its embedding on the CPU, its matrices and head quantised."""
    torch.save(random_model(vocab_size=512, width=128, layers=2), tmp_path / "m.pth")
    how = {"quant": quant, "quant_head": quant != "none"}
    there = rp.load_model(tmp_path / "m.pth", "bf16", "cuda", embedding="cpu", **how)  # type: ignore[arg-type]
    here = rp.load_model(tmp_path / "m.pth", "fp32", "cpu", **how)  # type: ignore[arg-type]
    assert there.emb.weight.device.type == "cpu" and there.emb.weight.is_pinned()
    tokens = random_tokens(512, 2, 40)
    assert difference(there(tokens.cuda())[0].float().cpu(), here(tokens)[0]) < (0.3 if quant == "fp8" else 0.03)


@pytest.mark.parametrize("width", [64, 100, 2560])
def test_rows_of_an_embedding_on_the_cpu(width: int) -> None:
    device = torch.device("cuda" if on_gpu else "cpu")
    weight, tokens = normal(1000, width, dtype=torch.bfloat16), torch.randint(0, 1000, (3, 50))
    weight = weight.pin_memory() if on_gpu else weight
    assert torch.equal(triton.rows_of(weight, tokens.to(device)).cpu(), weight[tokens])


def test_inspect_tells_of_a_quantised_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(random_model(), tmp_path / "m.pth")
    file = export_quantised(tmp_path / "m.pth", tmp_path / "q.safetensors", "nf4")
    shown = []
    for path in (tmp_path / "m.pth", file):
        assert main(["inspect", str(path)]) == 0
        lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if line[:1] > " "]
        shown.append(dict(words for words in lines if len(words) == 2))
    dense, quantised = shown
    assert quantised["formats"] == "fp32 (57 tensors), nf4 (12 tensors)"
    same = ("model", "layers", "parameters", "fingerprint")
    assert [dense[key] for key in same] == [quantised[key] for key in same]


def test_a_head_that_was_trained_takes_no_quantised_one(tmp_path: Path) -> None:
    torch.save(random_model(), tmp_path / "m.pth")
    model = rp.attach_adapter(rp.load_model(tmp_path / "m.pth", quant="nf4"), rp.AdapterConfig(rank=4), ("head",))
    rp.save_adapter(model, tmp_path / "adapter")
    rp.load_adapter(rp.load_model(tmp_path / "m.pth", quant="nf4"), tmp_path / "adapter")
    with pytest.raises(ConfigError, match=r"holds head\.weight, which is quantised here; leave --quant"):
        rp.load_adapter(rp.load_model(tmp_path / "m.pth", quant="nf4", quant_head=True), tmp_path / "adapter")


@quants
def test_nan_in_a_quantised_file(quant: str, tmp_path: Path) -> None:
    torch.save(random_model(), tmp_path / "m.pth")
    file = export_quantised(tmp_path / "m.pth", tmp_path / "q.safetensors", quant)
    tensors = read_tensors(file, whole_numbers=True)
    name = "blocks.1.ffn.key.weight"
    if quant == "fp8":
        tensors[name].view(torch.uint8)[3, 4] = 255
    else:
        tensors[f"{name}.{'absmax' if quant == 'int8' else 'nested_absmax'}"][0] = float("inf")
    write_tensors(tmp_path / "bad.safetensors", tensors)
    with pytest.raises(CheckpointError, match=r"bad\.safetensors: tensor blocks\.1\.ffn\.key\.weight holds NaN or Inf"):
        rp.load_model(tmp_path / "bad.safetensors")


def test_a_quantised_file_is_not_trained_in_full(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(random_model(), tmp_path / "m.pth")
    file = export_quantised(tmp_path / "m.pth", tmp_path / "q.safetensors", "int8")
    (tmp_path / "data.jsonl").write_text('{"text": "some words"}\n')
    data, out = str(tmp_path / "data.jsonl"), tmp_path / "out"
    how = ["--data", data, "--out", str(out), "--peft", "full", "--device", "cpu", "--max-steps", "1"]
    assert main(["train", "--model", str(file), *how]) == 2
    assert capsys.readouterr().err.startswith(
        f"error: --peft full: {file} holds int8, which cannot train; name the dense"
    )
    assert not out.exists()
