"""A draft model for the embedded one, for speculative decoding: `python draft.py BACKBONE TEXT.jsonl OUT --layers 1`.

The backbone's first layers with its own final norm and LM head, trained to imitate the whole backbone: KL divergence to the
backbone's distribution on rows of `{"input_ids": [...]}` (Medusa's competitor deserves a good draft model).
"""

import argparse
import json
import math
from pathlib import Path

import torch
from rich.progress import track
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("backbone")
    parser.add_argument("text", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--length", type=int, default=320)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    args = parser.parse_args()

    teacher = AutoModelForCausalLM.from_pretrained(args.backbone, dtype=torch.bfloat16).eval()
    config = AutoModelForCausalLM.from_pretrained(args.backbone).config
    config.num_hidden_layers = args.layers
    config.layer_types = config.layer_types[: args.layers] if getattr(config, "layer_types", None) else None
    draft = AutoModelForCausalLM.from_pretrained(args.backbone, config=config, dtype=torch.float32).train()
    rows = [json.loads(line)["input_ids"] for line in args.text.read_text(encoding="utf-8").splitlines()]
    rows = [row[: args.length] for row in rows if len(row) >= args.length]
    generator = torch.Generator().manual_seed(0)
    order = torch.cat(
        [torch.randperm(len(rows), generator=generator) for _ in range(-(-args.steps * args.batch_size // len(rows)))]
    )
    optimizer = torch.optim.AdamW(draft.parameters(), lr=args.learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    warmup = max(1, args.steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / args.steps))
    )
    for step in track(range(args.steps), "training"):
        chosen = order[step * args.batch_size : (step + 1) * args.batch_size].tolist()
        ids = torch.tensor([rows[n] for n in chosen])
        with torch.no_grad():
            target = teacher(ids, use_cache=False).logits.float().softmax(-1)
        with torch.autocast("cpu", torch.bfloat16):
            predicted = draft(ids, use_cache=False).logits.float().log_softmax(-1)
        loss = -(target * predicted).sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(draft.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            agreed = (target.argmax(-1) == predicted.argmax(-1)).float().mean().item()
            print(f"step {step + 1}: cross-entropy {loss.item():.3f}, top-1 agreement {agreed:.3f}", flush=True)
    draft.to(torch.bfloat16).save_pretrained(args.out)
    AutoTokenizer.from_pretrained(args.backbone).save_pretrained(args.out)


if __name__ == "__main__":
    main()
