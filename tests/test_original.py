"""Adapter files of the original program, written here from its formulas alone, against what is read from them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import rwkv_peft as rp
from conftest import PypiRwkv, difference, random_model, random_tokens
from rwkv_peft.adapters import SavedAdapter, read_adapter
from rwkv_peft.adapters.original import read_original
from rwkv_peft.checkpoint import read_tensors
from rwkv_peft.errors import CheckpointError, ConfigError, RwkvPeftError

Tensors = dict[str, Tensor]
VERSIONS = ("x052", "x060", "x070")
PREFIXES = ("", "model.", "_forward_module.model.", "base_model.model.")
METHODS = ("lora", "pissa", "bone", "bat")
RANK, ALPHA = 4, 10.0
HEADS: dict[str, Any] = {"width": 64, "head_size": 32}  # two heads: they may not be swapped
TOKENS = random_tokens(257, 1, 24)


def matrices(base: Tensors) -> list[str]:
    """Names of the adapted matrices: all of att and ffn."""
    return [n[:-7] for n in base if n.endswith(".weight") and (".att." in n or ".ffn." in n) and base[n].ndim == 2]


def trained_parts(base: Tensors, seed: int = 3) -> Tensors:
    """What the original trains in full by default: names with `time` or `ln` in them."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: tensor + 0.1 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in base.items()
        if "time" in name or "ln" in name
    }


class OriginalFile:
    """A file of the original, and what its merge script would make of the base, in float64."""

    def __init__(self, base: Tensors, method: str, dtype: torch.dtype = torch.float32, rank: int = RANK) -> None:
        self.tensors: Tensors = {}
        self.initial: Tensors = {}
        self.merged = {name: tensor.double() for name, tensor in base.items()}
        torch.manual_seed(11)
        for name in matrices(base):
            W = self.merged[f"{name}.weight"]
            self.merged[f"{name}.weight"] = getattr(self, method)(name, W, rank, dtype)

    def add(self, parts: Tensors, dtype: torch.dtype = torch.float32) -> OriginalFile:
        """Parts trained in full take the place of the base's."""
        self.tensors |= {name: part.to(dtype) for name, part in parts.items()}
        self.merged |= {name: part.to(dtype).double() for name, part in parts.items()}
        return self

    def lora(self, name: str, W: Tensor, rank: int, dtype: torch.dtype) -> Tensor:
        A, B = torch.randn(rank, W.shape[1]).to(dtype) * 0.1, torch.randn(W.shape[0], rank).to(dtype) * 0.1
        self.tensors |= {f"{name}.lora_A": A, f"{name}.lora_B": B}
        return W + ALPHA / rank * (B.double() @ A.double())

    def pissa(self, name: str, W: Tensor, rank: int, dtype: torch.dtype) -> Tensor:
        """Never scaled. The initial values are the largest singular vectors, kept in float32."""
        U, S, Vh = torch.linalg.svd(W)
        A0, B0 = (S[:rank, None].sqrt() * Vh[:rank]).float(), (U[:, :rank] * S[:rank].sqrt()).float()
        A, B = (A0 + 0.05 * torch.randn_like(A0)).to(dtype), (B0 + 0.05 * torch.randn_like(B0)).to(dtype)
        self.tensors |= {f"{name}.lora_A": A, f"{name}.lora_B": B}
        self.initial |= {f"{name}.init_lora_A": A0, f"{name}.init_lora_B": B0}
        return W - B0.double() @ A0.double() + B.double() @ A.double()

    def bone(self, name: str, W: Tensor, rank: int, dtype: torch.dtype) -> Tensor:
        """Input i of every shard of `rank` inputs adds row i of D; the last shard may be shorter."""
        D = torch.randn(rank, W.shape[0]).to(dtype) * 0.1
        self.tensors[f"{name}.disha"] = D
        return torch.stack([W[:, i] + D[i % rank].double() for i in range(W.shape[1])], dim=1)

    def bat(self, name: str, W: Tensor, rank: int, dtype: torch.dtype) -> Tensor:
        D = torch.randn(W.shape[1] // rank, rank, rank).to(dtype) * 0.1
        self.tensors[f"{name}.disha"] = D
        rows = []
        for a in range(0, W.shape[0], rank):
            blocks = [W[a : a + rank, b * rank : (b + 1) * rank] for b in range(len(D))]
            rows.append(torch.cat([w + w @ d + d for w, d in zip(blocks, D.double(), strict=True)], dim=1))
        return torch.cat(rows)

    def write(self, folder: Path, prefix: str = "", initial_prefix: str = "", initial: str = "init_pissa.pth") -> Path:
        folder.mkdir(exist_ok=True)
        torch.save({prefix + name: tensor for name, tensor in self.tensors.items()}, folder / "rwkv-0.pth")
        if self.initial:
            torch.save({initial_prefix + name: tensor for name, tensor in self.initial.items()}, folder / initial)
        return folder / "rwkv-0.pth"


def alpha_of(method: str) -> float | None:
    return ALPHA if method == "lora" else None


def random_state(base: Tensors, dtype: torch.dtype = torch.float32) -> Tensors:
    torch.manual_seed(5)
    H, N = next(base[name].shape for name in base if name.endswith(("att.r_k", "att.time_faaaa")))
    layers = {name.split(".")[1] for name in base if name.startswith("blocks.")}
    return {f"blocks.{i}.att.time_state": torch.randn(H, N, N).to(dtype) for i in sorted(layers)}


def assert_equal_weights(got: Tensors, want: Tensors, tolerance: float = 1e-6) -> None:
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert float((got[name].double() - tensor).abs().max()) <= tolerance, name


# --- what is read


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("method", METHODS)
def test_names_and_formats_of_what_is_read(method: str, prefix: str, tmp_path: Path) -> None:
    base = random_model("x060", **HEADS)
    written = OriginalFile(base, method, torch.bfloat16).add(trained_parts(base), torch.bfloat16)
    saved = read_original(written.write(tmp_path, prefix, prefix), alpha_of(method))
    assert saved.config is not None and saved.config.peft == method and saved.config.rank == RANK
    assert saved.config.targets == tuple(matrices(base)) and saved.base == ""
    assert saved.config.scale == (ALPHA / RANK if method == "lora" else saved.config.scale)
    assert saved.parts.keys() == trained_parts(base).keys()
    assert {part.dtype for part in saved.parts.values()} == {torch.bfloat16}
    ends = {"bone": ("miss_block",), "bat": ("bat_block",)}.get(method, ("lora_A.weight", "lora_B.weight"))
    assert saved.tensors.keys() == {f"{name}.{end}" for name in matrices(base) for end in ends}


def dense(W: Tensor, tensors: Tensors, saved: SavedAdapter) -> Tensor:
    """Our own form of an adapter, added to a matrix, in float64 and by definition."""
    assert saved.config is not None
    own = {name: tensor.double() for name, tensor in tensors.items()}
    out, width, r = *W.shape, saved.config.rank
    if saved.config.peft in ("lora", "pissa"):
        return W + saved.config.scale * own["lora_B.weight"] @ own["lora_A.weight"]
    if saved.config.peft == "bone":
        return W + own["miss_block"].repeat(-(-width // r), 1)[:width].T
    D = torch.block_diag(*own["bat_block"])
    return W + W @ D + own["bat_block"].transpose(0, 1).reshape(r, width).repeat(out // r, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_our_form_means_the_same(method: str, dtype: torch.dtype, tmp_path: Path) -> None:
    base = random_model("x070")
    written = OriginalFile(base, method, dtype)
    saved = read_original(written.write(tmp_path), alpha_of(method))
    for name in matrices(base):
        got = dense(base[f"{name}.weight"].double(), saved.of_matrix(name), saved)
        assert float((got - written.merged[f"{name}.weight"]).abs().max()) < 1e-12


def test_older_names_of_blocks_and_of_initial_values(tmp_path: Path) -> None:
    base = random_model("x060")
    new = OriginalFile(base, "bone")
    torch.save({name.replace(".disha", ".bone"): tensor for name, tensor in new.tensors.items()}, tmp_path / "old.pth")
    old, newer = read_original(tmp_path / "old.pth"), read_original(new.write(tmp_path))
    assert old.config == newer.config and old.tensors.keys() == newer.tensors.keys()
    pissa = OriginalFile(base, "pissa").write(tmp_path / "pissa", initial="init_lora.pth")
    saved = read_original(pissa)
    assert saved.config is not None and saved.config.peft == "pissa"


def test_names_of_pefts_layers_are_understood(tmp_path: Path) -> None:
    base = random_model("x070")
    plain = OriginalFile(base, "lora")
    for end in (".weight", ".default.weight"):
        torch.save({f"base_model.model.{n}{end}": t for n, t in plain.tensors.items()}, tmp_path / "peft.pth")
        saved = read_original(tmp_path / "peft.pth", ALPHA)
        assert saved.tensors.keys() == read_original(plain.write(tmp_path), ALPHA).tensors.keys()


def test_a_state_alone_is_no_adapter_of_matrices(tmp_path: Path) -> None:
    state = random_state(random_model("x070"), torch.bfloat16)
    torch.save({f"model.{name}": tensor for name, tensor in state.items()}, tmp_path / "rwkv-0.pth")
    saved = read_original(tmp_path / "rwkv-0.pth")
    assert saved.config is None and not saved.tensors
    assert all(torch.equal(saved.parts[name], tensor) for name, tensor in state.items())
    assert saved.parts.keys() == state.keys() and saved.parts["blocks.0.att.time_state"].dtype == torch.bfloat16


def test_initial_values_of_another_run_do_not_make_a_lora_a_pissa(tmp_path: Path) -> None:
    base = random_model("x070")
    path = OriginalFile(base, "lora").write(tmp_path)
    torch.save(OriginalFile(base, "pissa", rank=RANK + 1).initial, tmp_path / "init_pissa.pth")
    saved = read_original(path, ALPHA)
    assert saved.config is not None and saved.config.peft == "lora"


# --- merged, run, and trained further


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("method", METHODS)
def test_merged_weights(method: str, version: str, dtype: torch.dtype, tmp_path: Path) -> None:
    base = random_model(version, **HEADS)
    torch.save(base, tmp_path / "base.pth")
    written = OriginalFile(base, method, dtype).add(trained_parts(base), dtype)
    path = written.write(tmp_path / "run", "model.", "")
    out = rp.merge(tmp_path / "base.pth", path, tmp_path / "out.pth", alpha=alpha_of(method))
    assert_equal_weights(read_tensors(out), written.merged)


@pytest.mark.parametrize("prefix", PREFIXES[:2])
@pytest.mark.parametrize("initial_prefix", PREFIXES[:2])
def test_merged_pissa_with_either_prefix_and_its_initial_values_elsewhere(
    prefix: str, initial_prefix: str, tmp_path: Path
) -> None:
    base = random_model("x070")
    torch.save(base, tmp_path / "base.pth")
    written = OriginalFile(base, "pissa")
    path = written.write(tmp_path / "run", prefix, initial_prefix)
    elsewhere = path.with_name("init_pissa.pth").rename(tmp_path / "elsewhere.pth")
    out = rp.merge(tmp_path / "base.pth", path, tmp_path / "out.pth", pissa_init=elsewhere)
    assert_equal_weights(read_tensors(out), written.merged)


def test_bone_whose_rank_does_not_divide_the_inputs(tmp_path: Path) -> None:
    base = random_model("x070")
    torch.save(base, tmp_path / "base.pth")
    written = OriginalFile(base, "bone", rank=7)
    out = rp.merge(tmp_path / "base.pth", written.write(tmp_path / "run"), tmp_path / "out.pth")
    assert_equal_weights(read_tensors(out), written.merged)


def test_emb_and_head_trained_in_full(tmp_path: Path) -> None:
    base = random_model("x070")
    torch.save(base, tmp_path / "base.pth")
    torch.manual_seed(2)
    full = {name: torch.randn_like(base[name]) for name in ("emb.weight", "head.weight")}
    written = OriginalFile(base, "lora").add(full)
    out = rp.merge(tmp_path / "base.pth", written.write(tmp_path / "run"), tmp_path / "out.pth", alpha=ALPHA)
    assert_equal_weights(read_tensors(out), written.merged)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("method", METHODS)
def test_loaded_for_inference_it_gives_the_merged_logits(method: str, version: str, tmp_path: Path) -> None:
    base = random_model(version, **HEADS)
    torch.save(base, tmp_path / "base.pth")
    written = OriginalFile(base, method).add(trained_parts(base))
    path = written.write(tmp_path / "run")
    torch.save({name: tensor.float() for name, tensor in written.merged.items()}, tmp_path / "merged.pth")
    model = rp.load_adapter(rp.load_model(tmp_path / "base.pth"), path, alpha=alpha_of(method))
    with torch.no_grad():
        got, plain = model(TOKENS)[0], rp.load_model(tmp_path / "base.pth")(TOKENS)[0]
        want = rp.load_model(tmp_path / "merged.pth")(TOKENS)[0]
    assert difference(got, want) < 1e-4
    assert difference(plain, want) > 1e-2


@pytest.mark.parametrize("method", METHODS)
def test_saved_as_a_folder_it_merges_to_the_same(method: str, tmp_path: Path) -> None:
    base = random_model("x060", **HEADS)
    torch.save(base, tmp_path / "base.pth")
    written = OriginalFile(base, method, torch.bfloat16).add(trained_parts(base)).add(random_state(base))
    path = written.write(tmp_path / "run")
    model = rp.load_adapter(rp.load_model(tmp_path / "base.pth"), path, alpha=alpha_of(method))
    rp.save_adapter(model, tmp_path / "adapter")
    out = rp.merge(tmp_path / "base.pth", tmp_path / "adapter", tmp_path / "out.pth")
    assert_equal_weights(read_tensors(out), written.merged)


@pytest.mark.parametrize("version", VERSIONS[1:])  # RWKV-5 had no state tuning
def test_a_state_begins_every_document_in_the_official_layout(
    version: str, tmp_path: Path, pypi_rwkv: PypiRwkv
) -> None:
    base = random_model(version, **HEADS)
    state = random_state(base)
    torch.save(base, tmp_path / "base.pth")
    torch.save(state, tmp_path / "rwkv-0.pth")
    out = rp.merge(tmp_path / "base.pth", tmp_path / "rwkv-0.pth", tmp_path / "out.pth")
    assert_equal_weights(read_tensors(out), {name: tensor.double() for name, tensor in (base | state).items()})
    model = rp.load_adapter(rp.load_model(tmp_path / "base.pth"), tmp_path / "rwkv-0.pth")
    with torch.no_grad():
        got, merged = model(TOKENS)[0], rp.load_model(out)(TOKENS)[0]
    assert difference(got, merged) == 0
    if version == "x070":
        wkv = torch.stack(list(state.values()))
        want = pypi_rwkv(tmp_path / "base.pth", TOKENS[0].tolist(), wkv=wkv)[0]
    else:  # that program reads a time_state inside an RWKV-6 model
        want = pypi_rwkv(out, TOKENS[0].tolist())[0]
    assert difference(got[0], want) < 1e-4


def test_lora_and_state_in_one_file(tmp_path: Path) -> None:
    base = random_model("x060", **HEADS)
    torch.save(base, tmp_path / "base.pth")
    written = OriginalFile(base, "lora").add(random_state(base))
    out = rp.merge(tmp_path / "base.pth", written.write(tmp_path / "run"), tmp_path / "out.pth", alpha=ALPHA)
    assert_equal_weights(read_tensors(out), written.merged)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{i} + 1", "response": str(i + 1)}) + "\n" for i in range(8)))
    return path


@pytest.mark.parametrize("method", [*METHODS, "state"])
def test_training_goes_on_from_it(method: str, data: Path, tmp_path: Path) -> None:
    base = random_model("x070")
    torch.save(base, tmp_path / "base.pth")
    if method == "state":
        path = tmp_path / "rwkv-0.pth"
        torch.save(random_state(base), path)
    else:
        path = OriginalFile(base, method).add(trained_parts(base)).write(tmp_path / "old")
    config = rp.TrainConfig(
        tmp_path / "base.pth", [data], tmp_path / "run", adapter=path, alpha=alpha_of(method), max_steps=1, lr=1e-3,
        warmup_steps=0, micro_batch=4, device="cpu",
    )  # fmt: skip
    rp.train(config)
    before, after = read_adapter(path, alpha_of(method)), read_adapter(tmp_path / "run" / "adapter")
    assert after.tensors.keys() == before.tensors.keys() and after.parts.keys() == before.parts.keys()
    if before.config is not None and after.config is not None:
        assert (after.config.peft, after.config.rank, after.config.scale) == (method, RANK, before.config.scale)
        assert set(after.config.targets) == set(before.config.targets)
    moved = [difference(t, {**before.tensors, **before.parts}[n]) for n, t in {**after.tensors, **after.parts}.items()]
    assert 0 < max(moved) < 0.1  # one step from the file's values, not from new ones


# --- what is wrong with a file


def change(name: str, make: Callable[[Tensor], Tensor] | None) -> Callable[[Tensors], Any]:
    """Replace a tensor, or delete it."""

    def apply(tensors: Tensors) -> None:
        tensor = tensors.pop(name)
        if make is not None:
            tensors[name] = make(tensor)

    return apply


def with_nan(tensor: Tensor) -> Tensor:
    tensor = tensor.clone()
    tensor.view(-1)[1] = torch.nan
    return tensor


KEY = "blocks.0.att.key"
WRONG: dict[str, tuple[str, Callable[[Tensors], Any], str]] = {
    "no tensors": ("lora", dict.clear, "holds no tensor"),
    "A alone": ("lora", change(f"{KEY}.lora_B", None), f"{KEY}.lora_B is missing"),
    "B alone": ("lora", change(f"{KEY}.lora_A", None), f"{KEY}.lora_A is missing"),
    "ranks of A and B": ("lora", change(f"{KEY}.lora_A", lambda t: t[1:]), r"lora_A \(3, 64\) and lora_B \(64, 4\)"),
    "axes of A": ("lora", change(f"{KEY}.lora_A", lambda t: t.flatten()), f"{KEY}.lora_A .* do not fit"),
    "NaN": ("lora", change(f"{KEY}.lora_A", with_nan), f"{KEY}.lora_A holds 1 NaN"),
    "NaN in a part": ("lora", lambda w: w.update({"ln_out.bias": torch.full((64,), torch.inf)}), "ln_out.bias holds"),
    "two ranks": (
        "lora",
        lambda w: w.update({f"{KEY}.lora_A": w[f"{KEY}.lora_A"][1:], f"{KEY}.lora_B": w[f"{KEY}.lora_B"][:, 1:]}),
        f"{KEY} rank 3; one rank for all",
    ),
    "unknown tensor": ("lora", lambda w: w.update({f"{KEY}.gbmm": torch.ones(2)}), f"{KEY}.gbmm is unknown"),
    "of another program": ("lora", lambda w: w.update({"lm_head.weight": torch.ones(2)}), "lm_head.weight is unknown"),
    "two methods": ("lora", lambda w: w.update({f"{KEY}.disha": torch.ones(4, 64)}), "several methods .disha, lora."),
    "a name twice": (
        "bone",
        lambda w: w.update({f"model.{KEY}.disha": w[f"{KEY}.disha"]}),
        f"{KEY}.disha and model.{KEY}.disha are the same",
    ),
    "a part twice": (
        "bone",
        lambda w: w.update({"ln_out.bias": torch.ones(64), "model.ln_out.bias": torch.ones(64)}),
        "ln_out.bias and model.ln_out.bias are the same",
    ),
    "whole matrices beside": ("lora", lambda w: w.update({f"{KEY}.weight": torch.ones(64, 64)}), "whole model"),
    "axes of a block": ("bone", change(f"{KEY}.disha", lambda t: t[None, None]), f"block of {KEY} has shape"),
    "bat, not square": ("bat", change(f"{KEY}.disha", lambda t: t[:, 1:]), r"has shape \(16, 3, 4\)"),
    "bone and bat": ("bone", lambda w: w.update({f"{KEY}.disha": torch.ones(16, 4, 4)}), "bone .2 axes. and of bat"),
    "two ranks of bone": ("bone", change(f"{KEY}.disha", lambda t: t[1:]), f"{KEY} rank 3"),
    "first bone": ("bone", change(f"{KEY}.disha", lambda t: t.T), "first form of Bone"),
    "second bone": (
        "bat",
        lambda w: w.update({"blocks.1.ffn.key.disha": w["blocks.1.ffn.value.disha"],
                            "blocks.1.ffn.value.disha": w["blocks.1.ffn.key.disha"]}),
        "first form of Bone",
    ),
}  # fmt: skip


def message_of(path: Path, expected: type[RwkvPeftError] = CheckpointError, **arguments: Any) -> str:
    with pytest.raises(expected) as error:
        read_original(path, **arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(("method", "spoil", "message"), WRONG.values(), ids=WRONG)
def test_spoiled_files(method: str, spoil: Callable[[Tensors], Any], message: str, tmp_path: Path) -> None:
    written = OriginalFile(random_model("x070"), method)
    # another matrix first, so that it is this one that stands out
    written.tensors = dict(sorted(written.tensors.items(), key=lambda item: KEY in item[0]))
    spoil(written.tensors)
    path = written.write(tmp_path)
    got = message_of(path, alpha=alpha_of(method))
    assert got.startswith(f"{path}: ") and re.search(message, got)


def test_alpha_must_be_given_and_make_sense(tmp_path: Path) -> None:
    path = OriginalFile(random_model("x070"), "lora").write(tmp_path)
    assert "--alpha N" in message_of(path) and "32" in message_of(path)
    assert "--alpha -1" in message_of(path, ConfigError, alpha=-1.0)


def test_alpha_beside_initial_values_is_ambiguous(tmp_path: Path) -> None:
    path = OriginalFile(random_model("x070"), "pissa").write(tmp_path)
    assert message_of(path, ConfigError, alpha=32.0).startswith("--alpha 32: ")
    named = read_original(path, 32.0, path.with_name("init_pissa.pth")).config  # then it is a PiSSA, which has none
    assert named is not None and named.peft == "pissa" and named.scale == 1


def test_whole_model(tmp_path: Path) -> None:
    for version in VERSIONS:
        torch.save(random_model(version), tmp_path / "base.pth")
        assert "is a whole model, not an adapter" in message_of(tmp_path / "base.pth")


def test_initial_values_in_the_place_of_the_adapter(tmp_path: Path) -> None:
    OriginalFile(random_model("x070"), "pissa").write(tmp_path)
    assert "a PiSSA's initial values; name the rwkv-N.pth" in message_of(tmp_path / "init_pissa.pth")


def test_initial_values_that_do_not_fit(tmp_path: Path) -> None:
    base = random_model("x070")
    written = OriginalFile(base, "pissa")
    path = written.write(tmp_path)
    init = tmp_path / "other.pth"
    for initial, message in (
        (OriginalFile(base, "pissa", rank=2).initial, f"no initial values for {matrices(base)[0]} of the shapes"),
        ({name: t for name, t in written.initial.items() if KEY not in name}, f"no initial values for {KEY}"),
        ({name: t for name, t in written.initial.items() if name != f"{KEY}.init_lora_B"}, "init_lora_B is missing"),
        ({**written.initial, f"{KEY}.init_lora_B": torch.full((64, 4), torch.nan)}, "init_lora_B holds 256 NaN"),
        (written.tensors, "no initial values for"),
    ):
        torch.save(initial, init)
        got = message_of(path, pissa_init=init)
        assert got.startswith(f"{init}: ") and message in got
    assert "no such file" in message_of(path, pissa_init=tmp_path / "none.pth")


def test_a_file_out_of_an_adapter_folder(tmp_path: Path) -> None:
    torch.save(random_model("x070"), tmp_path / "base.pth")
    model = rp.attach_adapter(rp.load_model(tmp_path / "base.pth"), rp.AdapterConfig(rank=RANK))
    rp.save_adapter(model, tmp_path / "adapter")
    assert "name the folder" in message_of(tmp_path / "adapter" / "adapter_model.safetensors", alpha=ALPHA)


def test_nothing_in_a_file_is_executed(tmp_path: Path) -> None:
    torch.save({f"{KEY}.lora_A": Path("x")}, tmp_path / "code.pth")
    assert "never run" in message_of(tmp_path / "code.pth")


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_of_another_base_is_refused(method: str, tmp_path: Path) -> None:
    torch.save(random_model("x070", width=128), tmp_path / "base.pth")
    path = OriginalFile(random_model("x070"), method).write(tmp_path / "run")
    with pytest.raises(CheckpointError, match="name its own base"):
        rp.merge(tmp_path / "base.pth", path, tmp_path / "out.pth", alpha=alpha_of(method))
    assert not (tmp_path / "out.pth").exists()


@pytest.mark.parametrize(("name", "lacks"), [("att.time_state", "blocks.1.att.time_state"), ("att.shift_state", "ffn")])
def test_a_state_without_some_layers_is_refused(name: str, lacks: str, tmp_path: Path) -> None:
    tensors = random_model("x060")
    torch.save(tensors, tmp_path / "base.pth")
    shape = (2, 32, 32) if "time" in name else (64,)
    torch.save({f"blocks.0.{name}": torch.randn(shape)}, tmp_path / "s.pth")
    for use in (
        lambda: rp.merge(tmp_path / "base.pth", tmp_path / "s.pth", tmp_path / "m.pth"),
        lambda: rp.load_adapter(rp.load_model(tmp_path / "base.pth"), tmp_path / "s.pth"),
    ):
        with pytest.raises(CheckpointError, match=f"{lacks}.* is missing"):
            use()


@pytest.mark.parametrize("option", [{"alpha": 8.0}, {"pissa_init": "nowhere.pth"}], ids=str)
def test_options_that_the_file_has_no_use_for(option: dict[str, Any], tmp_path: Path) -> None:
    torch.save(random_model("x070"), tmp_path / "base.pth")
    torch.save({f"blocks.{i}.att.key.bone": torch.randn(4, 64) for i in (0, 1)}, tmp_path / "bone.pth")
    with pytest.raises(
        ConfigError, match=r"--(alpha 8: only a LoRA|pissa-init nowhere.pth: only a PiSSA) has it; leave"
    ):
        rp.merge(tmp_path / "base.pth", tmp_path / "bone.pth", tmp_path / "m.pth", **option)
    assert not (tmp_path / "m.pth").exists()
