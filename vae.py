# SPDX-License-Identifier: MIT
"""Section 1 of the tutorial: the variational auto-encoder (VAE).

§, theorem, example and equation numbers refer to Stanley Chan, "Tutorial on Diffusion Models for
Imaging and Vision" (arXiv 2403.18103), version 3, January 2025; the file follows its order. The
paper writes d for the dimension of both x and z; here z has dimension d and x has dimension D.

Building Blocks (§1.1). An encoder maps an image x to a latent z, a decoder maps z back to an image;
both are distributions. p(z) is the prior, so simple that new z can be drawn from it:

    x ──> q_φ(z | x) ──> z ──> p_θ(x | z) ──> x̂            p(z) = N(0, I)

In `GaussianMixture` (Ex. 1.2) p(z | x) is known exactly. In general p(z | x) = p(x | z) p(z) / p(x)
needs p(x), an integral over all z, so `VAE` learns q_φ(z | x) in its place. `python vae.py`
checks the section's examples and theorems numerically.
"""
import functools
import math
import sys
import warnings
from collections.abc import Callable, Iterator

if __name__ == "__main__":  # hides torch's warning; NumPy is not needed
    warnings.filterwarnings("ignore", "Failed to initialize NumPy")

import torch
from torch import Tensor, nn
from torch.distributions import Categorical, MultivariateNormal, Normal, kl_divergence


class GaussianMixture:
    """Ex. 1.2, (1.1): the latent z = k says which component, a Gaussian, x comes from.

    p(k) = π_k, p(x | k) = N(x | μ_k, σ_k² I), p(x) = Σ_k π_k N(x | μ_k, σ_k² I).

    Args:
        weights: π, (K,), non-negative; normalised to sum to 1.
        means: μ, (K, D), floats.
        stds: σ, (K,), positive.
    """

    def __init__(self, weights: Tensor, means: Tensor, stds: Tensor):
        if means.ndim != 2 or not weights.shape == means.shape[:1] == stds.shape:
            raise ValueError("weights, means and stds must be (K,), (K, D) and (K,), got "
                             f"{tuple(weights.shape)}, {tuple(means.shape)}, {tuple(stds.shape)}")
        scale_tril = stds[:, None, None] * torch.eye(means.shape[1])  # σ_k I
        self.p_k = Categorical(weights)
        self.p_x_given_k = MultivariateNormal(means, scale_tril=scale_tril)

    def log_joint(self, x: Tensor) -> Tensor:
        """log p(x, k) = log π_k + log N(x | μ_k, σ_k² I) in nats: (n, D) -> (n, K)."""
        return self.p_k.logits + self.p_x_given_k.log_prob(x.unsqueeze(-2))  # logits: log π_k

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x) = log Σ_k π_k N(x | μ_k, σ_k² I) in nats: (n,)."""
        return self.log_joint(x).logsumexp(-1)

    def posterior(self, x: Tensor) -> Tensor:
        """p(k | x) = π_k N(x | μ_k, σ_k² I) / p(x), by Bayes' rule: (n, K), rows sum to 1."""
        return self.log_joint(x).softmax(-1)  # exp(log joint) / Σ_k exp(log joint)

    def encode(self, x: Tensor) -> Tensor:
        """The encoder: arg max_k p(k | x), the index of the most probable component: (n,)."""
        return self.posterior(x).argmax(-1)

    def decode(self, k: Tensor) -> Tensor:
        """The decoder: a draw of x ~ p(x | k) = N(μ_k, σ_k² I) for each k: (n,) -> (n, D)."""
        return torch.normal(self.p_x_given_k.mean[k], self.p_x_given_k.stddev[k])


class VAE(nn.Module):
    """The variational auto-encoder of §1, with any encoder and decoder (e.g. `conv_networks`).

    Args:
        encoder: x (B, …) -> (B, 2d, …), μ and log σ², concatenated along dim 1. The logarithm,
            because a network's output may be any number, and σ must be positive.
        decoder: z (B, d, …) -> x's shape.
        decoder_std: σ_dec, for pixel values in [-1, 1]: a number, or "learned" to train it as a
            parameter. A small σ_dec gives sharp reconstructions but poor samples, because the
            encoded z are then far from N(0, I); a large one does the opposite. 0.6 suits MNIST.

    Images are float tensors (B, C, H, W) in [-1, 1]. Raises ValueError for an invalid decoder_std,
    for an x that is not a floating-point tensor, and for network outputs of the wrong shape.
    """

    def __init__(self, encoder: Callable[[Tensor], Tensor], decoder: Callable[[Tensor], Tensor],
                 decoder_std: float | str = 0.6):
        super().__init__()
        if decoder_std != "learned" and not (isinstance(decoder_std, (int, float))
                                             and 0 < decoder_std < math.inf):
            raise ValueError(f'decoder_std must be positive and finite, or "learned", '
                             f"got {decoder_std!r}")
        self.encoder, self.decoder = encoder, decoder
        self.log_decoder_std = (nn.Parameter(torch.zeros(())) if decoder_std == "learned"
                                else math.log(decoder_std))

    # -------------------------------------------------- §1.1 Building Blocks of VAE

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """q_φ(z | x) = N(z | μ_φ(x), diag σ_φ²(x))    (1.2): (mu, log_var), (B, d, …)."""
        check_floats(x)
        output = self.encoder(x).to(x.dtype)  # under autocast the network returns bfloat16
        if output.ndim < 2 or len(output) != len(x) or output.shape[1] % 2:
            raise ValueError(f"the encoder must return (B, 2d, …), got {tuple(output.shape)}")
        return output.chunk(2, dim=1)

    def decode(self, z: Tensor) -> Tensor:
        """f_θ(z), the mean of p_θ(x | z) = N(x | f_θ(z), σ_dec² I)    (1.3), of x's shape."""
        return self.decoder(z).to(z.dtype)

    @property
    def decoder_std(self) -> float | Tensor:
        """σ_dec: the given number or, if learned, a scalar tensor."""
        return math.e ** self.log_decoder_std  # unlike exp, for a float and a Parameter alike

    # -------------------------------------------------- §1.2 Evidence Lower Bound

    def elbo(self, x: Tensor) -> dict[str, Tensor]:
        """ELBO(x) = E_{q_φ(z | x)} log [p(x, z) / q_φ(z | x)]                  Def. 1.3, (1.4)

                = log p(x) − KL(q_φ(z | x) ‖ p(z | x))  ≤  log p(x)          Thm 1.1, (1.6)
                = reconstruction − kl                                        Thm 1.2, (1.10)

        log p(x) itself cannot be maximised, because p(x) is an integral over all z. The ELBO can.
        By Thm 1.1 it is a lower bound, since a Kullback-Leibler divergence (KL) is never negative,
        and there is no gap where q_φ(z | x) is p(z | x). p(x, z) = p_θ(x | z) p(z) splits it into
        the two terms of Thm 1.2, which are returned, each (B,), in nats per image:

            reconstruction = E_{q_φ(z | x)} log p_θ(x | z)      "how good the decoder is"
            kl             = KL(q_φ(z | x) ‖ p(z))              "how good the encoder is"

        The KL pulls q_φ(z | x) towards the prior p(z), from which `sample` takes its z. The
        expectation is estimated from one sample of z, M = 1 in (1.31), (1.32), (1.33). The ELBO
        bounds a log density and can be positive, for a density can exceed 1; `DDPM.elbo` bounds a
        log probability. Compare them with `bits_per_dim`.
        """
        mu, log_var = self.encode(x)
        z = self.reparameterize(mu, log_var)
        return {"reconstruction": self.log_likelihood(x, z), "kl": self.kl(mu, log_var)}

    # -------------------------------------------------- §1.3 Optimization in VAE

    def reparameterize(self, mu: Tensor, log_var: Tensor) -> Tensor:
        """z = μ + σ ⊙ ε, ε ~ N(0, I), (B, d, …)    (1.16), Ex. 1.7, and (1.22), (1.23), (1.24)

        In E_{q_φ(z | x)} f(z) the average is over a distribution that depends on φ, not on θ: ∇_θ
        can move inside the expectation (1.13), ∇_φ cannot (1.14), (1.15). This writes z as a
        function of φ and ε. Since the distribution of ε does not depend on φ, ∇_φ can move inside,
        too: ∇_φ E_{q_φ(z | x)} f(z) = E_{p(ε)} ∇_φ f(μ + σ ⊙ ε)    (1.17), (1.18), (1.19), (1.20).
        """
        return mu + (0.5 * log_var).exp() * torch.randn_like(mu)  # σ = exp(½ log σ²)

    def kl(self, mu: Tensor, log_var: Tensor) -> Tensor:
        """KL(q_φ(z | x) ‖ p(z)) = ½ Σ_i (σ_i² − 1 + μ_i² − log σ_i²), (B,)    Thm 1.3, (1.26)

        Each coordinate of z has its own σ_i; (1.26) has a single σ_φ. What changes `kl` changes the
        bound: a β-VAE overrides `loss`.
        """
        return 0.5 * (log_var.exp() - 1 + mu.square() - log_var).flatten(1).sum(1)

    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        """log p_θ(x | z) = −‖x − f_θ(z)‖² / 2σ_dec² − D log (√(2π) σ_dec), (B,)    (1.29), (1.30)

        The code subtracts log (√(2π) σ_dec) per pixel; the sum over D pixels gives the D.
        """
        x_hat = self.decode(z)
        if x_hat.shape != x.shape:
            raise ValueError(f"the decoder must return x's shape {tuple(x.shape)}, got "
                             f"{tuple(x_hat.shape)}")
        return (-(x - x_hat).square() / (2 * self.decoder_std**2)
                - self.log_decoder_std - 0.5 * math.log(2 * math.pi)).flatten(1).sum(1)

    def loss(self, x: Tensor) -> Tensor:
        """−ELBO / D    Thm 1.4: a scalar, the batch mean, in nats per pixel (1/D only rescales it).

        Minimising it is (1.35), which is Def. 1.4, (1.12), for two Gaussians. ((1.35) is misprinted
        with + before the KL; (1.32) has −.) The loss can be negative, as a density can exceed 1.
        """
        terms = self.elbo(x)
        return (terms["kl"] - terms["reconstruction"]).mean() / math.prod(x.shape[1:])

    def forward(self, x: Tensor) -> Tensor:
        return self.loss(x)  # vae(x) is the loss, also inside DistributedDataParallel

    def sample(self, z: Tensor) -> Tensor:
        """x̂ = f_θ(z), for z ~ N(0, I)    Fig. 1.7: new images; only the decoder is needed. This is
        the mean of p_θ(x | z); drawing x would add noise of standard deviation σ_dec."""
        if z.requires_grad and torch.is_grad_enabled():
            raise ValueError("z requires a gradient, but `sample` has none; `decode` has")
        with torch.no_grad():
            return self.decode(z)

    # -------------------------------------------------- not in the paper

    def bits_per_dim(self, x: Tensor) -> Tensor:
        """An upper bound on −log₂ P(x) / D, bits per dimension, (B,), for D = C·H·W 8-bit pixels.
        ("Pixel" means one value of one channel.) The first ≤ is Jensen's inequality:

            −log P(x)  ≤  −E log [p(x + u) (2/255)^D]  ≤  −E ELBO(x + u) − D log (2/255)

        u is uniform over a pixel's bin, 2/255 wide on [-1, 1] ("A note on the evaluation of
        generative models", arXiv 1511.01844). One u is drawn for each x. p_θ(x | z) must be a
        density, as in (1.3); if a subclass makes it a probability (Bernoulli), use its `elbo`. If
        a network has dropout, call `eval()` first.
        """
        check_pixels(x)
        u = (torch.rand_like(x) - 0.5) * (2 / 255)
        terms = self.elbo(x + u)
        elbo = terms["reconstruction"] - terms["kl"]
        return (-elbo / math.prod(x.shape[1:]) - math.log(2 / 255)) / math.log(2)


def check_floats(x: Tensor, *dtypes: torch.dtype):
    """Raises ValueError unless x is a non-empty float tensor (of one of `dtypes`, if given)."""
    kind = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x)
    if not isinstance(x, Tensor) or not x.is_floating_point() or 0 in x.shape:
        raise ValueError(f"x must be a non-empty float tensor, images in [-1, 1], got {kind}")
    if dtypes and x.dtype not in dtypes:
        raise ValueError(f"x must be {' or '.join(map(str, dtypes))}, got {kind}")


def check_pixels(x: Tensor):
    check_floats(x)
    k = x * 127.5 + 127.5
    if not x.abs().max() <= 1 or not (k - k.round()).abs().max() < 0.1:
        raise ValueError("x must hold 8-bit pixels, k / 127.5 − 1 for k = 0, …, 255")


# -------------------------------------------------- networks (the paper does not specify any)


def conv_networks(image_shape: tuple[int, int, int], latent_dim: int = 8,
                  channels: int = 16) -> tuple[nn.Module, nn.Module]:
    """Encoder_φ and Decoder_θ for images (C, H, W), H and W at least 8: two strided convolutions
    down to a quarter of the resolution, two pixel shuffles back up; `channels` feature maps at half
    resolution and twice as many at a quarter. The decoder ends in tanh, so it returns means in
    [-1, 1], not logits. Raises ValueError for a smaller image."""
    C, H, W = image_shape
    if min(H, W) < 8:
        raise ValueError(f"H and W must be at least 8, got {tuple(image_shape)}")
    c, h, w = channels, math.ceil(H / 4), math.ceil(W / 4)

    def norm_silu(width: int) -> nn.Module:
        # Without GroupNorm, training can collapse in its first steps to q_φ(z | x) = p(z) and the
        # same average image for every z ("posterior collapse").
        return nn.Sequential(nn.GroupNorm(math.gcd(8, width), width), nn.SiLU())

    encoder = nn.Sequential(
        nn.Conv2d(C, c, 3, stride=2, padding=1), norm_silu(c),
        nn.Conv2d(c, 2 * c, 3, stride=2, padding=1), norm_silu(2 * c),
        nn.Conv2d(2 * c, 2 * c, 3, padding=1), norm_silu(2 * c),
        nn.Flatten(), nn.Linear(2 * c * h * w, 16 * c), nn.SiLU(),
        nn.Linear(16 * c, 2 * latent_dim))
    decoder = nn.Sequential(
        nn.Linear(latent_dim, 16 * c), nn.SiLU(), nn.Linear(16 * c, 2 * c * h * w),
        nn.Unflatten(1, (2 * c, h, w)), norm_silu(2 * c),
        nn.Conv2d(2 * c, 2 * c, 3, padding=1), norm_silu(2 * c),
        nn.Conv2d(2 * c, 4 * c, 3, padding=1), nn.PixelShuffle(2), norm_silu(c),
        nn.Conv2d(c, 4 * C, 3, padding=1), nn.PixelShuffle(2), nn.Tanh(),
        nn.ZeroPad2d((0, W - 4 * w, 0, H - 4 * h)))  # negative padding: crops 4h × 4w to H × W
    return encoder, decoder


# -------------------------------------------------- worked examples: python vae.py
# If you copy this file, you can delete everything below. Each function covers one subsection and
# yields rows (what, formula, computed). The last two are numbers, or tensors whose mean is printed.
# Rows "as printed" reproduce an error in the paper. ELBOs and KLs are in nats.

# From Ex. 1.3 on, x ~ N(μ, σ² I). x and z both have dimension d (in paper and rows), D in the code.
D, MU, SIGMA = 64, 0.3, 0.5


@functools.cache
def data() -> Tensor:
    return MU + SIGMA * torch.randn(50_000, D, dtype=torch.float64)


class LinearVAE(VAE):
    """Ex. 1.3: q_φ(z | x) = N(ax + b, t² I) and p_θ(x | z) = N(cz + v, s² I). (The paper prints
    p_θ(x | z) as a density of z with mean cx + v.) Here p(x) and p(z | x) are also known."""

    def __init__(self, a=1.5, b=-0.2, t=0.7, c=0.6, v=0.1, s=0.8):  # arbitrary
        super().__init__(
            lambda x: torch.cat([a * x + b, torch.full_like(x, 2 * math.log(t))], dim=1),
            lambda z: c * z + v, s)
        self.a, self.b, self.t, self.c, self.v, self.s = a, b, t, c, v, s

    def log_p(self, x: Tensor) -> Tensor:
        """log p(x) = log N(x | v, (c² + s²) I)"""
        return Normal(self.v, math.hypot(self.c, self.s)).log_prob(x).sum(1)

    def gap(self, x: Tensor) -> Tensor:
        """KL(q_φ(z | x) ‖ p(z | x)), where p(z | x) = N(c (x − v) / (c² + s²), s² / (c² + s²) I) by
        Bayes' rule for linear Gaussians"""
        a, b, t, c, v, s = self.a, self.b, self.t, self.c, self.v, self.s
        posterior = Normal(c * (x - v) / (c**2 + s**2), s / math.hypot(c, s))
        return kl_divergence(Normal(a * x + b, t), posterior).sum(1)

    def elbos(self, x: Tensor) -> Tensor:
        """50,000 independent estimates of the ELBO of a single x."""
        terms = self.elbo(x.expand(50_000, D))
        return terms["reconstruction"] - terms["kl"]


def section_1_1() -> Iterator[tuple]:
    pi, mu, sigma = (torch.tensor(values).double()
                     for values in ((0.3, 0.7), (-2.0, 2.0), (0.2, 1.0)))  # as in Ex. 2.1
    mixture = GaussianMixture(pi, mu[:, None], sigma)
    k = mixture.p_k.sample((1_000_000,))
    x, mean = mixture.decode(k), pi @ mu
    variance = pi @ (sigma**2 + mu**2) - mean**2
    joint = pi * (-(-1.5 - mu)**2 / (2 * sigma**2)).exp() / sigma  # times √(2π), which cancels
    posterior = mixture.posterior(torch.tensor([[-1.5]], dtype=torch.float64))
    grid = torch.linspace(-10, 10, 200_001, dtype=torch.float64)
    best = torch.trapezoid((pi * Normal(mu, sigma).log_prob(grid[:, None]).exp()).amax(1), grid)
    yield "Ex. 1.2   Σ π_k μ_k vs. mean of x ~ p(x | k), k ~ π", mean, x
    yield "          Σ π_k (σ_k² + μ_k²) − mean² vs. variance of x", variance, (x - mean)**2
    yield ("          p(k = 1 | x = −1.5), by Bayes' rule vs. GaussianMixture.posterior",
           joint[0] / joint.sum(), posterior[0, 0])
    yield ("          ∫ max_k π_k p(x | k) dx vs. fraction of k = encode(x)", best,
           mixture.encode(x) == k)

    data()  # drawn once, here; everything below reuses it
    vae = LinearVAE()
    x = vae.sample(torch.randn(50_000, D)) + vae.s * torch.randn(50_000, D)
    yield ("Ex. 1.3   c² + s² vs. variance of x ~ p_θ(x | z), z ~ N(0, I)", vae.c**2 + vae.s**2,
           (x - vae.v)[:, 0]**2)


def matched(t: float, s: float, slope: float = 1.0) -> LinearVAE:
    """Ex. 1.4, 1.5: a = slope/σ, b = −μ/σ, c = σ, v = μ, any t and s; slope = 1 is best."""
    return LinearVAE(slope / SIGMA, -MU / SIGMA, t, SIGMA, MU, s)


def section_1_2() -> Iterator[tuple]:
    x, vae = data()[:1], LinearVAE()
    q = Normal(vae.a * x.expand(50_000, D) + vae.b, vae.t)
    z = q.sample()
    joint = Normal(0.0, 1.0).log_prob(z) + Normal(vae.decode(z), vae.s).log_prob(x)
    yield ("Thm 1.1   log p(x) − KL(q ‖ p(z | x)) vs. E_q log p(x, z)/q(z | x), Def. 1.3",
           vae.log_p(x) - vae.gap(x), (joint - q.log_prob(z)).sum(1))
    yield ("Thm 1.2   log p(x) − KL(q ‖ p(z | x)) vs. reconstruction − kl, by VAE.elbo",
           vae.log_p(x) - vae.gap(x), vae.elbos(x))

    for slope in (1.0, 0.8):
        vae = matched(0.1, 0.1 * SIGMA, slope)
        yield (f"Ex. 1.4   KL(q ‖ p(z | x)) vs. log p(x) − ELBO, t = 0.1, a = {slope}/σ",
               vae.gap(x), vae.log_p(x) - vae.elbos(x))
    yield ("          0 vs. KL(q ‖ p(z | x)), t = 0.0001, a = 1/σ", 0,
           matched(1e-4, 1e-4 * SIGMA).gap(x))

    log_2pi = math.log(2 * math.pi)
    c, v = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (SIGMA, MU))
    reconstruction = LinearVAE(1 / SIGMA, -MU / SIGMA, 1e-9, c, v, 0.1).elbo(x)["reconstruction"]
    derivatives = torch.stack(torch.autograd.grad(reconstruction.sum(), (c, v)))
    reconstruction = reconstruction.detach()
    yield ("Ex. 1.5   −(d/2) log 2π − d log s, for s = 0.1 vs. reconstruction, t → 0",
           -D / 2 * log_2pi - D * math.log(0.1), reconstruction)
    yield ("          0 vs. largest derivative of the reconstruction in c and v, at σ and μ", 0,
           derivatives.abs().max())
    yield ("          −½ log 2π − log s as printed, without d vs. reconstruction",
           -0.5 * log_2pi - math.log(0.1), reconstruction)

    # In Ex. 1.6, p(x) is the density of the data, N(μ, σ² I); the model's tends to it as s → 0.
    log_data = Normal(MU, SIGMA).log_prob(x).sum(1)
    yield ("Ex. 1.6   ½ (t²d − d + ‖(x−μ)/σ‖² − 2d log t), for t = 0.5 vs. kl",
           0.5 * (0.25 * D - D + ((x - MU) / SIGMA).square().sum() - 2 * D * math.log(0.5)),
           matched(0.5, 0.5).elbo(x)["kl"])
    yield ("          −(d/2) log 2π − d log s − σ²d/2s², t = 1, s = σ vs. reconstruction",
           -D / 2 * log_2pi - D * math.log(SIGMA) - D / 2,
           matched(1, SIGMA).elbo(x.expand(50_000, D))["reconstruction"])
    for t in (1.0, 0.5, 0.1):
        yield (f"          −t²d/2 vs. ELBO − log N(x | μ, σ² I), t = {t}, s = σt", -t**2 * D / 2,
               matched(t, t * SIGMA).elbos(x) - log_data)
    yield ("          −d/2, optimal as printed vs. ELBO − log N(x | μ, σ² I), t = 0.001", -D / 2,
           matched(1e-3, 1e-3 * SIGMA).elbos(x) - log_data)


def section_1_3() -> Iterator[tuple]:
    x, vae = data(), LinearVAE()
    mu, log_var = (torch.full((1_000_000, 1), value, requires_grad=True) for value in (0.7, -0.4))
    z = vae.reparameterize(mu, log_var)
    by_mu, by_log_var = torch.autograd.grad(z.square().sum(), (mu, log_var))
    yield "Ex. 1.7   2μ, for μ = 0.7 vs. derivative of E z² in μ, through z = μ + σε", 1.4, by_mu
    yield ("          σ², for log σ² = −0.4 vs. derivative of E z² in log σ²", math.exp(-0.4),
           by_log_var)

    z = vae.reparameterize(mu, log_var)
    log_q = Normal(mu, (0.5 * log_var).exp()).log_prob(z)
    (by_log_var,) = torch.autograd.grad(-log_q.sum(), log_var)
    yield "Ex. 1.8   ½ vs. derivative of E[−log q(z | x)] in log σ²", 0.5, by_log_var

    m, S = torch.randn(2, 3).double(), torch.randn(2, 3, 3).double()
    S = S @ S.mT + torch.eye(3)
    difference, inverse = m[1] - m[0], S[1].inverse()
    yield ("Thm 1.3   (1.25), d = 3, full covariances vs. KL by torch.distributions",
           0.5 * ((inverse @ S[0]).trace() - 3 + difference @ inverse @ difference
                  + (S[1].det() / S[0].det()).log()),
           kl_divergence(MultivariateNormal(m[0], S[0]), MultivariateNormal(m[1], S[1])))
    mu, _ = vae.encode(x[:1])
    kl = kl_divergence(Normal(mu, vae.t), Normal(0.0, 1.0)).sum()
    printed = 0.5 * (vae.t**2 * D - D + mu.square().sum() - 2 * math.log(vae.t))
    yield "(1.26)    KL by torch.distributions vs. kl of VAE.elbo", kl, vae.elbo(x[:1])["kl"]
    yield "          (1.34) or (1.35) as printed, 2 log σ_φ for 2d log σ_φ vs. KL", printed, kl

    exact = vae.log_p(x) - vae.gap(x)
    yield ("Thm 1.4   mean of log p(x) − KL(q ‖ p(z | x)) vs. −d · VAE.loss, 50,000 x", exact,
           -D * vae.loss(x))
    terms = vae.elbo(x)
    yield ("          (1.35) as printed, with + before the KL vs. the same mean",
           terms["reconstruction"] + terms["kl"], exact)


EXAMPLES = section_1_1, section_1_2, section_1_3


def main():
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's stdout has no such method
        sys.stdout.reconfigure(encoding="utf-8")
    torch.manual_seed(0)
    print("     formula    computed   formula vs. how it is computed (≠: as printed, but wrong; "
          "sides with random draws agree to within sampling error)")
    for section in EXAMPLES:
        for what, *sides in section():
            formula, computed = (torch.as_tensor(x, dtype=torch.float64).mean() for x in sides)
            print(f"{formula:12.5f}{computed:12.5f} {'≠' if 'as printed' in what else ' '} {what}")


if __name__ == "__main__":
    main()
