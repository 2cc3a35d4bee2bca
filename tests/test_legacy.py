"""The original's command lines: that each trains what it trained there, or says what is missing; and `--split`."""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import re
import shlex
import struct
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
import pytest
import torch

from conftest import random_model
from rwkv_peft.cli import main
from rwkv_peft.config import TrainConfig
from rwkv_peft.data.dataset import load_dataset
from rwkv_peft.data.sampling import Sampler
from rwkv_peft.data.sources import Split
from rwkv_peft.data.tokenizer import Tokenizer
from rwkv_peft.errors import ConfigError, DataError
from rwkv_peft.legacy import TABLE, check_claims, config_of, is_old, reworded, translate
from rwkv_peft.yaml_config import convert, read_yaml, settings_of

ROOT = Path(__file__).parents[1]
# Every flag of the original's train.py in the version of its README; then those of other versions, READMEs and scripts
FLAGS = """
load_model wandb proj_dir random_seed data_file data_type vocab_size ctx_len epoch_steps epoch_count epoch_begin
epoch_save micro_bsz n_layer n_embd dim_att dim_ffn pre_ffn head_qk tiny_att_dim tiny_att_layer lr_init lr_final
warmup_steps beta1 beta2 adam_eps grad_cp dropout weight_decay weight_decay_final my_pile_version my_pile_stage
my_pile_shift my_pile_edecay layerwise_lr ds_bucket_mb my_sample_len my_ffn_shift my_att_shift head_size_a
head_size_divisor my_pos_emb load_partial magic_prime my_qa_mask my_random_steps my_testing my_exit my_exit_tokens
peft train_parts lora_config pissa_config disha_config quant dataload chunk_ctx fla train_type loss_mask mask_id
data_shuffle optim avg_loss sft_field sft_split op fused_kernel lr_schedule accelerator strategy devices num_nodes
precision accumulate_grad_batches
"""
OTHER_FLAGS = """
bone_config miss_config peft_config merge num_workers persistent_workers prefetch_factor lora lora_load lora_r
lora_alpha lora_dropout lora_parts emb LISA lisa_r lisa_k PISSA svd_niter pissa_load pissa_init state_tune compile
l2warp_sparse
"""
DEFAULTS = {
    "epoch_steps": "1000", "epoch_count": "500", "micro_bsz": "12", "lr_init": "6e-4", "lr_final": "1e-5",
    "warmup_steps": "-1", "peft": "none", "train_parts": '["time", "ln"]', "layerwise_lr": "1", "random_seed": "-1",
    "lora_config": '{"lora_load":"", "lora_r":8, "lora_alpha":32, "lora_dropout":0.01}', "dataload": "pad",
}  # fmt: skip

# What the scripts have in common; their shell variables are $names here too
MODEL = "--load_model $load_model --proj_dir $proj_dir --data_file $data_file "
SIZES = "--vocab_size 65536 --n_layer $n_layer --n_embd $n_embd "
STEPS = "--ctx_len $ctx_len --epoch_steps $epoch_steps --epoch_count 1 --epoch_begin 0 --epoch_save $epoch_save "
STEPS += "--micro_bsz $micro_bsz "
ADAM = "--beta1 0.9 --beta2 0.99 --adam_eps 1e-8 "
GPU = "--accelerator gpu --devices 1 --precision bf16 --strategy deepspeed_stage_1 --grad_cp 1 "
RATES = f"--lr_init 2e-5 --lr_final 2e-5 --warmup_steps 0 {ADAM}"
PAD = "--data_type binidx --dataload pad --loss_mask pad "
ALL = MODEL + SIZES + STEPS + RATES + GPU
OLD_ALL = f"{MODEL}--data_type binidx {SIZES}{STEPS}--pre_ffn 0 --head_qk 0 {RATES}{GPU}"
FLAT = "--lora_load rwkv-0 --lora --lora_r 64 --lora_alpha 128 --lora_dropout 0.01 --lora_parts=att,ffn,time,ln "
LORA = """--peft lora --lora_config '{"lora_load":"","lora_r":32,"lora_alpha":32,"lora_dropout":0.0}' """
PISSA = """--peft pissa --pissa_config '{"pissa_load":"","pissa_init":"","pissa_r":32,"svd_niter":4}' """
BONE = """--peft bone --bone_config '{"bone_load":"","bone_r":32}' """
BONE_MODE = """--peft bone --bone_config '{"bone_mode":"bone","bone_load":"","bone_r":64}' """
DISHA = """--peft disha --disha_config '{"mode":"bone","load":"","r":64}' """
BAT = """--peft disha --disha_config '{"mode":"bat","load":"","r":64}' """
SFT = "--data_type sft --sft_field query response "
V5, V6, V7 = "x052", "x060", "x070"

MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]

# name: (version of the model, line, what trains: a method with its rank, and parts)
RUNS: dict[str, tuple[str, str, str]] = {
    "scripts/run_lora.sh": (V6, ALL + PAD + '--my_testing "x060" ' + LORA, "lora 32 time ln"),
    "scripts/run_pissa.sh": (V7, ALL + PAD + '--my_testing "x070" ' + PISSA, "pissa 32 time ln"),
    "its first version": (V6, OLD_ALL + '--my_testing "x060" --dataload pad ' + PISSA + "--wandb peft-loss",
                          "pissa 32 time ln"),
    "scripts/run_bone.sh": (V6, OLD_ALL + '--my_testing "x060" --dataload pad --loss_mask pad ' + BONE
                            + "--train_parts [] --wandb peft-loss", "bat 32"),
    "scripts/run_disha.sh": (V6, ALL + PAD + '--my_testing "x060" ' + DISHA, "bone 64 time ln"),
    "scripts/run_sft.sh": (V7, ALL + '--my_testing "x070" ' + BONE_MODE + SFT + '--sft_split "train" --wandb DiSHA',
                           "bone 64 time ln"),
    "its thousand": (V6, ALL + '--my_testing "x060" ' + BONE_MODE + "--data_shuffle 0 " + SFT
                     + '--sft_split "train[:1000]"', "bone 64 time ln"),
    "scripts/demo-state-tuning.sh": (V6, f"{MODEL}--data_type binidx {SIZES}{STEPS}--pre_ffn 0 --head_qk 0 "
                                     f"--lr_init 1 --lr_final 1e-2 --warmup_steps 10 {ADAM}{GPU}"
                                     '--my_testing "x060" --train_type "state"  --dataload pad --fla', "state"),
    "scripts/run_lora_fp8.sh": (V6, OLD_ALL + '--my_testing "x060" '
        + LORA.replace("}", ',"lora_parts":"att,ffn"}') + '--train_parts [] --wandb "RWKV-PEFT FP8" --quant "fp8"',
        "lora 32"),
    "scripts/test.sh, all weights": (V7, ALL + PAD + '--my_testing "x070" --fla', "full"),
    "demo/demo-lora.sh": (V6, OLD_ALL + '--my_testing "x060" ' + FLAT, "lora 64 time ln"),
    "demo/demo-pissa.sh": (V6, OLD_ALL + '--my_testing "x060" ' + FLAT + "--PISSA --svd_niter 4 --quant nf4",
                                          "pissa 64 time ln"),
    "README of RWKV-5": (V5, OLD_ALL.replace("stage_1", "stage_2") + FLAT, "lora 64 time ln"),
    "README: DiSHA(Bone)": (V7, ALL + SFT + DISHA + '--my_testing "x070"', "bone 64 time ln"),
    "README: DiSHA(Bat)": (V7, ALL + SFT + BAT, "bat 64 time ln"),
    "README: without load": (V7, ALL + SFT + """--peft disha --disha_config '{"mode":"bone","r":32}'""",
                             "bone 32 time ln"),
    "README: --lora_r 64": (V7, ALL + SFT + "--peft lora --lora_r 64 --strategy deepspeed_stage_1 --micro_bsz 1",
                            "lora 64 time ln"),
    "README: train_parts": (V7, ALL + SFT + LORA + "--train_parts [\"time\", \"ln\"]", "lora 32 time ln"),
    "train_parts, quoted": (V6, ALL + SFT + LORA + "--train_parts '[\"time\", \"ln\"]'", "lora 32 time ln"),
    "train_parts, as words": (V5, ALL + SFT + LORA + "--train_parts emb head ln", "lora 32 emb head ln"),
    "README: dataload": (V7, ALL + SFT + LORA + "--dataload pad --strategy deepspeed_stage_3_offload --op fla",
                         "lora 32 time ln"),
    "README: state tuning": (V7, ALL + SFT + '--op fla --train_type state --my_testing "x070"', "state"),
    "README: wsd": (V7, ALL + SFT + LORA + "--lr_final 1e-6 --lr_schedule wsd --warmup_steps 1", "lora 32 time ln"),
    "newer README: LoRA": (V7, ALL + SFT + "--peft lora "
                           """--peft_config '{"r":8,"lora_alpha":32,"lora_dropout":0.05}'""", "lora 8"),
    "newer README: MiSS": (V7, ALL + SFT + """--peft miss --peft_config '{"r":8}'""", "bone 8"),
    "newer README: state": (V7, ALL + SFT + "--peft state --op fla", "state"),
    "state beside LoRA": (V6, ALL + SFT + LORA + "--train_type state", "lora 32 time ln state"),
    "att alone": (V7, ALL + SFT + '--lora --lora_r 4 --lora_parts=att --my_testing "x070"', "lora 4 att"),
    "nothing said": (V7, MODEL + SFT + "--ctx_len 256 --micro_bsz 2 --epoch_steps 2 --epoch_count 1", "full"),
    "LoRA, nothing said": (V7, MODEL + SFT + "--micro_bsz 2 --epoch_steps 2 --epoch_count 1 --peft lora",
                           "lora 8 time ln"),
}  # fmt: skip


def shell(line: str, folder: Path, model: Path, **changes: str) -> list[str]:
    """The words of a line of shell, its variables and the size of the vocabulary set for a small model."""
    source = pair(folder) if of_binidx(line) else data(folder)
    variables = {
        "load_model": str(model), "proj_dir": str(folder / "out"), "data_file": str(source), "n_layer": "2",
        "n_embd": "64", "ctx_len": "256", "epoch_steps": "2", "epoch_save": "1", "micro_bsz": "2",
    } | changes  # fmt: skip
    line = line.replace("--vocab_size 65536", f"--vocab_size {changes.get('vocab_size', 257)}")
    return shlex.split(Template(line).substitute(variables))


def of_binidx(line: str) -> bool:
    return re.findall(r"--data_type (\w+)", line)[-1:] == ["binidx"]


def data(folder: Path, count: int = 6) -> Path:
    """Questions and answers, of which each line is also a conversation."""
    path = folder / "data.jsonl"
    path.write_text(
        "".join(json.dumps({"query": f"{i}?", "response": str(i), "messages": MESSAGES}) + "\n" for i in range(count))
    )
    return path


def pair(folder: Path, texts: Sequence[str] = tuple(f"User: {i}?\n\nAssistant: {i}" for i in range(6))) -> Path:
    """Prefix of a binidx pair as the original's own tool writes it, of bytes; each document ends with token 0."""
    documents = [np.array([*(byte + 1 for byte in text.encode()), 0], np.uint16) for text in texts]
    sizes = [len(document) for document in documents]
    pointers = [2 * sum(sizes[:i]) for i in range(len(sizes))]
    head = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, len(sizes), len(sizes) + 1)
    index = struct.pack(f"<{len(sizes)}i{len(sizes)}q{len(sizes) + 1}q", *sizes, *pointers, *range(len(sizes) + 1))
    (folder / "pair_text_document.idx").write_bytes(head + index)
    (folder / "pair_text_document.bin").write_bytes(b"".join(document.tobytes() for document in documents))
    return folder / "pair_text_document"


def expected(version: str, what: str) -> dict[str, int]:
    """Names and sizes of what trained in the original, from its own rule for parts: a substring of the name."""
    method, *words = what.split()
    shapes = {name: tuple(t.shape) for name, t in random_model(version).items()}
    if method == "full":
        return {name: math.prod(shape) for name, shape in shapes.items()}
    names = {"emb": "emb.weight", "head": "head.weight", "time": "time_", "ln": "ln"}
    found = {n: math.prod(s) for word in words if word in names for n, s in shapes.items() if names[word] in n}
    if version == V7 and "time" in words:  # where no name has `time`, it is the vectors that do its work
        own = re.compile(r"\.(x_\w|[wav]0|k_k|k_a|r_k)$")
        found |= {name: math.prod(shape) for name, shape in shapes.items() if own.search(name)}
    if method == "state" or "state" in words:
        heads, size = (2, 32) if version != V7 else (1, 64)
        found |= {f"blocks.{i}.att.time_state": heads * size * size for i in range(2)}
    for name, shape in shapes.items():
        matrix = re.fullmatch(r"(blocks.\d+.(att|ffn)\.\w+)\.weight", name)
        if (
            matrix
            and not matrix[1].endswith("ln_x")
            and method != "state"
            and ("att" not in words or matrix[2] == "att")
        ):
            rows, columns, rank = *shape, int(words[0])
            tensors = {"lora_A.weight": rank * columns, "lora_B.weight": rank * rows}
            if method in ("bone", "bat"):
                tensors = {"miss_block": rank * rows} if method == "bone" else {"bat_block": columns * rank}
            found |= {f"{matrix[1]}.{tensor}": size for tensor, size in tensors.items()}
    return found


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Names and sizes of what the optimiser of the next run gets."""
    from rwkv_peft.training import run

    names: dict[str, int] = {}
    build = run.build_optimizer

    def spy(model: torch.nn.Module, *args: Any) -> torch.optim.Optimizer:
        names.update({name: p.numel() for name, p in model.named_parameters() if p.requires_grad})
        return build(model, *args)

    monkeypatch.setattr(run, "build_optimizer", spy)
    return names


@pytest.mark.parametrize("name", RUNS)
def test_old_lines_train_what_they_trained(
    name: str, trained: dict[str, int], tmp_path: Path, model_file: Callable[..., Path]
) -> None:
    version, line, what = RUNS[name]
    assert main(["train", *shell(line, tmp_path, model_file(version=version))]) == 0
    assert trained == expected(version, what)
    steps = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    assert len(steps) == 2
    config = read_yaml(tmp_path / "out" / "config.yaml", TrainConfig)
    source = pair(tmp_path) if of_binidx(line) else data(tmp_path)
    assert (config["max_steps"], config["data"]) == (2, [str(source)])
    assert (config["sampling"], config["overlong"], config["mask_id"]) == ("pad", "truncate", "")
    assert config["template"] == ("instruction" if "--sft_field" in line else "rwkv")
    assert config["mask"] == ("pad" if "--loss_mask pad" in line else "auto")
    assert (tmp_path / "out" / ("model.pth" if what == "full" else "adapter")).exists()


def test_a_line_with_its_real_vocabulary(
    trained: dict[str, int], tmp_path: Path, model_file: Callable[..., Path]
) -> None:
    model = model_file(vocab_size=65536, layers=1)
    line = shell(ALL + DISHA + SFT + '--my_testing "x070"', tmp_path, model, n_layer="1", vocab_size="65536")
    assert main(["train", *line]) == 0
    assert sum(trained.values()) == sum(
        n
        for name, n in expected(V7, "bone 64 time ln").items()
        if "blocks.1." not in name and not name.endswith("0.att.v0")
    )


def test_a_file_to_load_is_gone_on_with(
    tmp_path: Path, model_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from rwkv_peft.training import run

    names = [name for name in expected(V7, "lora 4 time ln") if "lora_" in name]
    shapes = {name: (4, -1) if "lora_A" in name else (-1, 4) for name in names}
    sizes = expected(V7, "lora 4")
    saved = {name.removesuffix(".weight"): torch.randn(sizes[name]).reshape(shapes[name]) for name in names}
    torch.save(saved, tmp_path / "rwkv-3.pth")
    begun: dict[str, torch.Tensor] = {}
    build = run.build_optimizer

    def spy(model: torch.nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
        begun.update({name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad})
        return build(model, config)

    monkeypatch.setattr(run, "build_optimizer", spy)
    lora = f"""--peft lora --lora_config '{{"lora_load":"{tmp_path}/rwkv-3.pth","lora_r":4,"lora_alpha":8}}' """
    assert main(["train", *shell(ALL + SFT + lora, tmp_path, model_file())]) == 0
    assert {name: p.numel() for name, p in begun.items()} == expected(V7, "lora 4 time ln")
    assert all(torch.equal(begun[name], saved[name.removesuffix(".weight")]) for name in names)


def test_the_shim_runs(tmp_path: Path, model_file: Callable[..., Path]) -> None:
    line = MODEL + "--data_type sft --ctx_len 256 --micro_bsz 2 --epoch_steps 1 --epoch_count 1"
    words = shell(line, tmp_path, model_file())
    done = subprocess.run([sys.executable, ROOT / "train.py", *words], text=True, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "note   --data_type sft: " in done.stdout
    assert (tmp_path / "out" / "model.pth").exists()


# --- what is an error, in one line

BASE = "--load_model $load_model --proj_dir $proj_dir --data_file $data_file --data_type sft --peft lora "
BASE += "--epoch_steps 1 --epoch_count 1 "  # so that a line without its error ends soon
ERRORS = [
    ("--n_embd 2048", "--n_embd 2048: the model file has 64; leave the flag out, or name the right model"),
    ("--n_layer 24", "--n_layer 24: the model file has 2;"),
    ("--vocab_size 65536 ", "--vocab_size 65536: the model file has 257;"),
    ("--dim_att 128", "--dim_att 128: the model file has 64;"),
    ("--dim_ffn 224", "--dim_ffn 224: the model file has 256;"),
    ("--head_size_a 32", "--head_size_a 32: the model file has 64;"),
    ("--head_size_divisor 1", "--head_size_divisor 1: the model file has 8;"),
    ('--my_testing "x060"', "--my_testing x060: the model file has x070;"),
    ("--load_model nope.pth --n_embd 64", "nope.pth: no such file"),
    ("--train_type infctx --chunk_ctx 512 --ctx_len 2048",
     "--train_type infctx: infinite context is not there yet; .*--ctx_len.*--grad_cp 1"),
    ("--quant int3", "--quant int3: .*nf4"),
    ("--quant nf4 --train_type infctx", "--train_type infctx: infinite context is not there yet"),
    ("--devices 2", "--devices 2: several devices are not there yet"),
    ("--num_nodes 2", "--num_nodes 2: several nodes are not there yet"),
    ("--precision fp16", "--precision fp16: not there yet; choose bf16, or fp32"),
    ("--precision half", "--precision half: allowed are bf16 "),
    ("--accelerator xpu", "--accelerator xpu: allowed are gpu cuda auto cpu"),
    ("--LISA --lisa_r 2 --lisa_k 100", "--LISA: LISA is not there"),
    ("--my_pile_stage 3", "--my_pile_stage 3: pre-training in stages is not there; .* --windows prime"),
    ("--my_pile_version 2", "--my_pile_version 2: a list of binidx files in a file is not there"),
    ("--loss_mask se --data_type jsonl --mask_id '{\"mask01\":\"b\"}'",
     "--mask_id: mask01 is no key of it; did you mean mask1.; allowed are mask0 mask1$"),
    ("--loss_mask se --data_type jsonl --mask_id '{\"mask1\":\"\"}'",
     '--mask_id mask1 "": must be a text, and not empty'),
    ("--loss_mask se --data_type jsonl --mask_id '{\"mask0\":0}'", "--mask_id mask0 0: must be a text"),
    ("--loss_mask answers", "--loss_mask answers: allowed are none pad qa se"),
    ("--dataload all", "--dataload all: allowed are pad get only"),
    ("--data_type binidx --data_file d_text_document",
     "--data_file d_text_document: no file d_text_document.idx; name the PREFIX of"),
    ("--data_type binidx --data_file /", "/: "),
    ("--data_type binidx --dataload only --data_file $binidx",
     "--micro_bsz 12: must be 1 with --dataload only; write --micro_bsz 1"),
    ("--data_type numpy --data_file d.npy",
     "--data_type numpy: such data is not read here; name a JSONL file, or .* `rwkv-peft prepare`"),
    ("--data_type uint16 --data_file d.bin", "--data_type uint16: such data is not read here;"),
    ("--data_type dummy --data_file ''", "--data_type dummy: such data is not read here;"),
    ("--data_type utf-8 --data_file meta-math/MetaMathQA",
     "--data_file meta-math/MetaMathQA: no such file, which --data_type utf-8 reads as text; .* --data_type binidx or"),
    ("--data_type utf-16le --data_file $text", "--data_type utf-16le: only text in UTF-8 is read; .*iconv -f utf-16le"),
    ("--data_type bindx --data_file $text", "--data_type bindx: no data type and no encoding; allowed are sft "),
    ("--data_type binidx --loss_mask qa --dataload get --data_file $text", "--data_file .*text.txt: no file .*.idx;"),
    ("--data_file nope.jsonl", "nope.jsonl: no such file"),
    ("--data_file ''", "--data_file: missing"),
    ("--load_model ''", "--load_model: missing; training a new model .*not there yet"),
    ("--sft_field query", "--sft_field query: must be 2 fields"),
    ("--sft_field q a", "data.jsonl:1: no field 'q'"),
    ("--sft_split train[3]", "--sft_split train.3.: no known form; write train, train\\[:1000\\]"),
    ("--lora_config '{lora_r:8}'", "--lora_config {lora_r:8}: broken JSON"),
    ("--lora_config '[]'", "--lora_config \\[\\]: must be a JSON object"),
    ("--lora_config '{\"lora_rank\":8}'", "--lora_config: lora_rank is no key of it; did you mean lora_"),
    ("--lora_config '{\"lora_r\":\"many\"}'", "--lora_config lora_r many: must be a whole number"),
    ("--lora_config '{\"lora_load\":1}'", "--lora_config lora_load 1: must be a path"),
    ("--lora_load rwkv-0.pth", "rwkv-0.pth: "),
    ("--lora --lora_parts ln,time", "--lora_parts ln,time: adapts nothing"),
    ("--peft disha --disha_config '{\"mode\":\"bad\"}'", "--disha_config mode bad: allowed are bone bat"),
    ("--peft disha --disha_config '{\"r\":0}'", "--disha_config r 0: must be at least 1"),
    ("--peft lroa", "--peft lroa: allowed are none lora pissa disha bone miss bat state"),
    ("--train_parts hed", "--train.parts hed: allowed are time ln emb head"),
    ("--train_type both", "--train_type both: allowed are none finetune state"),
    ("--lr_schedule linear", "--lr_schedule linear: allowed are cos wsd"),
    ("--optim lion", "--optim lion: allowed are none adam_mini adamw "),
    ("--micro_bsz x", "--micro_bsz x: must be a whole number"),
    ("--micro_bsz", "--micro_bsz: must be one value"),
    ("--micro_bsz 1 2", "--micro_bsz 1 2: must be one value"),
    ("--epoch_count 0", "--epoch_count 0: must be at least 1"),
    ("-n_layer 2", "-n_layer: a flag begins with two hyphens; did you mean --n_layer?"),
    ("—fla", "—fla: a flag begins with two hyphens; did you mean --fla?"),
    ("--lora no", "--lora no: is a flag without a value; leave out no, or the flag"),
    ("--pre_ffn 1", "--pre_ffn 1: the model file has 0;"),
    ("--peft disha --disha_config '{\"mode\":[\"bone\"]}'", "--disha_config mode .'bone'.: allowed are bone bat"),
    ("--peft disha --disha_config '{\"r\":null}'", "--disha_config r null: must be a number"),
    ("--random_seed 18446744073709551616", "--random_seed 18446744073709551616: must be at least 0 and below"),
    ("--peft 'a\nb'", "--peft a b: allowed are"),
    # what is found while the run is prepared, in the words of the line
    ("--lr_init -1e-3", "--lr_init -0.001: must be above 0"),
    ("--beta1 1.5", "--beta1 1.5 0.99: both must be"),
    ("--lora_r 0", "--lora_r 0: must be at least 1"),
    ("--lora_config '{\"lora_alpha\":0}'", "--lora_config lora_alpha 0.0: must be above 0"),
    ("--proj_dir ''", "--proj_dir"),
    ("--proj_dir " + "a/" * 30 + "a" * 300, "--proj_dir a+…: a name of 300 letters is too long"),
    ("--data_file " + "a" * 300, ".*File name too long"),
    ("--load_model " + "a" * 300 + ".pth", "a+.pth: .*File name too long"),
    ("--sft_field nope response", ".*no field 'nope'"),
    ("--ctx_len 1", ".*--ctx_len 1 .*--overlong.* .--overlong: of today's line, docs/migration.md.$"),
    ("--lod_model m.pth", "--lod_model: no flag of the original; did you mean --load_model?"),
    ("--rank 8", "--load_model is a flag of the original, --rank one of today's: write the line in one of the two"),
    ("--config run.yaml", "--load_model is a flag of the original, --config one of today's"),
]  # fmt: skip

ERRORS = [(BASE + flags, message) for flags, message in ERRORS] + [
    # whole scripts
    (OLD_ALL + FLAT + '--my_testing "x060"  --dataload pad --PISSA --svd_niter 4 --wandb long --train_type infctx '
     "--chunk_ctx 2048 --fla", "--train_type infctx: infinite context is not there yet"),
    (OLD_ALL + "--dataload pad --loss_mask se --mask_id '{\"mask0\":\"<ltoken>\",\"mask01\":\"<rtoken>\"}' " + BONE,
     "--mask_id: mask01 is no key of it; did you mean mask"),
    (OLD_ALL + '--my_testing "x060" --LISA --lisa_r 2 --lisa_k 100', "--LISA: LISA is not there"),
    (ALL.removeprefix("--load_model $load_model ") + SFT, "--load_model: missing; training a new model"),
    (OLD_ALL.removeprefix("--load_model $load_model ").replace("gpu", "xpu") + '--train_type "finetune" --fla',
     "--load_model: missing; training a new model"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "message"), ERRORS, ids=[message for _, message in ERRORS])
def test_errors_are_one_line(
    line: str, message: str, tmp_path: Path, model_file: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text("Hello. " * 20)
    files = {"text": str(tmp_path / "text.txt"), "binidx": str(pair(tmp_path))}
    words = shell(line, tmp_path, model_file(), vocab_size="65536", **files)
    assert main(["train", *words]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert re.match(f"error: (.*/)?{message.replace('?', '[?]')}", lines[0])
    assert not (tmp_path / "out").exists()


def test_a_word_before_any_flag() -> None:
    with pytest.raises(ConfigError, match="'x': unexpected"):
        translate(["x", "--load_model", "m"])


def test_a_line_without_a_version_means_the_files(
    trained: dict[str, int], tmp_path: Path, model_file: Callable[..., Path]
) -> None:
    """RWKV-7 has no gate, and trained at one rate; RWKV-6 and 5 have one, and two rates."""
    for version in (V7, V6):
        trained.clear()
        out = str(tmp_path / version)
        line = ALL + SFT + "--lora --lora_r 4 --lora_parts=att,time"
        assert main(["train", *shell(line, tmp_path, model_file(version=version), proj_dir=out)]) == 0
        assert trained == expected(version, "lora 4 att time")
        assert read_yaml(Path(out) / "config.yaml", TrainConfig)["layerwise_lr"] == (version == V6)


def test_what_is_new_about_time_is_said(
    tmp_path: Path, model_file: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    line = MODEL + SFT + "--ctx_len 256 --micro_bsz 2 --epoch_steps 1 --epoch_count 1 --peft lora "
    for flags, said in (("", True), ("--train_parts ln ", False)):
        model = model_file()
        assert main(["train", *shell(line + flags, tmp_path, model, proj_dir=str(tmp_path / f"o{said}"))]) == 0
        assert ("note   --train_parts time: in RWKV-7 x_* " in capsys.readouterr().out) == said


def test_a_file_of_another_rank_is_gone_on_with(tmp_path: Path, model_file: Callable[..., Path]) -> None:
    """Unless the line gives a rank, which then is quoted as it was given."""
    tensors = {f"blocks.{i}.att.key.bone": torch.randn(5, 64) for i in range(2)}
    torch.save(tensors, tmp_path / "rwkv-1.pth")
    disha = f"""--peft disha --train_parts [] --disha_config '{{"mode":"bone","load":"{tmp_path}/rwkv-1.pth"RANK}}' """
    line = ALL + SFT + disha
    assert main(["train", *shell(line.replace("RANK", ""), tmp_path, model_file())]) == 0
    (tmp_path / "again").mkdir()
    with pytest.raises(ConfigError, match=r"--rank 64: .* has 5"):
        from rwkv_peft.training.run import train

        words = shell(line.replace("RANK", ',"r":64'), tmp_path, model_file(), proj_dir=str(tmp_path / "again"))
        train(config_of(words, say=lambda note: None))
    message = reworded("--rank 64: has 5; --alpha --seed-x a/--rank `--lr`", words)
    assert message == "--disha_config r 64: has 5; --lora_alpha --seed-x a/--rank `--lr_init`"


# --- what of the data is learnt

QA = "User: 1?\n\nAssistant: 2.\n\nUser: 3?\n\nAssistant: User"
TEXTS = (QA, "no marks", "<q>a<a>b<q>c")
PROMPT = (  # of the original's rwkvt/dataset/SFTdataset.py
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{}\n\n### Response:"
)
MASKED_QA = "[User: 1?\n\n]Assistant: 2.\n\n[User: 3?\n\n]Assistant: User∅"
# flags, context length: the rows, in brackets what is not learnt, in the order of the data; ∅ is token 0
LEARNT: list[tuple[str, int, list[str]]] = [
    ("--data_type sft --sft_field query response", 999,
     [f"[{PROMPT.format('1?')}]2\n\x17", f"[{PROMPT.format('3?')}]4\n\x17"]),
    ("--data_type sft --sft_field query response --sft_split train[1:] --loss_mask pad", 999,
     [f"[{PROMPT.format('3?')}]4\n\x17"]),
    ("--data_type sft", 999, ["[User: Hi\n\nAssistant:] Hello!∅"] * 2),
    ("--data_type jsonl", 999, ["[User: Hi\n\nAssistant:] Hello!∅"] * 2),
    ("--data_type jsonl --loss_mask pad", 999, ["[U]ser: Hi\n\nAssistant: Hello!∅"] * 2),
    ("--data_type jsonl --loss_mask qa", 999, ["[User: Hi\n\n]Assistant: Hello!∅"] * 2),
    ("--data_type jsonl --data_file $texts", 999, [f"[{text[0]}]{text[1:]}∅" for text in TEXTS]),
    ("--data_type jsonl --data_file $texts --loss_mask qa", 999,
     [MASKED_QA, "[n]o marks∅", "[<]q>a<a>b<q>c∅"]),
    ("--data_type jsonl --data_file $texts --loss_mask se --mask_id '{\"mask0\":\"<q>\",\"mask1\":\"<a>\"}'", 999,
     [f"[U]{QA[1:]}∅", "[n]o marks∅", "[<q>a]<a>b[<q>c∅]"]),
    ("--data_type jsonl --data_file $texts --loss_mask se", 999,  # from a 1 to the next 0, of which there is none
     ["[User: ]1" + QA.partition("1")[2] + "∅", "[n]o marks∅", "[<]q>a<a>b<q>c∅"]),
    ("--data_type binidx --data_file $binidx", 999, [f"[{text[0]}]{text[1:]}∅" for text in TEXTS]),
    ("--data_type binidx --data_file $binidx --loss_mask pad", 4, ["[U]ser:", "[n]o ma", "[<]q>a<"]),
    ("--data_type binidx --data_file $binidx --loss_mask qa", 999, [MASKED_QA, "[n]o marks∅", "[<]q>a<a>b<q>c∅"]),
    ("--data_type binidx --data_file $binidx --dataload only --micro_bsz 1", 5, ["[U]ser: ", "[n]o mar", "[<]q>a<a"]),
]  # fmt: skip


def shown(row: Any) -> str:
    """The text of a row of bytes, in brackets what is not learnt; ∅ is token 0."""
    marks = [("" if a == b else "]" if b else "[") for a, b in itertools.pairwise([True, *row.target.tolist(), True])]
    letters = ["∅" if i == 0 else chr(i - 1) for i in row.ids.tolist()]
    return "".join(map(str.__add__, marks, [*letters, ""]))


def line_for(flags: str, folder: Path, model: Path, ctx_len: int) -> list[str]:
    """A line with these flags, on two examples of fields and on TEXTS."""
    lines = [{"query": f"{i}?", "response": str(i + 1), "messages": MESSAGES} for i in (1, 3)]
    (folder / "lines.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    (folder / "text.txt").write_text("".join(TEXTS))
    files = {"data_file": "lines.jsonl", "texts": "texts.jsonl", "text": "text.txt"}
    (folder / "other").mkdir()
    names = {name: str(folder / file) for name, file in files.items()} | {"binidx": str(pair(folder / "other", TEXTS))}
    return shell(MODEL + f"--ctx_len {ctx_len} --peft lora " + flags, folder, model, **names)


@pytest.mark.parametrize(("flags", "ctx_len", "rows"), LEARNT, ids=[f"{flags}, {n}" for flags, n, _ in LEARNT])
def test_what_of_the_data_is_learnt(
    flags: str, ctx_len: int, rows: list[str], tmp_path: Path, model_file: Callable[..., Path]
) -> None:
    config = config_of(line_for(flags, tmp_path, model_file(), ctx_len), say=lambda note: None)
    config.check()
    dataset = load_dataset(config, Tokenizer.byte())
    assert [shown(dataset.piece(i)) for i in range(len(dataset.pieces))] == rows
    batches = Sampler.of(config.resolved(), dataset).step(0)
    assert sum(len(batch.tokens) for batch in batches) == min(len(rows), config.micro_batch or 0)
    assert all(batch.cu_seqlens is None for batch in batches)


@pytest.mark.parametrize(
    ("flags", "stream"),
    [
        ("--data_type binidx --data_file $binidx --dataload get", "".join(f"{text}∅" for text in TEXTS)),
        ("--data_type utf-8 --data_file $text", "".join(TEXTS) + "∅"),
        ("--data_file $text", "".join(TEXTS) + "∅"),
    ],
)
def test_windows_of_a_stream(flags: str, stream: str, tmp_path: Path, model_file: Callable[..., Path]) -> None:
    config = config_of(line_for(flags, tmp_path, model_file(), ctx_len=8), say=lambda note: None)
    config.check()
    assert config.without_effect() == []
    dataset = load_dataset(config, Tokenizer.byte())
    (batch,) = Sampler.of(config.resolved(), dataset).step(0)
    ids = torch.cat([batch.tokens, batch.labels.reshape(-1, 8)[:, -1:]], 1)
    rows = ["".join("∅" if i == 0 else chr(i - 1) for i in row) for row in ids.tolist()]
    assert len(rows) == min(12, math.ceil((len(stream) - 1) / 8))
    assert all(len(row) == 9 and row in stream for row in rows)
    assert {stream.index(row) % 8 for row in rows} != {0}


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--data_type binidx --data_file $binidx --dataload get --loss_mask qa", "get: "),
        ("--data_type binidx --data_file $binidx --dataload only --micro_bsz 1", "only: 3 rows an epoch"),
        ("--data_file $text --ctx_len 8", "get: "),
        ("--data_type jsonl --data_file $texts --loss_mask se", "pad: 3 rows an epoch"),
    ],
)
def test_all_ways_to_fill_rows_run_and_run_again(
    flags: str, said: str, tmp_path: Path, model_file: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """The second time from the settings that the line was translated to."""
    steps = " --epoch_steps 2 --epoch_count 1"
    words = line_for(flags + steps, tmp_path, model_file(), ctx_len=16)
    assert main(["train", *words]) == 0
    assert f"rows; {said}" in capsys.readouterr().out
    assert main(["train", "--config", str(tmp_path / "out" / "config.yaml"), "--out", str(tmp_path / "new")]) == 0
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / out / "metrics.jsonl").read_text().splitlines()]
        for out in ("out", "new")
    ]
    assert len(losses[0]) == 2
    assert losses[0] == losses[1]


# --- the translation

NEEDED = ["--load_model", "m.pth", "--data_file", "d.jsonl"]
VALUES: list[tuple[str, dict[str, Any]]] = [
    ("", {
        "model": "m.pth", "data": ["d.jsonl"], "out": "out", "peft": "full", "micro_batch": 12, "grad_accum": 1,
        "max_steps": 500_000, "lr": 6e-4, "lr_final": 1e-5, "schedule": "cosine", "warmup_steps": 0,
        "betas": [0.9, 0.99], "adam_eps": 1e-8, "weight_decay": 0.0, "optim": "adamw", "layerwise_lr": True,
        "seed": 0, "ctx_len": 1024, "overlong": "truncate", "grad_checkpoint": "none", "device": "auto",
        "sampling": "pad", "mask": "auto", "template": None, "fields": None, "split": None,
    }),
    ("--peft lora", {"rank": 8, "alpha": 32.0, "dropout": 0.01, "train_parts": ["time", "ln"]}),
    ("--peft pissa", {"rank": 8, "svd_iterations": 4, "alpha": None, "dropout": None}),
    ("--peft disha", {"peft": "bone", "rank": 64}),
    ("--peft miss --miss_config '{\"mode\":\"bat\"}'", {"peft": "bat", "rank": 64}),
    ("--peft bat", {"peft": "bat", "rank": 64}),
    ("--peft lora --lora_config '{\"lora_load\": \"a/rwkv-3.pth\", \"lora_r\": 4}'",
     {"adapter": "a/rwkv-3.pth", "rank": 4, "alpha": 32.0}),
    ("--peft lora --lora_config '{\"lora_load\": \"a/rwkv-3.pth\"}'", {"adapter": "a/rwkv-3.pth", "rank": None}),
    ("--peft bone --bone_config '{\"bone_r\": 16}'", {"peft": "bat", "rank": 16}),
    ("--peft bone --bone_config '{\"bone_mode\": \"bone\"}'", {"peft": "bone", "rank": 64}),
    ("--peft lora --lora_config '{\"lora_load\":\"a.pth\",\"lora_parts\":\"att\"}'",
     {"adapter": "a.pth", "targets": None}),
    ("--lora --lora_load a.pth", {"targets": None, "rank": None, "alpha": 32.0}),
    ("--lora --lora_load . --lora_r 4", {"adapter": ".", "rank": 4, "alpha": None}),
    ("--peft lora --lora_config {\"lora_r\":4, \"lora_alpha\":8}".replace('"', '\\"'), {"rank": 4, "alpha": 8.0}),
    ("--peft pissa --pissa_config '{\"pissa_load\":\"rwkv-0.pth\",\"pissa_init\":\"i.pth\",\"svd_niter\":2}'",
     {"adapter": "rwkv-0.pth", "pissa_init": "i.pth", "svd_iterations": 2}),
    ("--peft miss --peft_config '{\"r\": 16}'", {
        "peft": "bone", "rank": 16, "targets": ["receptance", "key", "value", "output"], "train_parts": ["none"],
    }),
    ("--peft lora --peft_config '{\"use_dora\": true}' --train_parts ln",
     {"rank": 8, "alpha": 8.0, "dropout": 0.0, "dora": True, "train_parts": ["ln"]}),
    ("--peft adalora --peft_config '{\"init_r\": 4}'", {"peft": "peft:ADALORA", "peft_config": '{"init_r": 4}'}),
    ("--peft bone --peft_config '{\"init_weights\": \"bat\"}'", {"peft": "peft:MISS"}),
    ("--train_type state --lr_init 1", {"peft": "state", "train_parts": ["none"], "lr": 1.0, "lr_state": None}),
    ("--peft state --peft_config {}", {"peft": "state", "rank": None}),
    ("--state_tune", {"peft": "state"}),
    ("--peft lora --train_type state", {"train_parts": ["time", "ln", "state"], "lr_state": 6e-4}),
    ("--peft lora --train_type finetune --emb", {"train_parts": ["time", "ln", "emb", "head"]}),
    ("--peft lora --train_parts [time, ln]", {"train_parts": ["time", "ln"]}),
    ("--peft lora --train_parts []", {"train_parts": ["none"]}),
    ("--peft lora --train_parts", {"train_parts": ["none"]}),
    ("--lora", {"peft": "lora", "train_parts": ["time", "ln"],
                "targets": ["att.receptance", "att.key", "att.value", "att.output", "att.gate"]}),
    ("--lora --lora_parts ffn --my_testing x070", {"targets": ["ffn.key", "ffn.value"], "train_parts": ["none"]}),
    ("--epoch_steps 10 --epoch_count 3 --accumulate_grad_batches 4", {"max_steps": 9, "grad_accum": 4}),
    ("--epoch_steps 10 --epoch_count 9 --epoch_begin 2 --my_exit 4", {"max_steps": 30}),
    ("--lr_final 6e-4", {"schedule": "constant", "lr_final": 6e-4}),
    ("--lr_schedule wsd", {"schedule": "cosine", "lr_final": 0.0, "warmup_steps": 100}),
    ("--lr_schedule wsd --warmup_steps 7 --lr_init 1", {"lr_final": 0.0, "warmup_steps": 7}),
    ("--lr_schedule wsd --lr_final 6e-4", {"schedule": "constant", "lr_final": 6e-4, "warmup_steps": 0}),
    ("--beta2 0.999 --adam_eps 1e-6", {"betas": [0.9, 0.999], "adam_eps": 1e-6}),
    ("--weight_decay 0.1 --weight_decay_final 0.01", {"weight_decay": 0.1, "weight_decay_final": 0.01}),
    ("--optim adam_mini", {"optim": "adamw"}),
    ("--optim adafactor --layerwise_lr 0", {"optim": "adafactor", "layerwise_lr": False}),
    ("--my_testing x070 --layerwise_lr 1", {"layerwise_lr": False}),
    ("--random_seed 5 --grad_cp 1 --accelerator cpu", {"seed": 5, "grad_checkpoint": "block", "device": "cpu"}),
    ("--precision bf16", {"precision": "bf16"}),
    ("--precision tf32", {"precision": "fp32"}),
    ("--sft_field q a --sft_split train[:9]", {"fields": ["q", "a"], "split": "train[:9]", "template": None}),
    ("--data_type sft --sft_field q a --loss_mask qa --dataload get",
     {"fields": ["q", "a"], "template": "instruction", "sampling": "pad", "windows": None, "mask": "auto"}),
    ("--data_type sft --data_file meta-math/MetaMathQA", {"data": ["meta-math/MetaMathQA"], "template": None}),
    ("--data_type jsonl --data_file meta-math/MetaMathQA", {"data": ["meta-math/MetaMathQA"], "sampling": "pad"}),
    ("--data_type jsonl --loss_mask pad --dataload only", {"mask": "pad", "sampling": "pad", "micro_batch": 12}),
    ("--loss_mask qa", {"mask": "qa", "mask_id": None}),
    ("--loss_mask se", {"mask": "se", "mask_id": '{"mask0": "0", "mask1": "1"}'}),
    ("--loss_mask se --mask_id '{\"mask1\":\"ja…\"}'", {"mask_id": '{"mask0": "0", "mask1": "ja…"}'}),
    ("--data_type binidx --data_file p", {"data": ["p"], "sampling": "pad", "overlong": "truncate", "mask": "auto"}),
    ("--data_type binidx --data_file p.bin --dataload pad --loss_mask se", {"data": ["p.bin"], "mask": "se"}),
    ("--data_type binidx --data_file p.idx --dataload only --micro_bsz 1",
     {"sampling": "only", "micro_batch": 1, "overlong": "truncate", "windows": None}),
    ("--data_type binidx --data_file p --dataload get --loss_mask qa",
     {"sampling": "get", "windows": "random", "overlong": None, "mask": "qa"}),
    ("--data_type binidx --data_file d.jsonl.gz --dataload get", {"sampling": "get", "windows": "random"}),
    ("--data_type binidx --data_file folder --dataload get", {"data": ["folder"], "sampling": "get"}),
    ("--data_file folder", {"data": ["folder"], "sampling": "pad", "overlong": "truncate"}),
    ("--data_type utf-8 --data_file folder", {"data": ["folder"], "sampling": "get"}),
    ("--data_file t.txt", {"data": ["t.txt"], "sampling": "get", "windows": "random", "overlong": None}),
    ("--data_type UTF8 --data_file t.txt --loss_mask pad", {"sampling": "get", "mask": "pad"}),
    ("--data_type ascii --data_file t.txt --dataload pad", {"sampling": "get"}),
    ("--data_type numpy --data_file d.CSV", {"data": ["d.CSV"], "sampling": "pad"}),
    ("--ctx-len=64 --micro-bsz 3 --micro_bsz 4", {"ctx_len": 64, "micro_batch": 4}),
]  # fmt: skip


@pytest.fixture
def some_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What VALUES and NOTES name as data and is looked for, in the folder where the test runs."""
    for name in ("p.idx", "p.bin", "t.txt"):
        (tmp_path / name).touch()
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(("line", "values"), VALUES, ids=[line or "nothing" for line, _ in VALUES])
def test_values(line: str, values: dict[str, Any], some_data: None) -> None:
    translated = translate([*NEEDED, *shlex.split(line)]).values
    assert {name: translated.get(name) for name in values} == values
    for name, value in translated.items():
        convert(value, settings_of(TrainConfig)[name].hint, name)


NOTES = [
    ("", []),
    ("--optim adam_mini", ["--optim adam_mini: runs as adamw"]),
    ("--n_embd 64 --quant none --wandb '' --strategy auto --devices 1 --num_nodes 1", []),
    ("--pre_ffn 0 --head_qk 0 --loss_mask pad --dataload pad --epoch_begin 0 --mask_id {} --my_pile_version 1 "
     "--my_pile_stage 0 --magic_prime 0", ["--epoch_begin --magic_prime: nothing to do"]),
    ("--magic_prime 2926181 --my_sample_len 8",
     ["--magic_prime 2926181: computed from the data", "--my_sample_len 8: the length of the samples of uint16"]),
    ("--op fla --fla", ["--op fla: the fastest operator that runs here", "--fla: the fastest operator"]),
    ("--strategy deepspeed_stage_2_offload",
     ["--strategy deepspeed_stage_2_offload: one device needs none; .*not there yet"]),
    ("--wandb project", ["--wandb project: not there yet; metrics.jsonl"]),
    ("--epoch_save 1", ["--epoch_save 1: .*not there yet"]),
    ("--chunk_ctx 512", ["--chunk_ctx 512: .*not there yet"]),
    ("--dataload get", ["--dataload get: a row is one example, padded, as in the original"]),
    ("--data_type sft --sft_field q a", []),
    ("--data_type sft --sft_field q a --dataload only --loss_mask se",
     ["--dataload only: a row is one example", "--loss_mask se: no effect with --data_type sft, as in the original"]),
    ("--data_type sft --sft_field q a --dataload pad --loss_mask none", []),
    ("--data_type jsonl --loss_mask se", ["--loss_mask se: holds for JSONL too"]),
    ("--data_type jsonl --loss_mask pad", []),
    ("--data_type binidx --data_file p --dataload get --loss_mask qa", []),
    ("--data_type binidx --data_file p --sft_field q a",
     ["--sft_field q a: no effect, as in the original: binidx has no fields"]),
    ("--data_type binidx", ["--data_type binidx: d.jsonl is JSONL, and read as such"]),
    ("--data_type binidx --data_file x/d.json.zst", ["--data_type binidx: d.json.zst is JSON, and read as such"]),
    ("--data_type dummy --data_file d.parquet", ["--data_type dummy: d.parquet is PARQUET, and read as such"]),
    ("--data_file t.txt", ["--data_type utf-8: text, read with the model's tokenizer; the original made a vocabulary"]),
    ("--data_type utf-8 --data_file t.txt --dataload pad --sft_field q a",
     ["--data_type utf-8: text", "--sft_field q a: no effect, as in the original: text has no fields",
      "--dataload pad: no effect on text"]),
    ("--data_file t.txt --dataload get", ["--data_type utf-8: text"]),
    ("--data_shuffle 0", ["--data_shuffle 0: rows come in a random order"]),
    ("--data_type sft", ["--data_type sft: prompts take RWKV's own form"]),
    ("--lr_schedule wsd", ["--lr_schedule wsd: a warm-up of 100 steps and a cosine to 0, .*--schedule wsd"]),
    ("--lr_schedule wsd --lr_final 6e-4", ["--lr_schedule wsd: no effect"]),
    ("--precision tf32", ["--precision tf32: fp32 is taken"]),
    ("--train_parts ln", ["--train_parts ln: no effect, .* every weight trains"]),
    ("--peft state --train_parts ln", ["--train_parts ln: no effect, .* the state alone trains"]),
    ("--lora_r 8", ["--lora_r 8: no effect with --peft none"]),
    ("--peft lora --pissa_config '{\"r\":8}'", ["--pissa_config {\"r\":8}: no effect with --peft lora"]),
    ("--lora --PISSA --lora_alpha 128 --lora_parts att,ffn", ["--lora_alpha 128: no effect with --peft pissa"]),
    ("--lora --lora_load rwkv-0", ["--lora_load rwkv-0: no such file, so a new adapter begins"]),
    ("--peft lora --train_type state", ["--train_type state: the state trains beside the adapter and parts"]),
    ("--peft bone --bone_config '{\"bone_r\":8}'",
     ["--bone_config {\"bone_r\":8}: Bone, while it had no bone_mode, was"]),
    ("--peft lora --my_testing x070", ["--train_parts time: in RWKV-7 x_"]),
    ("--loss_mask qa", ["--loss_mask qa: holds for JSONL too, of which the original trained on all"]),
    ("--mask_id '{\"mask0\":\"a\"}'", ["--mask_id {\"mask0\":\"a\"}: no effect: it is for --loss_mask se$"]),
    ("--data_type binidx --data_file p --loss_mask qa --mask_id '{\"mask01\":\"a\"}'",
     ["--mask_id {\"mask01\":\"a\"}: no effect: it is for --loss_mask se, and for --loss_mask qa it is User: and"]),
    ("--merge 0 --fused_kernel --dropout 0.1", ["--merge 0: `rwkv-peft merge", "--fused_kernel: ", "--dropout 0.1: "]),
]  # fmt: skip


@pytest.mark.parametrize(("line", "notes"), NOTES, ids=[line or "nothing" for line, _ in NOTES])
def test_notes(line: str, notes: list[str], some_data: None) -> None:
    said = translate([*NEEDED, *shlex.split(line)]).notes
    assert len(said) == len(notes), said
    assert all(re.match(pattern, note) for pattern, note in zip(notes, said, strict=True)), said


def test_without_a_gpu_the_run_says_so() -> None:
    notes = check_claims({"accelerator": "gpu"}, "unread")
    assert notes == ([] if torch.cuda.is_available() else ["--accelerator gpu: no GPU here, so the CPU does it"])


def test_claims_that_agree_are_silent(model_file: Callable[..., Path]) -> None:
    line = """--n_layer 2 --n_embd 64 --vocab_size 0 --dim_att 0 --dim_ffn 256 --head_size_a 64 --my_testing x070a
    --head_size_divisor 8"""
    claims = translate([*NEEDED, *line.split()]).claims
    assert claims == {
        "n_layer": 2, "n_embd": 64, "dim_ffn": 256, "head_size_a": 64, "my_testing": "x070a", "head_size_divisor": 8,
    }  # fmt: skip
    assert check_claims(claims, model_file()) == []


@pytest.mark.parametrize(
    ("line", "old"),
    [
        ("--load_model m --peft lora", True),
        ("--micro-bsz=3", True),
        ("--peft lora --ctx_len 64 --warmup_steps 3 --op auto", False),
        ("--model m --quant nf4 --devices 2 --strategy ddp --wandb x", False),  # flags that today's line will have too
        ("load_model", False),
        ("", False),
    ],
)
def test_what_is_read_as_old(line: str, old: bool) -> None:
    assert is_old(line.split()) == old


def test_messages_are_in_the_words_of_the_line() -> None:
    message = "--sampling a --windows b --mask c --mask-id d --template e"
    said = "--dataload a --windows b --loss_mask c --mask_id d --template e"
    assert reworded(message, NEEDED) == f"{said} (--windows --template: of today's line, docs/migration.md)"


# --- the table and its page


def test_every_flag_of_the_original_has_a_row() -> None:
    assert len(FLAGS.split()) == 76
    assert TABLE.keys() == {*FLAGS.split(), *OTHER_FLAGS.split()}
    assert {name: TABLE[name].default for name in DEFAULTS} == DEFAULTS


@pytest.mark.parametrize("name", TABLE)
def test_a_row_says_what_becomes_of_the_flag(name: str) -> None:
    row, ours = TABLE[name], settings_of(TrainConfig)
    assert row.text
    if row.kind == "mapped":
        assert row.settings
        assert set(row.settings) <= ours.keys()
    elif row.kind == "later":  # once it is there, the row must say so and translate it
        assert not set(row.settings) & ours.keys()
        assert "not there" in row.text
    else:
        assert not row.settings


def test_what_lines_are_translated_to_is_in_the_table(some_data: None) -> None:
    mapped = {setting for row in TABLE.values() if row.kind == "mapped" for setting in row.settings}
    assert {name for line, _ in VALUES for name in translate([*NEEDED, *shlex.split(line)]).values} == mapped


def test_the_page_is_what_the_table_makes() -> None:
    spec = importlib.util.spec_from_file_location("migration_page", ROOT / "tools" / "migration_page.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    page = (ROOT / "docs" / "migration.md").read_text(encoding="utf-8")
    assert page == module.page(), "run tools/migration_page.py"
    assert re.findall(r"^\| `--(\w+)` \|", page, re.MULTILINE) == list(TABLE)


def test_the_help_names_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help"]) == 0
    assert "The original's flags work too: docs/migration.md." in " ".join(capsys.readouterr().out.split())


# --- --split


@pytest.mark.parametrize(
    ("split", "chosen"),
    [
        ("train", range(10)), ("train[:3]", range(3)), ("train[7:]", range(7, 10)), ("train[2:4]", range(2, 4)),
        ("train[10%:90%]", range(1, 9)), ("train[:25%]", range(2)), ("train[-2:]", range(8, 10)),
        ("train[-30%:-1]", range(7, 9)), ("train[:]", range(10)), ("train[:1000]", range(10)), (" train ", range(10)),
        ("train[5:5]", range(0)), ("train[20:]", range(0)),
    ],
)  # fmt: skip
def test_split(split: str, chosen: range) -> None:
    assert list(range(10))[Split.parse(split).of(10)] == list(chosen)


@pytest.mark.parametrize(
    "split", ["", "train[", "train[3]", "train[1:2:3]", "train[a:]", "train[:1.5%]", "train[:3]+train[5:]"]
)
def test_a_split_of_another_form(split: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"--split {split}: no known form; write train, train[:1000]")):
        Split.parse(split)


def test_a_split_chooses_examples_and_says_how_many(tmp_path: Path) -> None:
    config = TrainConfig(
        Path("m"), [str(data(tmp_path))], Path("o"), fields=("query", "response"), split="train[50%:5]"
    )
    dataset = load_dataset(config, Tokenizer.byte())
    texts = [shown(dataset.piece(i)) for i in range(len(dataset.pieces))]
    assert texts == ["[User: 3?\n\nAssistant:] 3∅", "[User: 4?\n\nAssistant:] 4∅"]
    assert dataset.summary().startswith("2 of 6 examples (train[50%:5]), ")
    config.split = "train[6:]"
    with pytest.raises(DataError, match=r"--split train\[6:\]: none of the 6 examples"):
        load_dataset(config, Tokenizer.byte())
