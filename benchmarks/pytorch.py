#!/usr/bin/env python3
"""The blocks of the scenarios `pair` and `llama-block` in plain PyTorch, timed beside `dsp compare`.

    python3 -m pip install torch numpy
    python3 benchmarks/pytorch.py                    # one rank, eager and with oneDNN's products
    python3 benchmarks/pytorch.py --ranks 2          # two processes over Gloo: DSP and Ulysses

A step is what it is in the scenarios: forward, a scalar loss, backward into the input and every parameter, in f32. The
weights are random, and no gradient is summed over ranks. `--linears onednn` calls oneDNN's inner product forward and
for both backward products, where PyTorch's own linear layer calls MKL on a CPU.
"""

import argparse
import os
import statistics
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn

HIDDEN, HEADS, FRAMES, TOKENS, TEXT = 512, 8, 16, 256, 120
LENGTH, KEY_VALUE_HEADS, INNER = 4096, 2, 1376


class OneDnnProduct(torch.autograd.Function):
    """x·Wᵀ + b by oneDNN; the two products of its backward as well."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        ctx.biased = bias is not None
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        product = torch.ops.mkldnn._linear_pointwise
        rows = grad.reshape(-1, grad.shape[-1])
        dx = product(grad, weight.t().contiguous(), None, "none", [], "")
        dw = product(rows.t().contiguous(), x.reshape(-1, x.shape[-1]).t().contiguous(), None, "none", [], "")
        return dx, dw, rows.sum(0) if ctx.biased else None


class Linear(nn.Linear):
    onednn = False

    def forward(self, x):
        if Linear.onednn:
            return OneDnnProduct.apply(x, self.weight, self.bias)
        return super().forward(x)


class AllToAll(torch.autograd.Function):
    """Moves the split from the dim `gather` to the dim `scatter`."""

    @staticmethod
    def forward(ctx, x, scatter, gather):
        ctx.dims = scatter, gather
        return exchange(x, scatter, gather)

    @staticmethod
    def backward(ctx, grad):
        scatter, gather = ctx.dims
        return exchange(grad, gather, scatter), None, None


def exchange(x, scatter, gather):
    sent = torch.stack([part.contiguous() for part in x.chunk(dist.get_world_size(), scatter)])
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent)
    return torch.cat(received.unbind(0), gather)


class Split:
    """How a pair's sequence is split; on one rank, not at all."""

    def __init__(self, name):
        self.name = name

    def switch(self, x, scatter, gather):
        return AllToAll.apply(x, scatter, gather) if self.name == "dsp" else x

    def attend(self, query, key, value, along_split):
        # [batch, heads, length, dim]: Ulysses splits heads instead of the length
        if self.name == "ulysses" and along_split:
            query, key, value = (AllToAll.apply(x, 1, 2) for x in (query, key, value))
            return AllToAll.apply(F.scaled_dot_product_attention(query, key, value), 2, 1)
        return F.scaled_dot_product_attention(query, key, value)


def heads(x, count):
    return x.reshape(*x.shape[:-1], count, -1).transpose(-3, -2)


def rotate(x, angles):
    even, odd = x[..., 0::2], x[..., 1::2]
    cos, sin = angles.cos(), angles.sin()
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)


class DitBlock(nn.Module):
    """A block of STDiT-3: modulated self-attention along one dim, cross-attention to the text, feed-forward."""

    def __init__(self, temporal):
        super().__init__()
        self.temporal = temporal
        self.table = nn.Parameter(torch.randn(6, HIDDEN) / HIDDEN**0.5)
        self.norm1 = nn.LayerNorm(HIDDEN, eps=1e-6, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(HIDDEN, eps=1e-6, elementwise_affine=False)
        self.qkv, self.out = Linear(HIDDEN, 3 * HIDDEN), Linear(HIDDEN, HIDDEN)
        self.q_norm, self.k_norm = nn.RMSNorm(HIDDEN // HEADS), nn.RMSNorm(HIDDEN // HEADS)
        self.cross_q, self.cross_kv = Linear(HIDDEN, HIDDEN), Linear(HIDDEN, 2 * HIDDEN)
        self.cross_out = Linear(HIDDEN, HIDDEN)
        self.up, self.down = Linear(HIDDEN, 4 * HIDDEN), Linear(4 * HIDDEN, HIDDEN)

    def forward(self, x, text, time_step, angles, split, along_split):
        batch, frames, tokens, _ = x.shape
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.table + time_step.reshape(6, HIDDEN)).unbind(0)
        y = self.norm1(x) * (1 + scale1) + shift1
        y = y.transpose(1, 2).flatten(0, 1) if self.temporal else y.flatten(0, 1)
        query, key, value = (heads(part, HEADS) for part in self.qkv(y).chunk(3, -1))
        query, key = self.q_norm(query), self.k_norm(key)
        if self.temporal:
            query, key = rotate(query, angles), rotate(key, angles)
        y = split.attend(query, key, value, along_split)
        y = self.out(y.transpose(1, 2).flatten(-2))
        if self.temporal:
            y = y.unflatten(0, (batch, tokens)).transpose(1, 2)
        else:
            y = y.unflatten(0, (batch, frames))
        x = x + gate1 * y
        key, value = (heads(part, HEADS) for part in self.cross_kv(text).chunk(2, -1))
        y = F.scaled_dot_product_attention(heads(self.cross_q(x.flatten(1, 2)), HEADS), key, value)
        x = x + self.cross_out(y.transpose(1, 2).flatten(-2)).reshape(x.shape)
        y = self.norm2(x) * (1 + scale2) + shift2
        return x + gate2 * self.down(F.gelu(self.up(y), approximate="tanh"))


class Pair(nn.Module):
    def __init__(self, split, ranks):
        super().__init__()
        self.split, self.ranks = split, ranks
        self.spatial, self.temporal = DitBlock(False), DitBlock(True)
        self.register_buffer("angles", torch.outer(torch.arange(FRAMES), 1e4 ** -torch.arange(0, 1, 2 * HEADS / HIDDEN)))

    def inputs(self):
        # DSP splits time first, which the spatial block does not attend along; Ulysses space throughout
        frames, tokens = FRAMES, TOKENS
        if self.split.name == "ulysses":
            tokens //= self.ranks
        else:
            frames //= self.ranks
        x = torch.randn(1, frames, tokens, HIDDEN, requires_grad=True)
        return x, torch.randn(1, TEXT, HIDDEN), torch.randn(1, 6 * HIDDEN)

    def forward(self, x, text, time_step):
        split = self.split
        x = self.spatial(x, text, time_step, self.angles, split, True)
        x = split.switch(x, 2, 1)
        return self.temporal(x, text, time_step, self.angles, split, False)


class Llama(nn.Module):
    """A layer of LLaMA's kind."""

    def __init__(self, split, ranks):
        super().__init__()
        self.split, self.ranks = split, ranks
        d = HIDDEN // HEADS
        self.norm1, self.norm2 = nn.RMSNorm(HIDDEN), nn.RMSNorm(HIDDEN)
        self.q, self.o = Linear(HIDDEN, HIDDEN, bias=False), Linear(HIDDEN, HIDDEN, bias=False)
        self.k = Linear(HIDDEN, KEY_VALUE_HEADS * d, bias=False)
        self.v = Linear(HIDDEN, KEY_VALUE_HEADS * d, bias=False)
        self.gate, self.up = Linear(HIDDEN, INNER, bias=False), Linear(HIDDEN, INNER, bias=False)
        self.down = Linear(INNER, HIDDEN, bias=False)
        positions = torch.arange(LENGTH // ranks) + (dist.get_rank() * LENGTH // ranks if ranks > 1 else 0)
        self.register_buffer("angles", torch.outer(positions, 1e4 ** -torch.arange(0, 1, 2 / d)))

    def inputs(self):
        return (torch.randn(1, LENGTH // self.ranks, HIDDEN, requires_grad=True),)

    def forward(self, x):
        y = self.norm1(x)
        query = rotate(heads(self.q(y), HEADS), self.angles)
        key = rotate(heads(self.k(y), KEY_VALUE_HEADS), self.angles)
        value = heads(self.v(y), KEY_VALUE_HEADS)
        if self.split.name == "ulysses":
            query, key, value = (AllToAll.apply(part, 1, 2) for part in (query, key, value))
        key, value = (part.repeat_interleave(HEADS // KEY_VALUE_HEADS, 1) for part in (key, value))
        y = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        if self.split.name == "ulysses":
            y = AllToAll.apply(y, 2, 1)
        x = x + self.o(y.transpose(1, 2).flatten(-2))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


def measure(block, repeats):
    """Medians in ms of a forward pass alone and of a forward and a backward pass."""
    inputs = block.inputs()

    def forward():
        with torch.no_grad():
            block(*inputs)

    def both():
        block.zero_grad()
        block(*inputs).square().mean().backward()

    for body in (forward, both):
        times = []
        for repeat in range(repeats + 2):
            if dist.is_initialized():
                dist.barrier()
            start = time.perf_counter()
            body()
            if dist.is_initialized():
                dist.barrier()
            if repeat >= 2:
                times.append(1e3 * (time.perf_counter() - start))
        yield statistics.median(times)


def rank_main(rank, arguments):
    torch.manual_seed(rank)
    torch.set_num_threads(arguments.threads)
    if arguments.ranks > 1:
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "29503")
        dist.init_process_group("gloo", rank=rank, world_size=arguments.ranks)
    for model, kinds in ((Pair, ("dsp", "ulysses")), (Llama, ("ulysses",))):
        for kind in kinds if arguments.ranks > 1 else ("serial",):
            for linears in arguments.linears.split(","):
                Linear.onednn = linears == "onednn"
                forward, both = measure(model(Split(kind), arguments.ranks), arguments.repeats)
                if rank == 0:
                    print(
                        f"{model.__name__:6} {kind:8} {linears:7} {arguments.ranks} rank(s) × {arguments.threads} "
                        f"thread(s): forward {forward:7.0f} ms, forward + backward {both:7.0f} ms",
                        flush=True,
                    )
    if arguments.ranks > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--linears", default="eager,onednn")
    arguments = parser.parse_args()
    if arguments.ranks == 1:
        rank_main(0, arguments)
    else:
        mp.spawn(rank_main, (arguments,), nprocs=arguments.ranks)
