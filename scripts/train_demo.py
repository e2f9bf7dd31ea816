"""Train the bundled models: a tokenizer, `demo`, and `demo-draft` distilled from it.

    python scripts/train_demo.py --data TALES --out OUT

Writes, the way CoreNet saves them, OUT/demo.pt and OUT/demo-draft.pt (state dicts), beside each a
`*.config.json` in Hugging Face's form, OUT/demo.model (SentencePiece) and OUT/training.json.
A step `tokenizer`, `demo`, `unlearn` or `draft` alone is run by naming it. Needs PyTorch.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import sentencepiece
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlx_openelm.config import OpenELMConfig

CONTEXT = 1024
DEMO = OpenELMConfig.scaled(
    vocab_size=4096,
    model_dim=192,
    head_dim=64,
    num_transformer_layers=8,
    num_gqa_groups=2,
    ffn_dim_divisor=64,
    max_context_length=CONTEXT,
    rope_max_length=2 * CONTEXT,
)
DRAFT = OpenELMConfig.scaled(
    vocab_size=4096,
    model_dim=128,
    head_dim=64,
    num_transformer_layers=2,
    num_gqa_groups=2,
    ffn_multipliers=(1.0, 3.0),
    ffn_dim_divisor=64,
    max_context_length=CONTEXT,
    rope_max_length=2 * CONTEXT,
)
BLOCK = 20  # paragraphs; every HELD_OUT-th block is kept from training
HELD_OUT = 20
MUON_LR, ADAM_LR, WEIGHT_DECAY, DROPOUT = 0.02, 3e-3, 0.05, 0.1
WARMUP, DECAY = 0.02, 0.4  # shares of the time
REPEATED = 4  # tokens of a run that counts as repeated
UNLIKELIHOOD, UNLIKELIHOOD_LR = 2.0, 3e-4
OWN_WORDS = 0.15  # the share of the draft's time in which `demo` writes what it learns from


# ---------------------------------------------------------------------------------------------
# Text


def is_heading(paragraph: str) -> bool:
    return paragraph.upper() == paragraph


def blocks(data: Path) -> Iterator[list[list[str]]]:
    """Runs of some BLOCK paragraphs, each a list of (parts of) tales, each a list of paragraphs."""
    for book in sorted(data.glob("*.txt")):
        paragraphs = [p.strip() for p in book.read_text(encoding="utf-8").split("\n\n")]
        paragraphs = [p for p in paragraphs if p]
        for start in range(0, len(paragraphs), BLOCK):
            tales: list[list[str]] = [[]]
            for paragraph in paragraphs[start : start + BLOCK]:
                if is_heading(paragraph):
                    tales.append([])
                else:
                    tales[-1].append(paragraph)
            yield [tale for tale in tales if tale]


def split(data: Path) -> tuple[list[list[str]], list[list[str]]]:
    """(training, held-out) tales: every HELD_OUT-th block is held out."""
    training: list[list[str]] = []
    held_out: list[list[str]] = []
    for i, tales in enumerate(blocks(data)):
        if i % HELD_OUT == HELD_OUT // 2:
            held_out += tales
        else:
            training += tales
    return training, held_out


def train_tokenizer(tales: list[list[str]], out: Path) -> None:
    """LLaMA's flags, 4,096 pieces."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(p for tale in tales for p in tale),
        model_prefix=str(out / "demo"),
        vocab_size=DEMO.vocab_size,
        model_type="bpe",
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        byte_fallback=True,
        character_coverage=0.9999,
        max_sentence_length=100_000,
        pad_id=-1,
    )
    (out / "demo.vocab").unlink()


class Text:
    """Tales in one row of token ids, each as `<s> … </s>`, its paragraphs on lines of their own."""

    def __init__(self, tales: list[list[str]], tokenizer: sentencepiece.SentencePieceProcessor):
        ids: list[int] = []
        self.paragraphs: list[tuple[list[int], int]] = []  # as a text begins with it; its end
        before = tokenizer.encode("x")
        for tale in tales:
            ids.append(tokenizer.bos_id())
            for i, paragraph in enumerate(tale):
                first = tokenizer.encode(paragraph)
                ids += first if i == 0 else tokenizer.encode("x\n" + paragraph)[len(before) :]
                self.paragraphs.append((first, len(ids)))
            ids.append(tokenizer.eos_id())
        self.ids = np.array(ids)

    def windows(self, rng: np.random.Generator, batch: int, length: int) -> Tensor:
        """[batch, length + 1] ids: `<s>`, then text from the start of random paragraphs."""
        rows = []
        while len(rows) < batch:
            first, end = self.paragraphs[rng.integers(len(self.paragraphs))]
            row = np.concatenate([[1], first, self.ids[end : end + length]])[: length + 1]
            if len(row) == length + 1:
                rows.append(row)
        return torch.from_numpy(np.stack(rows))

    def all_windows(self, length: int) -> Iterator[Tensor]:
        for start in range(0, len(self.ids) - length - 1, length):
            row = self.ids[start : start + length + 1].copy()
            row[0] = 1
            yield torch.from_numpy(row)[None]


# ---------------------------------------------------------------------------------------------
# The network, with CoreNet's tensor names


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class Past:
    """Keys and values of what a network has seen, for generating token by token."""

    def __init__(self) -> None:
        self.seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def add(self, attention: nn.Module, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if attention in self.seen:
            before = self.seen[attention]
            k, v = torch.cat([before[0], k], 2), torch.cat([before[1], v], 2)
        self.seen[attention] = k, v
        return k, v


class Attention(nn.Module):
    def __init__(self, c: OpenELMConfig, heads: int, kv_heads: int):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, c.head_dim
        rows = (heads + 2 * kv_heads) * c.head_dim
        self.qkv_proj = nn.Linear(c.model_dim, rows, bias=False)
        self.q_norm = RMSNorm(c.head_dim, c.rms_norm_eps)
        self.k_norm = RMSNorm(c.head_dim, c.rms_norm_eps)
        self.out_proj = nn.Linear(heads * c.head_dim, c.model_dim, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, past: Past | None) -> Tensor:
        B, L, _ = x.shape
        qkv = self.qkv_proj(x).view(B, L, -1, self.head_dim).transpose(1, 2)
        q, k, v = qkv.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        q, k = rotate(self.q_norm(q), cos, sin), rotate(self.k_norm(k), cos, sin)
        if past is not None:
            k, v = past.add(self, k, v)
        repeats = self.heads // self.kv_heads
        k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=L > 1)
        out: Tensor = self.out_proj(y.transpose(1, 2).reshape(B, L, -1))
        return out


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


class FeedForward(nn.Module):
    def __init__(self, dim: int, width: int):
        super().__init__()
        self.proj_1 = nn.Linear(dim, 2 * width, bias=False)
        self.proj_2 = nn.Linear(width, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.proj_1(x).chunk(2, -1)
        out: Tensor = self.proj_2(F.silu(gate) * up)
        return out


class Layer(nn.Module):
    def __init__(self, c: OpenELMConfig, i: int):
        super().__init__()
        self.attn = Attention(c, c.num_query_heads[i], c.num_kv_heads[i])
        self.ffn = FeedForward(c.model_dim, c.ffn_dims[i])
        self.attn_norm = RMSNorm(c.model_dim, c.rms_norm_eps)
        self.ffn_norm = RMSNorm(c.model_dim, c.rms_norm_eps)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, dropout: float, past: Past | None
    ) -> Tensor:
        x = x + F.dropout(self.attn(self.attn_norm(x), cos, sin, past), dropout, self.training)
        return x + F.dropout(self.ffn(self.ffn_norm(x)), dropout, self.training)


class Network(nn.Module):
    def __init__(self, c: OpenELMConfig, dropout: float = 0.0):
        super().__init__()
        self.dropout = dropout
        self.token_embeddings = nn.Embedding(c.vocab_size, c.model_dim)
        self.layers = nn.ModuleList(Layer(c, i) for i in range(c.num_transformer_layers))
        self.norm = RMSNorm(c.model_dim, c.rms_norm_eps)
        pairs = torch.arange(c.head_dim // 2) * 2 / c.head_dim
        angles = torch.outer(torch.arange(CONTEXT), c.rope_freq_constant**-pairs).repeat(1, 2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                nn.init.normal_(weight, std=0.02)
            if name.endswith(("out_proj.weight", "proj_2.weight")):
                nn.init.zeros_(weight)

    def forward(self, ids: Tensor, past: Past | None = None, start: int = 0) -> Tensor:
        end = start + ids.shape[1]
        cos, sin = self.cos[start:end], self.sin[start:end]  # type: ignore[index]
        x = F.dropout(self.token_embeddings(ids), self.dropout, self.training)
        for layer in self.layers:
            x = layer(x, cos, sin, self.dropout, past)
        return F.linear(self.norm(x), self.token_embeddings.weight)


# ---------------------------------------------------------------------------------------------
# Training


def loss_on(network: nn.Module, text: Text, length: int) -> float:
    """Mean cross entropy in nats per token, over the whole text."""
    network.eval()
    total = count = 0.0
    with torch.no_grad():
        for window in text.all_windows(length):
            logits = network(window[:, :-1])
            total += F.cross_entropy(logits[0], window[0, 1:], reduction="sum").item()
            count += window.shape[1] - 1
    network.train()
    return total / count


def learning_rate(progress: float) -> float:
    """Warm-up, constant, then linear to zero; `progress` from 0 to 1."""
    return min(progress / WARMUP, 1.0, (1.0 - progress) / DECAY)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised: K. Jordan et al., 2024, with their Newton-Schulz coefficients.

    PyTorch's own iterates in bfloat16, which a CPU without such instructions does at a crawl.
    """

    def __init__(self, params: list[nn.Parameter], lr: float, momentum: float, weight_decay: float):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                momentum.lerp_(p.grad, 1 - group["momentum"])
                update = orthogonal(p.grad.lerp(momentum, group["momentum"]))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"] * max(1, p.shape[0] / p.shape[1]) ** 0.5)


def orthogonal(g: Tensor) -> Tensor:
    x = g.T if g.shape[0] > g.shape[1] else g
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if g.shape[0] > g.shape[1] else x


def train(
    network: Network,
    training: Text | OwnWords,
    held_out: Text,
    minutes: float,
    batch_tokens: int,
    objective: Callable[[Tensor, Tensor], Tensor],
    out: Path,
    judge: Callable[[], float] | None = None,
) -> dict[str, float]:
    """Train for `minutes`, keep the best weights, save them to `out`.

    The best are those with the least `judge()`, or else with the lowest held-out loss.
    """
    matrices = [p for p in network.layers.parameters() if p.dim() == 2]
    rest = [p for p in network.parameters() if all(p is not m for m in matrices)]
    optimizers: list[torch.optim.Optimizer] = [
        Muon(matrices, lr=MUON_LR, momentum=0.95, weight_decay=WEIGHT_DECAY),
        torch.optim.AdamW(rest, lr=ADAM_LR, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    base = [o.param_groups[0]["lr"] for o in optimizers]
    rng = np.random.default_rng(0)
    best: dict[str, float] = {}
    least = math.inf
    step, seen, worse, start, next_look = 0, 0, 0, time.monotonic(), 0.05
    while (progress := (time.monotonic() - start) / (60 * minutes)) < 1 and worse < 5:
        for optimizer, lr in zip(optimizers, base, strict=True):
            optimizer.param_groups[0]["lr"] = lr * learning_rate(progress)
        length = CONTEXT if progress > 0.85 else 512
        window = training.windows(rng, batch_tokens // length, length)
        loss = objective(window[:, :-1], window[:, 1:])
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step, seen = step + 1, seen + window.numel()
        if step % 50 == 0:
            print(f"{progress:6.1%} step {step} loss {loss.item():.4f}", flush=True)
        if progress > next_look or (time.monotonic() - start) / (60 * minutes) >= 1:
            next_look = progress + 0.05
            validation = loss_on(network, held_out, 512)
            print(f"{progress:6.1%} {seen:,} tokens, validation loss {validation:.4f}", flush=True)
            judged = judge() if judge else validation
            worse = 0 if judged < least else worse + 1
            if worse == 0:
                least = judged
                best = {"validation_loss": validation, "tokens_seen": seen, "steps": step}
                state = {k: v.detach().clone() for k, v in network.state_dict().items()}
                torch.save(state, out)
    best["minutes"] = (time.monotonic() - start) / 60
    best["validation_perplexity"] = math.exp(best["validation_loss"])
    best["parameters"] = sum(p.numel() for p in network.parameters())
    return best


def train_demo(
    training: Text, held_out: Text, minutes: float, out: Path, resume: bool
) -> dict[str, float]:
    network = Network(DEMO, dropout=DROPOUT)
    if resume:
        network.load_state_dict(torch.load(out / "demo.pt", weights_only=True))
    run = torch.compile(network, dynamic=False)

    def objective(ids: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(run(ids).flatten(0, 1), targets.flatten())

    return train(network, training, held_out, minutes, 4096, objective, out / "demo.pt")


@torch.no_grad()
def go_on(network: Network, ids: Tensor, count: int, temperature: float = 0) -> Tensor:
    """`ids` [B, L] with `count` more tokens each: drawn, or at temperature 0 the likeliest."""
    past, start, new = Past(), 0, ids
    for _ in range(count):
        logits = network(new, past, start)[:, -1]
        start += new.shape[1]
        if temperature:
            new = torch.multinomial((logits / temperature).softmax(-1), 1)
        else:
            new = logits.argmax(-1, keepdim=True)
        ids = torch.cat([ids, new], 1)
    return ids


def repeats(ids: Tensor, first: int) -> Tensor:
    """[B, L] bool: which tokens from `first` on end a run of REPEATED that was there before."""
    found = torch.zeros_like(ids, dtype=torch.bool)
    for row, flags in zip(ids.tolist(), found, strict=True):
        seen = set()
        for end in range(first + REPEATED, len(row) + 1):
            run = tuple(row[end - REPEATED : end])
            flags[end - 1] = run in seen
            seen.add(run)
    return found


def prompts(text: Text, rng: np.random.Generator, batch: int) -> Tensor:
    """[batch, length] ids of the beginnings of random paragraphs, of a random length."""
    return text.windows(rng, batch, int(rng.integers(4, 32)))[:, :-1]


def repetition(network: Network, text: Text) -> float:
    """Share of greedily generated tokens that end a repeated run, over prompts from `text`."""
    network.eval()
    rng = np.random.default_rng(1)
    ids = [prompts(text, rng, 16) for _ in range(4)]
    found = [repeats(go_on(network, i, 100), i.shape[1])[:, -100:] for i in ids]
    network.train()
    return torch.cat(found).float().mean().item()


def unlearn_repeating(
    training: Text, held_out: Text, minutes: float, out: Path
) -> dict[str, float]:
    """Sequence-level unlikelihood training of `demo` (S. Welleck et al., arXiv 1908.04319, 5.2).

    Small models run in circles when they always take the likeliest token. Here the model goes on
    from prompts greedily, and the tokens that end a repeated run of four are made less likely;
    ordinary training goes on with every step.
    """
    network = Network(DEMO, dropout=DROPOUT)
    network.load_state_dict(torch.load(out / "demo.pt", weights_only=True))
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=UNLIKELIHOOD_LR, betas=(0.9, 0.95), weight_decay=0.0
    )
    rng = np.random.default_rng(2)
    record = {"repetition_before": repetition(network, held_out)}
    start = time.monotonic()
    step = 0
    while (progress := (time.monotonic() - start) / (60 * minutes)) < 1:
        optimizer.param_groups[0]["lr"] = UNLIKELIHOOD_LR * min(1, 4 * (1 - progress))
        window = training.windows(rng, 8, 256)
        likely = F.cross_entropy(network(window[:, :-1]).flatten(0, 1), window[:, 1:].flatten())
        prompt = prompts(training, rng, 16)
        network.eval()
        ids = go_on(network, prompt, 100)
        network.train()
        repeated = repeats(ids, prompt.shape[1])[:, 1:]
        p = network(ids[:, :-1]).softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        unlikely = -(1 - p[repeated]).clamp_min(1e-4).log().sum() / repeated.numel()
        (likely + UNLIKELIHOOD * unlikely).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if step % 10 == 0:
            share = repeated.float().mean().item()
            print(
                f"{progress:6.1%} step {step} {likely.item():.3f} repeated {share:.1%}", flush=True
            )
    torch.save(network.state_dict(), out / "demo.pt")
    loss = loss_on(network, held_out, 512)
    return record | {
        "repetition_after": repetition(network, held_out),
        "validation_loss": loss,
        "validation_perplexity": math.exp(loss),
        "steps": step,
        "minutes": minutes,
    }


class OwnWords:
    """Windows that are by turns of `text` and of what `network` made of its beginnings.

    A draft is asked about the network's words, not about a book's (Y. Zhou et al., DistillSpec,
    arXiv 2310.08461). Half of them are the likeliest ones, half are drawn. They are written in
    the given time, and then used again and again.
    """

    LENGTH = 256

    def __init__(self, text: Text, network: Network, minutes: float):
        self.text, self.turn = text, 0
        rng, end, made = np.random.default_rng(3), time.monotonic() + 60 * minutes, []
        while time.monotonic() < end or len(made) < 2:
            begun = prompts(text, rng, 64)[:, :96]
            temperature = len(made) % 2 * 0.8
            made.append(go_on(network, begun, self.LENGTH + 1 - begun.shape[1], temperature))
        self.made = torch.cat(made)
        print(f"{self.made.numel():,} tokens of the network's own", flush=True)

    def windows(self, rng: np.random.Generator, batch: int, length: int) -> Tensor:
        self.turn += 1
        if self.turn % 2:
            return self.text.windows(rng, batch, length)
        return self.made[rng.integers(len(self.made), size=batch * length // self.LENGTH)]


class Agreement:
    """Share of the tokens that `network` generates greedily that a draft finds likeliest, too."""

    def __init__(self, network: Network, text: Text):
        rng = np.random.default_rng(4)
        begun = [prompts(text, rng, 32) for _ in range(4)]
        self.texts = [(b.shape[1], go_on(network, b, 128)) for b in begun]

    @torch.no_grad()
    def __call__(self, draft: Network) -> float:
        draft.eval()
        found = [
            (draft(ids[:, :-1]).argmax(-1) == ids[:, 1:])[:, first - 1 :].float().mean().item()
            for first, ids in self.texts
        ]
        draft.train()
        print(f"agreement {sum(found) / len(found):.1%}", flush=True)
        return sum(found) / len(found)


def distil_draft(
    training: Text, held_out: Text, minutes: float, out: Path, resume: bool
) -> dict[str, float]:
    teacher = Network(DEMO)
    teacher.load_state_dict(torch.load(out / "demo.pt", weights_only=True))
    teacher.eval().requires_grad_(False)
    student = Network(DRAFT)
    if resume:
        student.load_state_dict(torch.load(out / "demo-draft.pt", weights_only=True))
    run, teach = (torch.compile(m, dynamic=False) for m in (student, teacher))
    agreement = Agreement(teacher, held_out)
    before = agreement(student)
    words = OwnWords(training, teacher, minutes * OWN_WORDS)

    def objective(ids: Tensor, _: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = teach(ids).flatten(0, 1).log_softmax(-1)
        got = run(ids).flatten(0, 1).log_softmax(-1)
        return F.kl_div(got, wanted, reduction="batchmean", log_target=True)

    left = minutes * (1 - OWN_WORDS)
    file, judge = out / "demo-draft.pt", lambda: -agreement(student)
    record = train(student, words, held_out, left, 4096, objective, file, judge)
    student.load_state_dict(torch.load(file, weights_only=True))
    return record | {"agreement_before": before, "agreement": agreement(student)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("steps", nargs="*", default=["tokenizer", "demo", "unlearn", "draft"])
    parser.add_argument("--data", type=Path, required=True, help="folder of .txt files")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=90)
    parser.add_argument("--unlearn-minutes", type=float, default=20)
    parser.add_argument("--draft-minutes", type=float, default=20)
    parser.add_argument("--resume", action="store_true", help="train what is in OUT further")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    tales, held_out_tales = split(args.data)
    if "tokenizer" in args.steps:
        train_tokenizer(tales, args.out)
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(args.out / "demo.model"))
    training, held_out = Text(tales, tokenizer), Text(held_out_tales, tokenizer)
    print(f"{len(training.ids):,} tokens to train on, {len(held_out.ids):,} held out", flush=True)
    record_file = args.out / "training.json"
    record = json.loads(record_file.read_text()) if record_file.exists() else {}
    record |= {"training_tokens": len(training.ids), "held_out_tokens": len(held_out.ids)}
    for step, name, config, run in (
        ("demo", "demo", DEMO, partial(train_demo, minutes=args.minutes, resume=args.resume)),
        ("unlearn", "demo", DEMO, partial(unlearn_repeating, minutes=args.unlearn_minutes)),
        (
            "draft",
            "demo-draft",
            DRAFT,
            partial(distil_draft, minutes=args.draft_minutes, resume=args.resume),
        ),
    ):
        if step in args.steps:
            record[step] = run(training, held_out, out=args.out)
            text = json.dumps(config.to_dict(), indent=2) + "\n"
            (args.out / f"{name}.config.json").write_text(text)
            record_file.write_text(json.dumps(record, indent=2) + "\n")
            print(json.dumps(record[step], indent=2), flush=True)


if __name__ == "__main__":
    main()
