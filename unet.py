# SPDX-License-Identifier: MIT
"""The denoiser of section 2: x̂_θ(x_t) in §2.4, ε̂_θ(x_t) in §2.5 (arXiv 2403.18103, version 3).

The tutorial leaves it open: anything that maps a noisy image x_t and its time t to an image of the
same shape will do. `UNet` is the network of "Denoising Diffusion Probabilistic Models"
(arXiv 2006.11239), drawn here with three levels:

    x_t ─ stem ─ level 0 ──────────── skips ───────────── level 0 ─ head ─ output    H   × W
                    └ ½ ─ level 1 ─── skips ─── level 1 ─ ×2 ┘                       H/2 × W/2
                             └ ½ ─ level 2 ─ skips ─ level 2 ─ ×2 ┘                  H/4 × W/4
                                      └── middle ──┘

Every level has `blocks` residual blocks on the way down and `blocks` + 1 on the way up. Each block
on the way up also takes one output from the way down (a skip connection). Every block receives t,
because one network removes the noise of every t. The first middle block and the levels listed in
`attention` have self-attention over the whole image.

`Fourier`, below, is this repository's addition: Fourier features of the input.
"""
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def time_embedding(t: Tensor, dim: int) -> Tensor:
    """Sinusoidal embedding of t: (B,) -> (B, dim), dim even and at least 4.

    Half sines, half cosines, with wavelengths growing geometrically from 2π to 10,000 · 2π: the
    long ones locate t roughly in 1..T, the short ones tell neighbouring t apart ("Attention Is All
    You Need", arXiv 1706.03762).
    """
    exponent = torch.arange(dim // 2, dtype=torch.float32, device=t.device) / (dim // 2 - 1)
    angle = t[:, None] * torch.exp(-math.log(10_000) * exponent)
    return torch.cat([angle.sin(), angle.cos()], dim=1)


def group_norm(channels: int) -> nn.GroupNorm:
    """32 groups as in arXiv 2006.11239, or fewer (16, 8, …), so that each group has a multiple of 4
    channels."""
    return nn.GroupNorm(math.gcd(32, channels // 4), channels)


def zero_init(layer: nn.Module) -> nn.Module:
    """Sets weights and bias to zero: in the last layer of a residual branch, so that a new block
    equals its shortcut; in the head, so that a new network outputs 0."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


class Attention(nn.Module):
    """x + single-head self-attention over all H·W positions: (B, c, H, W) -> (B, c, H, W)."""

    def __init__(self, c: int):
        super().__init__()
        self.norm, self.qkv = group_norm(c), nn.Conv2d(c, 3 * c, 1)
        self.out = zero_init(nn.Conv2d(c, c, 1))

    def forward(self, x: Tensor) -> Tensor:
        # (B, H·W, 3c), contiguous in the last dimension, as torch's fused kernels require.
        tokens = self.qkv(self.norm(x)).flatten(2).transpose(1, 2).contiguous()
        q, k, v = tokens[:, None].chunk(3, dim=-1)  # one head: (B, 1, H·W, c) each
        h = F.scaled_dot_product_attention(q, k, v)[:, 0]        # (B, H·W, c)
        return x + self.out(h.transpose(1, 2).reshape(x.shape))  # back to (B, c, H, W)


class ResidualBlock(nn.Module):
    """x + conv(dropout(silu(norm(h)))) with h = conv(silu(norm(x))) + shift(t), then attention.

    (B, c_in, H, W), time (B, c_time) -> (B, c_out, H, W). A 1×1 convolution takes x from c_in to
    c_out channels where the two differ.
    """

    def __init__(self, c_in: int, c_out: int, c_time: int, dropout: float, attend: bool):
        super().__init__()
        self.norm1, self.conv1 = group_norm(c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.shift = nn.Linear(c_time, c_out)
        self.norm2, self.conv2 = group_norm(c_out), zero_init(nn.Conv2d(c_out, c_out, 3, padding=1))
        self.dropout = nn.Dropout(dropout)
        self.shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        self.attention = Attention(c_out) if attend else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        # t shifts each of the c_out channels by one number, the same at every position.
        h = self.conv1(F.silu(self.norm1(x))) + self.shift(F.silu(time))[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))  # (B, c_out, H, W)
        return self.attention(self.shortcut(x) + h)


class UNet(nn.Module):
    """Maps x_t, (B, in_channels, H, W), and t, (B,) or (), to (B, out_channels, H, W).

    t is in 1..T with T about 1,000; scale a t in [0, 1] by 1000. H and W must be divisible by
    2^(levels − 1), where levels = len(multipliers).

    Args:
        channels: width of the stem, a multiple of 4.
        multipliers: level i is channels · multipliers[i] wide and has 1/2^i of the resolution.
        blocks: residual blocks per level on the way down (one more on the way up).
        attention: indices of the levels whose blocks end in self-attention (cost: quadratic in
            H·W), in addition to the first middle block.
        dropout: probability inside the residual blocks.

    UNet(3, 3, channels=128, multipliers=(1, 2, 2, 2), blocks=2, attention=(1,), dropout=0.1) is the
    CIFAR-10 network of arXiv 2006.11239, with its 35,746,307 parameters. (The published
    weights are not compatible: their stride-2 convolutions pad only the right and lower edges.)

    Raises ValueError for channels, blocks, multipliers or attention out of range, and for an x_t of
    the wrong shape.
    """

    def __init__(self, in_channels: int = 1, out_channels: int = 1, channels: int = 16,
                 multipliers: Sequence[int] = (1, 1, 4), blocks: int = 1,
                 attention: Sequence[int] = (), dropout: float = 0.0):
        super().__init__()
        if channels < 4 or channels % 4:
            raise ValueError(f"channels must be a positive multiple of 4, got {channels}")
        if blocks < 1 or not multipliers or min(multipliers) < 1:
            raise ValueError("blocks and every multiplier must be at least 1, got "
                             f"{blocks}, {multipliers}")
        if not set(attention) <= set(range(len(multipliers))) or bool in map(type, attention):
            raise ValueError(f"attention must list levels from 0 to {len(multipliers) - 1}, e.g. "
                             f"(2,), not booleans; got {attention}")
        self.channels, self.stride = channels, 2 ** (len(multipliers) - 1)

        c_time = 4 * channels
        self.time = nn.Sequential(
            nn.Linear(channels, c_time), nn.SiLU(), nn.Linear(c_time, c_time))

        def block(c_in: int, c_out: int, attend: bool) -> ResidualBlock:
            return ResidualBlock(c_in, c_out, c_time, dropout, attend)

        self.stem = nn.Conv2d(in_channels, channels, 3, padding=1)
        levels = [(channels * m, level in attention) for level, m in enumerate(multipliers)]
        # c is the number of output channels so far. `skips` keeps it for every output on the way
        # down: the way up reads these outputs again, last one first.
        c, skips = channels, [channels]
        self.down = nn.ModuleList()
        for level, (width, attend) in enumerate(levels):
            if level > 0:  # to half the resolution
                self.down.append(nn.Conv2d(c, c, 3, stride=2, padding=1))
                skips.append(c)
            for _ in range(blocks):
                self.down.append(block(c, width, attend))
                c = width
                skips.append(c)

        self.middle = nn.ModuleList([block(c, c, True), block(c, c, False)])

        self.up = nn.ModuleList()
        for level, (width, attend) in reversed(list(enumerate(levels))):
            for _ in range(blocks + 1):  # + 1 for the level's own input (stem or stride 2)
                self.up.append(block(c + skips.pop(), width, attend))
                c = width
            if level > 0:  # to twice the resolution
                self.up.append(nn.Sequential(nn.Upsample(scale_factor=2),
                                             nn.Conv2d(c, c, 3, padding=1)))
        self.head = nn.Sequential(
            group_norm(c), nn.SiLU(), zero_init(nn.Conv2d(c, out_channels, 3, padding=1)))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        C = self.stem.in_channels
        if x.ndim != 4 or x.shape[1] != C:
            raise ValueError(f"x_t must be (B, {C}, H, W), got {tuple(x.shape)}")
        if x.shape[2] % self.stride or x.shape[3] % self.stride:
            raise ValueError(f"H and W must be divisible by {self.stride}, got {x.shape[2]} and "
                             f"{x.shape[3]}")
        time = time_embedding(t.expand(len(x)), self.channels)  # (B, channels)
        time = self.time(time.to(x.dtype))                      # (B, 4 · channels)

        # After a block of level i, h is (B, channels · multipliers[i], H/2^i, W/2^i). Going down
        # loses detail, so every output is kept: a block on the way up reads it together with h,
        # which carries the whole image's context from the coarser levels.
        h = self.stem(x)                                        # (B, channels, H, W)
        skips = [h]
        for layer in self.down:
            h = layer(h, time) if isinstance(layer, ResidualBlock) else layer(h)
            skips.append(h)
        for layer in self.middle:                               # the coarsest level
            h = layer(h, time)
        for layer in self.up:
            if isinstance(layer, ResidualBlock):  # reads c_h + c_skip channels
                h = layer(torch.cat([h, skips.pop()], dim=1), time)
            else:
                h = layer(h)
        return self.head(h)                                     # (B, out_channels, H, W)


# -------------------------------------------------- not in arXiv 2006.11239: Fourier features


class Fourier(nn.Module):
    """Feeds a network x_t, (B, C, …), and its Fourier features sin(2ⁿπx_t) and cos(2ⁿπx_t) for N
    exponents n: (1 + 2N) C input channels.

    At t = 1 of `cauchy_alphas` the noise has standard deviation 0.002, too small for bfloat16 near
    ±1, whose values are 0.004 apart. The features are computed in x_t's own precision and change
    2ⁿπ times as fast as x_t, 100 times for n = 5 ("Variational Diffusion Models", arXiv
    2107.00630).
    """

    def __init__(self, network: nn.Module, exponents: Sequence[int]):
        super().__init__()
        self.network, self.exponents = network, exponents

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        angles = [2**n * math.pi * x_t for n in self.exponents]
        waves = [wave for angle in angles for wave in (angle.sin(), angle.cos())]
        return self.network(torch.cat([x_t, *waves], dim=1), t)
