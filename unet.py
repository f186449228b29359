# SPDX-License-Identifier: MIT
"""The denoiser, x̂_θ(x_t) of §2.4 or ε̂_θ(x_t) of §2.5 in version 3, January 2025, of the tutorial
(arXiv 2403.18103), as it is trained; with `alphas` ε̂_θ only.

The tutorial leaves the network open: anything that maps a noisy image x_t and its time t to an
image of the same shape will do. This is the U-Net of "Denoising Diffusion Probabilistic Models"
(arXiv 2006.11239), drawn for multipliers = (1, 2, 4):

    x_t ─ stem ─ level 0 ──────────── skips ───────────── level 0 ─ head ─ output    H   × W
                    └ ½ ─ level 1 ─── skips ─── level 1 ─ ×2 ┘                       H/2 × W/2
                             └ ½ ─ level 2 ─ skips ─ level 2 ─ ×2 ┘                  H/4 × W/4
                                      └── middle ──┘

Every level is `blocks` residual blocks on the way down and `blocks` + 1 on the way up; each block
on the way up also reads one output of the way down (the skips). All of them are told the time t.
The middle attends to the whole image, and so do the levels named in `attention`.
"""
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KAPPA = 8.0  # the κ of `UNet.combine`


def time_embedding(t: Tensor, dim: int) -> Tensor:
    """Sinusoidal embedding of t: (B,) -> (B, dim), dim even and at least 4.

    Half sines, half cosines, with wavelengths growing geometrically from 2π to 10,000 · 2π: slow
    ones place t roughly within 1..T, fast ones tell neighbouring t apart ("Attention Is All You
    Need", arXiv 1706.03762).
    """
    exponent = torch.arange(dim // 2, device=t.device) / (dim // 2 - 1)
    angle = t[:, None] * torch.exp(-math.log(10_000) * exponent)
    return torch.cat([angle.sin(), angle.cos()], dim=1)


def fourier_features(x: Tensor, exponents: Sequence[int]) -> Tensor:
    """x beside sin(2ⁿπx) and cos(2ⁿπx), for N exponents n: (B, C, H, W) -> (B, (1 + 2N) C, H, W).

    At t = 1 the network has to see noise of standard deviation 0.002 on pixels in [-1, 1]. sin and
    cos together vary with x at the rate 2ⁿπ, 100 for n = 5, at every x ("Variational Diffusion
    Models", arXiv 2107.00630), and they are computed in x's own precision, whereas bfloat16 rounds
    an x near −1 to steps of 0.004 or more.
    """
    waves = [wave(2**n * math.pi * x) for n in exponents for wave in (torch.sin, torch.cos)]
    return torch.cat([x, *waves], dim=1)


def group_norm(channels: int) -> nn.GroupNorm:
    """32 groups as in arXiv 2006.11239, or 16, 8, …: as many as have a multiple of 4 channels."""
    return nn.GroupNorm(math.gcd(32, channels // 4), channels)


def zero_init(layer: nn.Module) -> nn.Module:
    """Weights and bias start at 0: of a residual branch's last layer, so that a fresh block is its
    shortcut alone, and of the head, so that a fresh network's output is 0."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


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
        h = self.conv1(F.silu(self.norm1(x))) + self.shift(F.silu(time))[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return self.attention(self.shortcut(x) + h)


class Attention(nn.Module):
    """x + single-head self-attention over all H·W positions: (B, c, H, W) -> (B, c, H, W)."""

    def __init__(self, c: int):
        super().__init__()
        self.norm, self.qkv = group_norm(c), nn.Conv2d(c, 3 * c, 1)
        self.out = zero_init(nn.Conv2d(c, c, 1))

    def forward(self, x: Tensor) -> Tensor:
        # (B, H·W, 3c), its last dimension contiguous: torch's fused kernels ask for that.
        tokens = self.qkv(self.norm(x)).flatten(2).transpose(1, 2).contiguous()
        q, k, v = tokens[:, None].chunk(3, dim=-1)  # one head: (B, 1, H·W, c) each
        h = F.scaled_dot_product_attention(q, k, v)[:, 0]
        return x + self.out(h.transpose(1, 2).reshape(x.shape))


class UNet(nn.Module):
    """x̂_θ or ε̂_θ: x_t (B, C, H, W) and t (B,) -> (B, C, H, W).

    H and W must be divisible by 2^(levels − 1), where levels = len(multipliers).

    Args:
        image_channels: C.
        channels: width of the stem, a multiple of 4.
        multipliers: level i is channels · multipliers[i] wide and has 1/2^i of the resolution.
        blocks: residual blocks a level on the way down (one more on the way up).
        attention: the levels whose blocks end in self-attention, which costs (H·W)² at each; that
            of the middle's first block is always there.
        dropout: probability inside the residual blocks.
        fourier: the n of `fourier_features`, whole numbers.
        alphas: α_1, …, α_T of the chain, for an ε̂_θ that is put together from a noise and an image
            (see `combine`). Without them the output is the head's, as in arXiv 2006.11239.

    UNet(3, channels=128, multipliers=(1, 2, 2, 2), blocks=2, attention=(1,), dropout=0.1) is the
    CIFAR-10 network of arXiv 2006.11239, with its 35,746,307 parameters.

    Raises ValueError for a configuration that makes no network and for an H or W that does not
    divide.
    """

    def __init__(self, image_channels: int = 1, channels: int = 16,
                 multipliers: Sequence[int] = (1, 2, 4), blocks: int = 1,
                 attention: Sequence[int] = (), dropout: float = 0.0,
                 fourier: Sequence[int] = (), alphas: Tensor | None = None):
        super().__init__()
        if channels < 4 or channels % 4:
            raise ValueError(f"channels must be a positive multiple of 4, got {channels}")
        if blocks < 1 or not multipliers or min(multipliers) < 1:
            raise ValueError("blocks and multipliers must be whole numbers from 1, "
                             f"got {blocks}, {multipliers}")
        if not set(attention) <= set(range(len(multipliers))):
            raise ValueError(f"attention must name levels from 0 to {len(multipliers) - 1}, "
                             f"got {attention}")
        self.channels, self.fourier = channels, fourier
        self.stride = 2 ** (len(multipliers) - 1)

        c_time = 4 * channels
        self.time = nn.Sequential(
            nn.Linear(channels, c_time), nn.SiLU(), nn.Linear(c_time, c_time))

        def block(c_in: int, c_out: int, attend: bool) -> ResidualBlock:
            return ResidualBlock(c_in, c_out, c_time, dropout, attend)

        self.stem = nn.Conv2d(image_channels * (1 + 2 * len(fourier)), channels, 3, padding=1)
        levels = [(channels * m, level in attention) for level, m in enumerate(multipliers)]
        skips = [c := channels]  # the widths of what the way up will read
        self.down = nn.ModuleList()
        for level, (width, attend) in enumerate(levels):
            if level > 0:
                self.down.append(nn.Conv2d(c, c, 3, stride=2, padding=1))
                skips.append(c)
            for _ in range(blocks):
                self.down.append(block(c, width, attend))
                skips.append(c := width)

        self.middle = nn.ModuleList([block(c, c, True), block(c, c, False)])

        self.up = nn.ModuleList()
        for level, (width, attend) in reversed(list(enumerate(levels))):
            for _ in range(blocks + 1):
                self.up.append(block(c + skips.pop(), width, attend))
                c = width
            if level > 0:
                self.up.append(nn.Sequential(nn.Upsample(scale_factor=2),
                                             nn.Conv2d(c, c, 3, padding=1)))
        self.register_buffer("alpha_bar", None, persistent=False)
        if alphas is not None:  # (T + 1,). Where float32 rounds 1 − ᾱ_t its weight is next to 0
            self.alpha_bar = F.pad(alphas.double().cumprod(0), (1, 0), value=1.0).float()
        outputs = image_channels * (1 if alphas is None else 2)
        self.head = nn.Sequential(
            group_norm(c), nn.SiLU(), zero_init(nn.Conv2d(c, outputs, 3, padding=1)))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        if x.shape[2] % self.stride or x.shape[3] % self.stride:
            raise ValueError(f"images of {x.shape[2]}×{x.shape[3]} pixels: height and width must "
                             f"be divisible by {self.stride}")
        time = self.time(time_embedding(t, self.channels).to(x.dtype))
        h = self.stem(fourier_features(x, self.fourier))
        skips = [h]
        for layer in self.down:
            h = layer(h, time) if isinstance(layer, ResidualBlock) else layer(h)
            skips.append(h)
        for layer in self.middle:
            h = layer(h, time)
        for layer in self.up:
            if isinstance(layer, ResidualBlock):
                h = layer(torch.cat([h, skips.pop()], dim=1), time)
            else:
                h = layer(h)
        output = self.head(h)
        return output if self.alpha_bar is None else self.combine(output, x, t)

    def combine(self, output: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """ε̂_θ = [κ ᾱ_t ε̂ + √(1 − ᾱ_t) (x_t − √ᾱ_t x̂)] / (κ ᾱ_t + 1 − ᾱ_t)

        where ε̂ and x̂ are the output's halves: the mean of two estimates of ε, of ε̂ with the
        weight κ ᾱ_t and of the noise between x̂ and x_t with the weight 1 − ᾱ_t. In almost pure
        noise ε̂_θ is x_t but for a few per cent, and those few per cent are the picture: bfloat16
        rounds them away. With this the network has only to say there what x̂ is. κ = 1 would be a
        network for the velocity (arXiv 2202.00512), and costs likelihood at small t; 8 was found by
        trial. The two outputs are from "Dynamic Dual-Output Diffusion Models" (arXiv 2203.04304).
        """
        noise_hat, x0_hat = output.to(x.dtype).chunk(2, dim=1)
        alpha_bar = self.alpha_bar[t].view(-1, 1, 1, 1)
        by_image = (1 - alpha_bar).sqrt() * (x - alpha_bar.sqrt() * x0_hat)
        return (KAPPA * alpha_bar * noise_hat + by_image) / (KAPPA * alpha_bar + 1 - alpha_bar)
