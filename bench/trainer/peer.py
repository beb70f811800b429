"""The Python side of the trainer's benchmark: the same LoRA work as our trainer's, on PEFT, transformers and TRL.

    pip install torch transformers peft trl datasets
    python peer.py --model DIR --precision f32 --work sft --rows ROWS
    python peer.py --model DIR --precision f32 --work safegrad --rows ROWS --align ROWS
    python peer.py --model DIR --precision f32 --work epoch --rows CHATS

DIR: a Hugging Face folder of SmolLM2-Instruct, with `special_tokens.json` in place of `tokenizer_config.json`.
ROWS: JSON lines {"ids": [..], "supervised": [0 or 1, ..]}, which together are the one batch of every step.
CHATS: JSON lines {"messages": [..]}.

    sft       a step: task loss, backward, clip, AdamW, as one writes it on PEFT
    safegrad  a step: task gradient, gradient of the KL to the base on the alignment rows, surgery, clip, AdamW, on PEFT
    epoch     TRL's SFTTrainer once over CHATS: assistant turns only, TRL's defaults otherwise

One JSON line goes to stdout, the rest to stderr. `seconds` are the steps after the warmup, `losses` all of them; an epoch's
are the wall time of `train()` and the mean. `tokens_per_step` leaves out padding and counts the alignment rows. `--verify`:
only the first step's loss and its gradient's norm before clipping, which depends on LoRA's random `A`; the loss does not.
"""

import argparse
import contextlib
import json
import os
import resource
import sys
import tempfile
import time
from importlib.metadata import version
from itertools import product
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # the model is a folder: nothing is to be fetched

import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import kl_div
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

PACKAGES = ["torch", "transformers", "peft", "trl", "datasets", "accelerate"]
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
IGNORED = -100  # the label that transformers leaves out of the loss
LEARNING_RATE = 1e-4
RHO = 1.0

# SmolLM2's own template with the markers by which TRL knows the assistant's tokens.
CHAT_TEMPLATE = r"""
{%- for message in messages %}
    {%- if loop.first and message['role'] != 'system' %}
        {{- '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}
    {{- '<|im_start|>' + message['role'] + '\n' }}
    {%- if message['role'] != 'assistant' %}{{ message['content'] + '<|im_end|>' }}
    {%- else %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{% endif %}
    {{- '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}
"""


def arguments():
    parser = argparse.ArgumentParser(description="The trainer's benchmark on PEFT, transformers and TRL.")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--work", choices=["sft", "safegrad", "epoch"], required=True)
    parser.add_argument("--precision", choices=DTYPES, required=True)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--align", type=Path, help="the alignment rows of safegrad")
    parser.add_argument("--limit", type=int, help="how many rows of an epoch's file to take, instead of all")
    parser.add_argument("--steps", type=int, default=5, help="timed steps")
    parser.add_argument("--warmup", type=int, default=1, help="steps before them")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--verify", action="store_true", help="print the first step's loss and gradient norm, no times")
    args = parser.parse_args()
    if (args.work == "safegrad") != (args.align is not None):
        parser.error("--align goes with safegrad, and safegrad needs it")
    if args.work != "sft" and (args.gradient_checkpointing or args.verify):
        parser.error("--gradient-checkpointing and --verify go with sft")
    return args


def read_jsonl(path):
    return [json.loads(line) for line in path.open(encoding="utf-8")]


def read_batch(path):
    """All rows of the file as one right-padded batch, and how many tokens it has without the padding."""
    rows = read_jsonl(path)
    ids = [torch.tensor(row["ids"]) for row in rows]
    labels = [x.masked_fill(torch.tensor(row["supervised"]) == 0, IGNORED) for x, row in zip(ids, rows)]
    batch = {"input_ids": pad_sequence(ids, batch_first=True, padding_value=0)}
    batch["labels"] = pad_sequence(labels, batch_first=True, padding_value=IGNORED)
    mask = pad_sequence([torch.ones_like(x) for x in ids], batch_first=True)
    if not mask.all():
        batch["attention_mask"] = mask
    return batch, int(mask.sum())


def base_model(args):
    return AutoModelForCausalLM.from_pretrained(args.model, dtype=DTYPES[args.precision], attn_implementation="sdpa")


def lora_config():
    projections = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules=projections, task_type="CAUSAL_LM")


def lora_model(args):
    model = get_peft_model(base_model(args), lora_config())
    model.config.use_cache = False  # as transformers' own Trainer does: the cache is for generation
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    return model.train()


def safegrad_backward(model, parameters, loss, align):
    """Leaves in the parameters the gradient of `loss` without what works against the alignment, plus the alignment's."""
    user = torch.autograd.grad(loss, parameters)

    counts = align["labels"][:, 1:] != IGNORED  # a position counts where the token after it is supervised
    inputs = {name: tensor for name, tensor in align.items() if name != "labels"}

    def log_p():
        return model(**inputs).logits[:, :-1][counts].float().log_softmax(-1)

    with torch.no_grad(), model.disable_adapter():
        base = log_p()
    safe = torch.autograd.grad(kl_div(log_p(), base, reduction="batchmean", log_target=True), parameters)

    conflict = max(0.0, -dot(user, safe))
    coefficient = RHO + (conflict / dot(safe, safe) if conflict else 0.0)
    for parameter, u, a in zip(parameters, user, safe):
        parameter.grad = u + coefficient * a


def dot(left, right):
    return sum((x.double() * y.double()).sum() for x, y in zip(left, right)).item()


def run_steps(args):
    batch, tokens = read_batch(args.rows)
    align, align_tokens = read_batch(args.align) if args.align else (None, 0)
    model = lora_model(args)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0)
    losses, seconds = [], []
    for _ in range(args.warmup + args.steps):
        start = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        loss = model(**batch).loss
        if align:
            safegrad_backward(model, parameters, loss, align)
        else:
            loss.backward()
        norm = clip_grad_norm_(parameters, 1.0)
        if args.verify:
            return {"loss": loss.item(), "grad_norm": norm.item()}
        optimizer.step()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - start)
    return {"seconds": seconds[args.warmup :], "loss": losses[-1], "losses": losses, "tokens_per_step": tokens + align_tokens}


def chat_tokenizer(folder, chats):
    special = json.loads((folder / "special_tokens.json").read_text(encoding="utf-8"))
    tokens = {"bos_token": special["bos_token"], "eos_token": special["eos_token"], "pad_token": special["eos_token"]}
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **tokens)
    tokenizer.chat_template = CHAT_TEMPLATE
    original = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    without_system = [[message for message in chat if message["role"] != "system"] for chat in chats]
    for chat, prompt in product(chats + without_system, [False, True]):
        how = {"tokenize": False, "add_generation_prompt": prompt}
        if tokenizer.apply_chat_template(chat, **how) != tokenizer.apply_chat_template(chat, chat_template=original, **how):
            sys.exit("the model's chat template renders another text than this script's")
    return tokenizer


def run_epoch(args):
    from datasets import Dataset  # only here, so that the steps' memory is without TRL's
    from trl import SFTConfig, SFTTrainer

    chats = [row["messages"] for row in read_jsonl(args.rows)[: args.limit]]
    with tempfile.TemporaryDirectory() as output:
        trainer = SFTTrainer(
            model=base_model(args),
            args=SFTConfig(
                output, num_train_epochs=1, per_device_train_batch_size=10, learning_rate=LEARNING_RATE, max_length=1024,
                assistant_only_loss=True, bf16=args.precision == "bf16", use_cpu=True, seed=args.seed,
                save_strategy="no", logging_strategy="no", report_to="none", disable_tqdm=True,
            ),
            train_dataset=Dataset.from_dict({"messages": chats}),
            processing_class=chat_tokenizer(args.model, chats),
            peft_config=lora_config(),
        )  # fmt: skip
        start = time.perf_counter()
        loss = trainer.train().training_loss
        seconds = time.perf_counter() - start
    tokens = sum(len(ids) for ids in trainer.train_dataset["input_ids"]) / trainer.state.global_step
    settings = {name: getattr(trainer.args, name) for name in ["gradient_checkpointing", "bf16", "padding_free"]}
    return {"seconds": [seconds], "loss": loss, "losses": [loss], "tokens_per_step": tokens, "settings": settings}


def main():
    args = arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    with contextlib.redirect_stdout(sys.stderr):  # TRL prints its summary
        result = run_epoch(args) if args.work == "epoch" else run_steps(args)
    if not args.verify:
        result["peak_rss_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        result["versions"] = {name: version(name) for name in PACKAGES}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
