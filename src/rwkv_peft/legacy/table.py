"""Each flag of the original program (RWKV-PEFT) and what it means here; `docs/migration.md` is made from it.

What the original did was read in its code, github.com/JL-er/RWKV-PEFT and its successor Joluck/RWKV-PEFT: `train.py`,
`rwkvt/peft/peft_loading.py` (what trains), `rwkvt/dataset/` (data), `rwkvt/lightning_train/` and `rwkvt/trick/lrs.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["mapped", "checked", "explained", "later"]


@dataclass(frozen=True)
class Row:
    """A flag of the original."""

    kind: Kind
    """mapped to settings; checked against the model file; explained: no effect; later: will be a setting."""
    settings: tuple[str, ...]
    """Today's settings, or for `later` those to come."""
    default: str
    form: type
    """int, float or str; list: several words; dict: JSON; bool: a flag without a value."""
    text: str
    """For the page. Where the flag is explained or to come, also what is printed behind it and its value."""
    harmless: tuple[str, ...] = ()
    """Of a flag to come: values that ask for nothing."""
    refused: bool = False
    """Of a flag to come: any other value is an error, and not just noted."""


def to(settings: str, default: str, form: type, text: str) -> Row:
    return Row("mapped", tuple(settings.split()), default, form, text)


def claim(default: str, form: type, text: str) -> Row:
    return Row("checked", (), default, form, text)


def idle(default: str, form: type, text: str) -> Row:
    return Row("explained", (), default, form, text)


def later(settings: str, default: str, form: type, text: str, *harmless: str, refused: bool = False) -> Row:
    return Row("later", tuple(settings.split()), default, form, text, harmless, refused)


NO_OFFICIAL = "0, since no official model has it."
MADE_OF = "the model file says what it is made of"
STAGES = "for pre-training in stages, which is not there"
BEST_OP = (
    "the fastest operator that runs here is taken; `rwkv-peft doctor` shows it, and --op of today's line names one"
)
LOADER = "the process that trains makes its batches itself"
LISA = "LISA is not there; --peft lora and disha need less memory"

SECTIONS: dict[str, dict[str, Row]] = {
    "Model and run": {
        "load_model": to("model", "", str, "The base model. Training a new one from nothing is not there yet."),
        "proj_dir": to("out", "out", str, "The run's folder, new or empty. The adapter is `OUT/adapter`."),
        "my_testing": claim("x052", str, "RWKV-5 is `x052`, 6 `x060`, 7 `x070`. Left out, the file decides."),
        "n_layer": claim("6", int, "Number of layers; 0 asks for nothing."),
        "n_embd": claim("512", int, "Width; 0 asks for nothing."),
        "vocab_size": claim("0", int, "Size of the vocabulary; 0 asks for nothing."),
        "dim_att": claim("0", int, "The width again; 0 asks for nothing."),
        "dim_ffn": claim("0", int, "Rows of `ffn.key`; 0 asks for nothing."),
        "head_size_a": claim("64", int, "Size of a head; 0 asks for nothing."),
        "head_size_divisor": claim("8", int, "8 in every official model; 0 asks for nothing."),
        "load_partial": idle("0", int, "a model file must be whole"),
        "pre_ffn": claim("0", int, NO_OFFICIAL),
        "head_qk": claim("0", int, NO_OFFICIAL),
        "tiny_att_dim": claim("0", int, NO_OFFICIAL),
        "tiny_att_layer": idle("-999", int, MADE_OF),
        "my_ffn_shift": idle("1", int, MADE_OF),
        "my_att_shift": idle("1", int, MADE_OF),
        "my_pos_emb": claim("0", int, NO_OFFICIAL),
        "random_seed": to("seed", "-1", int, "-1, which meant another seed each time, is 0."),
    },
    "Method": {
        "peft": to(
            "peft", "none", str,
            "`none` is `full`, or `state` with `--train_type state`. `disha` and `miss` are `bone`, or `bat` where "
            "their config says so. With `--peft_config`, any method of Hugging Face PEFT is `peft:METHOD`.",
        ),
        "train_type": to(
            "peft train_parts lr_state", "none", str,
            "`state` is `--peft state`; with another method, the part `state` beside it. `none` and `finetune` change "
            "nothing. `infctx` (infinite context) is not there yet.",
        ),
        "train_parts": to(
            "train_parts", '["time", "ln"]', list,
            "`time ln`, `[\"time\", \"ln\"]` and `[time, ln]` mean the same, `[]` is `none`. No effect without an "
            "adapter. The original looked for the word `time` in names, and RWKV-7 has none with it; here "
            "`time` is what it is in RWKV-5 and 6: mixes, decays and the like; a line says so.",
        ),
        "lora_config": to(
            "rank alpha dropout adapter", '{"lora_load":"", "lora_r":8, "lora_alpha":32, "lora_dropout":0.01}', dict,
            "A key that is left out has its value on the left. `lora_load` is `--adapter`. `lora_parts` has no effect, "
            "as in the original.",
        ),
        "pissa_config": to(
            "rank svd_iterations adapter pissa_init",
            '{"pissa_load":"", "pissa_init":"", "pissa_r":8, "svd_niter":4}', dict,
            "As `--lora_config`. There is no alpha: the scale is 1.",
        ),
        "disha_config": to(
            "peft rank adapter", '{"mode":"mode", "load":"", "r":64}', dict,
            "`mode` is `bone` or `bat`. The default, `mode`, made no adapter at all; here it is `bone`.",
        ),
        "bone_config": to(
            "peft rank adapter", '{"bone_load":"", "bone_r":64}', dict,
            "The earlier name of `--disha_config`. Before it had a `bone_mode`, Bone was what is called `bat` now.",
        ),
        "miss_config": to(
            "peft rank adapter", '{"mode":"mode", "load":"", "r":64}', dict, "The later name of `--disha_config`."
        ),
        "peft_config": to(
            "rank alpha dropout rank_stabilised dora targets train_parts peft_config", "{}", dict,
            "Settings of Hugging Face PEFT, with its defaults (LoRA: r 8, alpha 8). As there, nothing trains beside "
            "the adapter unless `--train_parts` is given.",
        ),
        "quant": to(
            "quant", "none", str,
            "`int8` (in blocks of 256 here), `nf4`, `fp4`; `4bit` was fp4.",
        ),
        "chunk_ctx": later("chunk_len", "512", int, "for infinite context, which is not there yet"),
        "dropout": idle("0", float, "the original's RWKV-6 and 7 had none either; LoRA's is in --lora_config"),
    },
    "Data": {
        "data_file": to(
            "data", "", str,
            "What `--data_type` says: a JSONL file, the prefix PREFIX of PREFIX.bin and PREFIX.idx, or a text file; a "
            "folder of such; with `sft` and `jsonl` also the name of a dataset on the Hugging Face hub.",
        ),
        "data_type": to(
            "data template sampling windows", "utf-8", str,
            "`sft` with `--sft_field` is `--template instruction`, the original's own form `### Instruction: … "
            "### Response:`, ended by U+0017; without, where the original broke off, lines of messages take RWKV's "
            "form, `User: … Assistant: …`, ended by token 0. `jsonl` is read as `docs/data.md` says. Both have a row "
            "an example, `--sampling pad`. `binidx` fills rows as `--dataload` says. `utf-8` is text, of which a row "
            "is any window, `--sampling get --windows random`; the model's tokenizer reads it, where the original made "
            "a vocabulary of its letters, for a model that began anew. Other encodings, numpy, uint16 and dummy are "
            "errors. JSON, CSV and Parquet files are read as such whatever type is given.",
        ),
        "sft_field": to(
            "fields template", "None", list, "The two fields that are prompt and answer; see `--data_type`."
        ),
        "sft_split": to("split", "train", str, "In the same form: `train`, `train[:1000]`, `train[10%:90%]`."),
        "ctx_len": to(
            "ctx_len overlong", "1024", int,
            "Longer examples are cut, as in the original, and counted; where rows are windows, nothing is too long.",
        ),
        "dataload": to(
            "sampling windows overlong", "pad", str,
            "Of binidx: `pad` is an example a row (there, what followed it in the file filled the row up, here "
            "nothing does), `only` one a step, for which `--micro_bsz` must be 1, and `get` any window of all tokens, "
            "`--windows random`; it never ended, here `--epoch_count` ends the run. No effect otherwise, as in the "
            "original.",
        ),
        "loss_mask": to(
            "mask", "none", str,
            "`none` is `auto`: the answers, where the data tells them apart, else everything. `pad` is everything. "
            "`qa` and `se` are those of `docs/data.md`. Padding never counts. No effect with `sft`, as in the "
            "original: the answers train. For `jsonl` the original had no choice; here it holds.",
        ),
        "mask_id": to(
            "mask_id", '{"mask0":"0", "mask1":"1"}', dict,
            "For `--loss_mask se`: from the text `mask1` on, itself included, tokens are trained on, up to the next "
            "`mask0`. A key that is left out has its value on the left. `qa` has `User:` and `Assistant:`.",
        ),
        "data_shuffle": idle("1", int, "rows come in a random order, a new one each epoch, which --random_seed fixes"),
        "my_sample_len": idle("0", int, "the length of the samples of uint16 data, which are not read here"),
        "my_qa_mask": idle("0", int, "it mixed in a file of the authors' machine; see --loss_mask"),
        "my_pile_version": later(
            "", "1", int,
            "a list of binidx files in a file is not there; today's line takes all prefixes behind --data", "1",
            refused=True,
        ),
        "my_pile_stage": later(
            "", "0", int,
            "pre-training in stages is not there; RWKV-LM's order of windows is --sampling get --windows prime on "
            "today's line",
            "0", refused=True,
        ),
        "my_pile_shift": idle("-1", int, STAGES),
        "my_pile_edecay": idle("0", int, STAGES),
        "magic_prime": idle("0", int, "computed from the data, where --windows prime on today's line asks for it"),
        "my_random_steps": idle("0", int, STAGES),
    },
    "Steps and learning rate": {
        "micro_bsz": to("micro_batch", "12", int, "Rows computed at once."),
        "accumulate_grad_batches": to(
            "grad_accum max_steps", "1", int, "Micro-batches a step; the last step of an epoch may have fewer."
        ),
        "epoch_steps": to(
            "max_steps", "1000", int,
            "Micro-batches in an epoch. `--max-steps` is what the original would have done: epoch_count × "
            "⌈epoch_steps / accumulate_grad_batches⌉. It took only the first epoch_steps × micro_bsz examples "
            "(its successor: epoch_steps examples), and broke off if there were fewer; here all are used.",
        ),
        "epoch_count": to("max_steps", "500", int, "See `--epoch_steps`."),
        "epoch_begin": idle("0", int, "the learning rate starts at its beginning; an adapter goes on by its `…_load`"),
        "my_exit": to("max_steps", "99999999", int, "The last epoch, counted from `--epoch_begin`."),
        "my_exit_tokens": idle("0", int, "it had no effect in the original either"),
        "lr_init": to("lr", "6e-4", float, "Learning rate at the beginning, or after the warm-up."),
        "lr_final": to("lr_final", "1e-5", float, "The same as `--lr_init` makes the rate constant."),
        "lr_schedule": to(
            "schedule lr_final warmup_steps", "cos", str,
            "`cos` is `--schedule cosine`. `wsd` was a warm-up (of 100 steps, if `--warmup_steps` is not above 0) and "
            "a cosine to 0, whatever `--lr_final` says; here too. `--schedule wsd` is another thing.",
        ),
        "warmup_steps": to("warmup_steps", "-1", int, "Below 1 there is no warm-up, but with `--lr_schedule wsd`."),
        "layerwise_lr": to(
            "layerwise_lr", "1", int,
            "Twice the rate for RWKV-5's and 6's `time_decay`. For RWKV-7 (`--my_testing x070`) it had no effect.",
        ),
        "beta1": to("betas", "0.9", float, "The optimiser's first averaging factor."),
        "beta2": to("betas", "0.99", float, "Its second."),
        "adam_eps": to("adam_eps", "1e-8", float, "Its epsilon."),
        "weight_decay": to("weight_decay", "0", float, "On matrices only, as in the original."),
        "weight_decay_final": to("weight_decay_final", "-1", float, "Not above 0: no change."),
        "optim": to(
            "optim", "none", str,
            "`none` is `adamw`, and so is `adam_mini`: `docs/optimisers.md` says why, and what saves memory.",
        ),
        "avg_loss": idle("0", int, "a running sum of the original's own"),
    },
    "Machine": {
        "accelerator": to("device", "gpu", str, "`gpu` is `auto`; without a GPU the run says so and goes on."),
        "precision": to(
            "precision", "fp16", str,
            "`bf16` and `fp32`; `tf32` is `fp32`. `fp16` is not there yet, so left out it is `auto`.",
        ),
        "grad_cp": to("grad_checkpoint", "0", int, "1 switches gradient checkpointing on."),
        "devices": later("devices", "1", str, "several devices are not there yet; use one", "1", refused=True),
        "num_nodes": later("nodes", "1", str, "several nodes are not there yet; use one", "1", refused=True),
        "strategy": later(
            "strategy", "auto", str, "one device needs none; sharding over several is not there yet", "auto", ""
        ),
        "ds_bucket_mb": idle("200", int, "for DeepSpeed, which one device does not need"),
        "op": idle("cuda", str, BEST_OP),
        "fla": idle("", bool, BEST_OP),
        "fused_kernel": idle("", bool, "fused kernels run wherever they can, and logits are never made all at once"),
        "num_workers": idle("8", int, LOADER),
        "persistent_workers": idle("", bool, LOADER),
        "prefetch_factor": idle("None", str, LOADER),
    },
    "Saving and watching": {
        "epoch_save": later(
            "save_every", "5", int,
            "saving on the way is not there yet; the result is saved at the end, and when Ctrl-C ends the run", "0",
        ),
        "merge": idle("1", int, "`rwkv-peft merge BASE ADAPTER OUT` makes the merged model"),
        "wandb": later("wandb", "", str, "not there yet; metrics.jsonl and loss.png in the run's folder have it", ""),
    },
    "Flags of its first versions": {
        "lora": to("peft", "", bool, "`--peft lora`."),
        "PISSA": to("peft", "", bool, "`--peft pissa`."),
        "state_tune": to("peft", "", bool, "`--train_type state`."),
        "lora_r": to("rank", "8", int, "As in `--lora_config`, over which it prevails; for PiSSA too."),
        "lora_alpha": to("alpha", "32", float, "As in `--lora_config`."),
        "lora_dropout": to("dropout", "0.01", float, "As in `--lora_config`."),
        "lora_load": to("adapter", "", str, "As in `--lora_config`."),
        "lora_parts": to(
            "targets train_parts", "att,ln,time", str,
            "`att` and `ffn`: whose matrices are adapted; `time`, `ln`: parts trained beside them.",
        ),
        "emb": to("train_parts", "", bool, "`--train_parts emb head`, beside the others."),
        "svd_niter": to("svd_iterations", "4", int, "As in `--pissa_config`."),
        "pissa_load": to("adapter", "", str, "As in `--pissa_config`."),
        "pissa_init": to("pissa_init", "", str, "As in `--pissa_config`."),
        "LISA": later("", "", bool, LISA, refused=True),
        "lisa_r": later("", "2", int, LISA, refused=True),
        "lisa_k": later("", "100", int, LISA, refused=True),
        "compile": idle("", bool, "nothing is compiled"),
        "l2warp_sparse": idle("0", int, "the logit penalty is --logit-penalty"),
    },
}  # fmt: skip
TABLE = {name: row for rows in SECTIONS.values() for name, row in rows.items()}
COMING = {setting for row in TABLE.values() if row.kind == "later" for setting in row.settings}
