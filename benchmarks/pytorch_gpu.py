#!/usr/bin/env python3
"""Attention on a GPU in PyTorch, for the problems of `dsp-core/benches/gpu.rs`, and the two floors beside it.

    python3 benchmarks/pytorch_gpu.py

In bf16 `scaled_dot_product_attention` takes its flash kernels, in f32 (without TF32) its memory-efficient ones.
"""

import statistics

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

PROBLEMS = [
    (False, 1, 4096, 16, 16),
    (True, 1, 4096, 16, 16),
    (True, 1, 16384, 16, 4),
    (False, 1, 16384, 16, 16),
    (False, 16, 256, 8, 8),
    (False, 256, 16, 8, 8),
]
WIDTH = 64


def seconds(run):
    """The median of five rounds of about 60 ms each."""

    def timed(runs):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(runs):
            run()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3

    timed(1)
    runs = max(1, round(0.06 / max(timed(1), 2e-5)))
    return statistics.median(timed(runs) for _ in range(5)) / runs


def main():
    print(torch.cuda.get_device_name(), "PyTorch", torch.__version__)
    x = torch.randn(1 << 28, device="cuda")
    print(f"a pass over memory: {8 * x.numel() / seconds(lambda: x * 1.5) / 1e9:.0f} GB/s")
    del x
    for dtype in (torch.bfloat16, torch.float32):
        a, b = (torch.randn(8192, 8192, device="cuda", dtype=dtype) for _ in range(2))
        product = 2 * 8192**3 / seconds(lambda: a @ b)
        print(f"{str(dtype):16} matrix product {product / 1e12:29.1f} TFLOP/s")
        for causal, batch, length, heads, kv_heads in PROBLEMS:
            shape = lambda heads: (batch, heads, length, WIDTH)
            q, k, v = (
                torch.randn(shape(h), device="cuda", dtype=dtype, requires_grad=True)
                for h in (heads, kv_heads, kv_heads)
            )
            grouped = heads != kv_heads
            if grouped and dtype == torch.float32:
                # Its kernels for f32 have no groups.
                k, v = (x.detach().repeat_interleave(heads // kv_heads, 1).requires_grad_() for x in (k, v))
                grouped = False
            backend = SDPBackend.FLASH_ATTENTION if dtype == torch.bfloat16 else SDPBackend.EFFICIENT_ATTENTION
            with sdpa_kernel(backend):
                forward = lambda: F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)
                out = forward()
                dout = torch.randn_like(out)
                once = seconds(lambda: forward())
                backward = seconds(lambda: torch.autograd.grad(out, (q, k, v), dout, retain_graph=True))
            pairs = length * (length + 1) // 2 if causal else length * length
            operations = 4 * batch * heads * WIDTH * pairs
            name = f"{str(dtype)[6:]} {batch}x{length}, heads {heads}/{kv_heads}{' causal' if causal else ''}"
            for what, taken, count in (("forward", once, operations), ("backward", backward, 2.5 * operations)):
                rate = count / taken
                print(f"{name + ': ' + what:58} {1e3 * taken:9.3f} {rate / 1e12:9.1f} {1e2 * rate / product:6.1f} %")


if __name__ == "__main__":
    main()
