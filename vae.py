# SPDX-License-Identifier: MIT
"""Section 1 of the tutorial: the variational auto-encoder (VAE).

All numbers (§, theorem, example, equation) are those of version 3, January 2025, of Stanley Chan,
"Tutorial on Diffusion Models for Imaging and Vision" (arXiv 2403.18103), and what follows stands in
the paper's order, under its titles.

Building Blocks (§1.1). An encoder turns the image x into a latent z, a decoder turns z back into
an image, and both are distributions:

    x ──> q_φ(z | x) ──> z ──> p_θ(x | z) ──> x̂            p(z) = N(0, I)

`GaussianMixture` is Ex. 1.2, where p(z | x) is known exactly; `VAE` learns both from images.
`python vae.py` computes the section's examples and theorems, each beside its formula.
"""
import math
import sys
import warnings
from collections.abc import Callable

if __name__ == "__main__":  # torch can do without NumPy, and so can this file
    warnings.filterwarnings("ignore", "Failed to initialize NumPy")

import torch
from torch import Tensor, nn
from torch.distributions import Categorical, MultivariateNormal, Normal, kl_divergence


class GaussianMixture:
    """Ex. 1.2, (1.1): the latent z = k says which Gaussian x comes from.

    p(k) = π_k, p(x | k) = N(x | μ_k, σ_k² I), p(x) = Σ_k π_k N(x | μ_k, σ_k² I).

    Args:
        weights: π, (K,), not negative; scaled to sum 1.
        means: μ, (K, d), floats.
        stds: σ, (K,), positive.
    """

    def __init__(self, weights: Tensor, means: Tensor, stds: Tensor):
        if means.ndim != 2 or not weights.shape == means.shape[:1] == stds.shape:
            raise ValueError("weights, means and stds must be (K,), (K, d) and (K,), got "
                             f"{tuple(weights.shape)}, {tuple(means.shape)}, {tuple(stds.shape)}")
        roots = stds[:, None, None] * torch.eye(means.shape[1])  # of the covariances σ_k² I
        self.p_k = Categorical(weights)
        self.p_x_given_k = MultivariateNormal(means, scale_tril=roots)

    def log_joint(self, x: Tensor) -> Tensor:
        """log p(x, k) = log π_k + log N(x | μ_k, σ_k² I) in nats: (n, d) -> (n, K)."""
        return self.p_k.logits + self.p_x_given_k.log_prob(x.unsqueeze(-2))

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x) = log Σ_k π_k N(x | μ_k, σ_k² I) in nats: (n,)."""
        return self.log_joint(x).logsumexp(-1)

    def posterior(self, x: Tensor) -> Tensor:
        """p(k | x) = π_k N(x | μ_k, σ_k² I) / p(x), by Bayes' rule: (n, K), rows sum to 1."""
        return self.log_joint(x).softmax(-1)

    def encode(self, x: Tensor) -> Tensor:
        """The encoder: arg max_k p(k | x), the most probable Gaussian, (n,) integers."""
        return self.posterior(x).argmax(-1)

    def decode(self, k: Tensor) -> Tensor:
        """The decoder: a draw of x ~ p(x | k) = N(μ_k, σ_k² I) for each k: (n,) -> (n, d)."""
        return torch.normal(self.p_x_given_k.mean[k], self.p_x_given_k.stddev[k])


def refuse_bytes(x: Tensor):
    if not x.is_floating_point():
        raise ValueError(f"x must be floats, images in [-1, 1], got {x.dtype}")


class VAE(nn.Module):
    """The variational auto-encoder of §1 over any two networks; `conv_networks` makes a pair.

        q_φ(z | x) = N(z | μ_φ(x), diag σ_φ²(x))    (1.2)   (μ, σ²) = Encoder_φ(x)
        p_θ(x | z) = N(x | f_θ(z), σ_dec² I)        (1.3)   f_θ(z) = Decoder_θ(z)
        p(z)       = N(z | 0, I)

    Args:
        encoder: x (B, …) -> (B, 2d), μ beside log σ², which may have either sign.
        decoder: z (B, d) -> x's shape.
        decoder_std: σ_dec, on the scale of pixels in [-1, 1], either a number or "learned", which
            makes it one more parameter ((1.3) allows both). A small σ_dec gives sharp
            reconstructions, but encoded z that are not distributed as N(0, I), and so bad samples.
            A large one gives blurred reconstructions and better samples.

    Images are float tensors (B, C, H, W) in [-1, 1]. Bad arguments raise ValueError.
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
        """q_φ(z | x) = N(z | μ_φ(x), diag σ_φ²(x))    ((1.2)): (mu, log_var), (B, d) each."""
        refuse_bytes(x)
        both = self.encoder(x).to(x.dtype)  # float32 under autocast, too
        if both.shape[1] % 2:
            raise ValueError(f"the encoder must make (B, 2d) of x, got {tuple(both.shape)}")
        return both.chunk(2, dim=1)

    def decode(self, z: Tensor) -> Tensor:
        """f_θ(z), the mean of p_θ(x | z) = N(x | f_θ(z), σ_dec² I)    ((1.3)): (B, d) -> (B, …)."""
        return self.decoder(z).to(z.dtype)

    @property
    def decoder_std(self) -> float | Tensor:
        """σ_dec: the given number or, if learned, a tensor ()."""
        return math.e ** self.log_decoder_std  # exp, of a float and of a tensor

    # -------------------------------------------------- §1.2 Evidence Lower Bound

    def elbo(self, x: Tensor) -> dict[str, Tensor]:
        """ELBO(x) = E_{q_φ(z | x)} log [p(x, z) / q_φ(z | x)]                  (Def. 1.3, (1.4))

                = log p(x) − KL(q_φ(z | x) ‖ p(z | x))  ≤  log p(x)          (Thm 1.1, (1.6))
                = reconstruction − kl                                        (Thm 1.2, (1.10))

        The two terms, each (B,), in nats per image with D pixels:

            reconstruction = E_{q_φ(z | x)} log p_θ(x | z)
                           = E [−‖x − f_θ(z)‖² / 2σ_dec² − (D/2) log(2π σ_dec²)]      (1.29), (1.30)
            kl             = KL(q_φ(z | x) ‖ p(z)) = ½ Σ_i (σ_i² − 1 + μ_i² − log σ_i²)

        The expectation is taken from one sample of z, M = 1 in (1.31). The KL is that of Thm 1.3
        for two diagonal covariances: the encoder has a σ_i for each coordinate of z, where (1.26)
        has one σ_φ for all. On [-1, 1]^D this bounds a log-density, which may be above 0.
        """
        mu, log_var = self.encode(x)
        x_hat = self.decode(self.reparameterize(mu, log_var))
        if x_hat.shape != x.shape:
            raise ValueError(f"the decoder made {tuple(x_hat.shape)} of x {tuple(x.shape)}")
        reconstruction = (-(x - x_hat).square() / (2 * self.decoder_std**2) - self.log_decoder_std
                          - 0.5 * math.log(2 * math.pi)).flatten(1).sum(1)
        kl = 0.5 * (log_var.exp() - 1 + mu.square() - log_var).sum(1)
        return {"reconstruction": reconstruction, "kl": kl}

    def bits_per_dim(self, x: Tensor) -> Tensor:
        """A bound on the bits for each pixel of x, as an image of 8-bit pixels: (B,). Not in the
        paper.

            −log P(x)  ≤  −E log [p(x + u) (2/255)^D]  ≤  −E ELBO(x + u) − D log (2/255)

        u is uniform over a pixel's bin, 2/255 wide on [-1, 1] ("A note on the evaluation of
        generative models", arXiv 1511.01844). One u is drawn for each x.
        """
        refuse_bytes(x)
        u = (torch.rand_like(x) - 0.5) * (2 / 255)
        terms = self.elbo(x + u)
        elbo = terms["reconstruction"] - terms["kl"]
        return (-elbo / math.prod(x.shape[1:]) - math.log(2 / 255)) / math.log(2)

    # -------------------------------------------------- §1.3 Optimization in VAE

    def reparameterize(self, mu: Tensor, log_var: Tensor) -> Tensor:
        """z = μ + σ ⊙ ε, ε ~ N(0, I), (B, d)    ((1.16), Ex. 1.7)

        z ~ q_φ(z | x), as a function of ε and φ: so ∇_φ passes through the expectation, too.
        """
        return mu + (0.5 * log_var).exp() * torch.randn_like(mu)

    def loss(self, x: Tensor) -> Tensor:
        """−ELBO / D    (Thm 1.4): a scalar, the mean over the batch, in nats for each pixel.

        Its minimum is the maximum of (1.35), with the − of (1.32) before the KL, where (1.35)
        prints +.
        """
        terms = self.elbo(x)
        return (terms["kl"] - terms["reconstruction"]).mean() / math.prod(x.shape[1:])

    forward = loss  # a module is called through forward, for example by DistributedDataParallel

    @torch.no_grad()
    def sample(self, z: Tensor) -> Tensor:
        """x̂ = f_θ(z), for z ~ N(0, I)    (Fig. 1.7): new images, (B, d) -> (B, …).

        This is the mean of p_θ(x | z). A draw of x would add noise of standard deviation σ_dec.
        """
        return self.decode(z)


# -------------------------------------------------- the networks: the paper leaves them open


def conv_networks(image_shape: tuple[int, int, int], latent_dim: int = 8,
                  channels: int = 16) -> tuple[nn.Module, nn.Module]:
    """Encoder_φ and Decoder_θ for images (C, H, W), H and W at least 8: convolutions that halve the
    image twice, and double it twice, `channels` wide at half resolution and twice that at a
    quarter. Raises ValueError for a smaller image."""
    C, H, W = image_shape
    if min(H, W) < 8:
        raise ValueError(f"H and W must be at least 8, got {tuple(image_shape)}")
    c, h, w = channels, math.ceil(H / 4), math.ceil(W / 4)

    def activation(c: int) -> nn.Module:
        # Without GroupNorm the first steps of training can end in q_φ(z | x) = p(z) and one average
        # image ("posterior collapse").
        return nn.Sequential(nn.GroupNorm(math.gcd(8, c), c), nn.SiLU())

    encoder = nn.Sequential(
        nn.Conv2d(C, c, 3, stride=2, padding=1), activation(c),
        nn.Conv2d(c, 2 * c, 3, stride=2, padding=1), activation(2 * c),
        nn.Conv2d(2 * c, 2 * c, 3, padding=1), activation(2 * c),
        nn.Flatten(), nn.Linear(2 * c * h * w, 16 * c), nn.SiLU(),
        nn.Linear(16 * c, 2 * latent_dim))
    decoder = nn.Sequential(
        nn.Linear(latent_dim, 16 * c), nn.SiLU(), nn.Linear(16 * c, 2 * c * h * w),
        nn.Unflatten(1, (2 * c, h, w)), activation(2 * c),
        nn.Conv2d(2 * c, 2 * c, 3, padding=1), activation(2 * c),
        nn.Conv2d(2 * c, 4 * c, 3, padding=1), nn.PixelShuffle(2), activation(c),
        nn.Conv2d(c, 4 * C, 3, padding=1), nn.PixelShuffle(2), nn.Tanh(),
        nn.ZeroPad2d((0, W - 4 * w, 0, H - 4 * h)))  # by less than 0: cuts 4w and 4h to W and H
    return encoder, decoder


# -------------------------------------------------- worked examples: python vae.py


def linear_vae(a: float, b: float, t: float, c: float | Tensor, v: float | Tensor,
               s: float) -> VAE:
    """Ex. 1.3: q_φ(z | x) = N(ax + b, t² I) and p_θ(x | z) = N(cz + v, s² I).

    (The print has p_θ(x | z) as a density of z, with mean cx + v.)
    """
    return VAE(lambda x: torch.cat([a * x + b, torch.full_like(x, 2 * math.log(t))], dim=1),
               lambda z: c * z + v, s)


def examples() -> list[tuple[str, float, float, float | None]]:
    """Rows of ("formula | computed", formula, computed, tolerance). ELBOs and KLs are in nats.

    Where a side is a mean of random draws the tolerance is 5 standard errors. A tolerance of None
    marks a formula that is printed in the paper and that the computation does not confirm.
    """
    rows = []

    def row(what: str, formula: float | Tensor, computed: Tensor, differ: bool = False):
        formula, computed = (torch.as_tensor(side, dtype=torch.float64).detach()
                             for side in (formula, computed))
        variance = sum(x.var() / x.numel() for x in (formula, computed) if x.numel() > 1)
        tolerance = max(5 * float(variance) ** 0.5, 1e-6)
        rows.append((what, formula.mean().item(), computed.mean().item(),
                     None if differ else tolerance))

    pi, mu, sigma = (torch.tensor(values).double()
                     for values in ((0.3, 0.7), (-2.0, 2.0), (0.2, 1.0)))  # as in Ex. 2.1
    mixture = GaussianMixture(pi, mu[:, None], sigma)
    k = mixture.p_k.sample((1_000_000,))
    x, mean = mixture.decode(k), pi @ mu
    row("Ex. 1.2   Σ π_k μ_k | mean of x ~ p(x | k), k ~ π", mean, x)
    row("          Σ π_k (σ_k² + μ_k²) − mean² | variance of x", pi @ (sigma**2 + mu**2) - mean**2,
        (x - mean)**2)
    at = torch.tensor([[-1.5]], dtype=torch.float64)
    joint = pi * (-(-1.5 - mu)**2 / (2 * sigma**2)).exp() / sigma
    row("          p(k = 1 | x = −1.5), by Bayes' rule | GaussianMixture.posterior",
        joint[0] / joint.sum(), mixture.posterior(at)[0, 0])
    grid = torch.linspace(-10, 10, 200_001, dtype=torch.float64)
    row("          ∫ max_k π_k p(x | k) dx | share of k = encode(x)", torch.trapezoid(
        (pi * Normal(mu, sigma).log_prob(grid[:, None]).exp()).amax(1), grid),
        mixture.encode(x) == k)

    # x ~ N(μ, σ² I) in d = 64 dimensions. With linear networks p(x) and p(z | x) are known:
    #     p(x) = N(v, (c² + s²) I)        p(z | x) = N(c (x − v) / (c² + s²), s² / (c² + s²) I)
    d, mu, sigma = 64, 0.3, 0.5
    x_many = mu + sigma * torch.randn(50_000, d, dtype=torch.float64)
    x = x_many[:1]

    def elbo(vae: VAE, x: Tensor = x.expand(50_000, d)) -> Tensor:
        terms = vae.elbo(x)
        return terms["reconstruction"] - terms["kl"]

    def log_p(x: Tensor, c: float, v: float, s: float) -> Tensor:
        return Normal(v, math.hypot(c, s)).log_prob(x).sum(1)

    def gap(x: Tensor, a: float, b: float, t: float, c: float, v: float, s: float) -> Tensor:
        """KL(q_φ(z | x) ‖ p(z | x))."""
        posterior = Normal(c * (x - v) / (c**2 + s**2), s / math.hypot(c, s))
        return kl_divergence(Normal(a * x + b, t), posterior).sum(1)

    a, b, t, c, v, s = numbers = 1.5, -0.2, 0.7, 0.6, 0.1, 0.8
    vae = linear_vae(*numbers)
    row("Ex. 1.3   c² + s² | variance of x ~ p_θ(x | z), z ~ N(0, I)", c**2 + s**2,
        (vae.sample(torch.randn(50_000, d)) + s * torch.randn(50_000, d) - v)[:, 0]**2)
    q = Normal(a * x.expand(50_000, d) + b, t)
    z = q.sample()
    ratio = (Normal(0.0, 1.0).log_prob(z) + Normal(vae.decode(z), s).log_prob(x)
             - q.log_prob(z)).sum(1)
    row("Thm 1.1   log p(x) − KL(q ‖ p(z | x)) | E_q log p(x, z)/q(z | x), Def. 1.3",
        log_p(x, c, v, s) - gap(x, *numbers), ratio)
    row("Thm 1.2   log p(x) − KL(q ‖ p(z | x)) | reconstruction − kl, by VAE.elbo",
        log_p(x, c, v, s) - gap(x, *numbers), elbo(vae))

    # The encoder and the decoder of Ex. 1.4 and 1.5 apart from their variances t² and s².
    def matched(t: float, s: float, share: float = 1.0) -> tuple[float, ...]:
        return share / sigma, -mu / sigma, t, sigma, mu, s

    for share in (1.0, 0.8):
        numbers_ = matched(0.1, 0.1 * sigma, share)
        row(f"Ex. 1.4   KL(q ‖ p(z | x)) | log p(x) − ELBO, t = 0.1, a = {share}/σ",
            gap(x, *numbers_), log_p(x, *numbers_[3:]) - elbo(linear_vae(*numbers_)))
    row("          0 | KL(q ‖ p(z | x)), t = 0.0001, a = 1/σ", 0,
        gap(x, *matched(1e-4, 1e-4 * sigma)))

    c, v = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (sigma, mu))
    reconstruction = linear_vae(1 / sigma, -mu / sigma, 1e-9, c, v, 0.1).elbo(x)["reconstruction"]
    row("Ex. 1.5   −(d/2) log 2π − d log s, for s = 0.1 | reconstruction, t → 0",
        -d / 2 * math.log(2 * math.pi) - d * math.log(0.1), reconstruction)
    row("          0 | its largest slope in c and v, at c = σ, v = μ", 0,
        torch.stack(torch.autograd.grad(reconstruction.sum(), (c, v))).abs().max())
    row("          −½ log 2π − log s, as printed, without d | reconstruction",
        -0.5 * math.log(2 * math.pi) - math.log(0.1), reconstruction, differ=True)

    # Here p(x) is the data's, N(μ, σ² I), which the model's is only in the limit s → 0.
    log_data = log_p(x, 0, mu, sigma)
    row("Ex. 1.6   ½ (t²d − d + ‖(x−μ)/σ‖² − 2d log t), for t = 0.5 | kl", 0.5 * (
        0.25 * d - d + ((x - mu) / sigma).square().sum() - 2 * d * math.log(0.5)),
        linear_vae(*matched(0.5, 0.5)).elbo(x)["kl"])
    row("          −(d/2) log 2π − d log s − σ²d/2s², t = 1, s = σ | reconstruction",
        -d / 2 * math.log(2 * math.pi) - d * math.log(sigma) - d / 2,
        linear_vae(*matched(1, sigma)).elbo(x.expand(50_000, d))["reconstruction"])
    for t in (1.0, 0.5, 0.1):
        row(f"          −t²d/2 | ELBO − log N(x | μ, σ² I), for t = {t}, s = σt", -t**2 * d / 2,
            elbo(linear_vae(*matched(t, t * sigma))) - log_data)
    row("          −d/2, the best by the print | ELBO − log N(x | μ, σ² I), t = 0.001", -d / 2,
        elbo(linear_vae(*matched(1e-3, 1e-3 * sigma))) - log_data, differ=True)

    mean, log_var = (torch.full((1_000_000, 1), value, requires_grad=True) for value in (0.7, -0.4))
    vae.reparameterize(mean, log_var).square().sum().backward()
    row("Ex. 1.7   2μ, for μ = 0.7 | slope of E z² in μ, through z = μ + σε", 1.4,
        mean.grad.flatten())
    row("          σ², for log σ² = −0.4 | slope of E z² in log σ²", math.exp(-0.4),
        log_var.grad.flatten())
    log_var.grad = None
    z = vae.reparameterize(mean, log_var)
    Normal(mean, (0.5 * log_var).exp()).log_prob(z).sum().neg().backward()
    row("Ex. 1.8   ½ | slope of E[−log q(z | x)] in log σ²", 0.5, log_var.grad.flatten())

    m, S = torch.randn(2, 3).double(), torch.randn(2, 3, 3).double()
    S = S @ S.mT + torch.eye(3)
    difference, inverse = m[1] - m[0], S[1].inverse()
    row("Thm 1.3   (1.25), d = 3, full covariances | KL by torch.distributions", 0.5 * (
        (inverse @ S[0]).trace() - 3 + difference @ inverse @ difference
        + (S[1].det() / S[0].det()).log()),
        kl_divergence(MultivariateNormal(m[0], S[0]), MultivariateNormal(m[1], S[1])))
    mean, log_var = vae.encode(x)
    kl = kl_divergence(Normal(mean, (0.5 * log_var).exp()), Normal(0.0, 1.0)).sum()
    row("(1.26)    KL by torch.distributions | kl of VAE.elbo", kl, vae.elbo(x)["kl"])
    row("          with 2 log σ_φ for 2d log σ_φ: one of (1.34), (1.35) | KL", 0.5 * (
        0.49 * d - d + mean.square().sum() - 2 * math.log(0.7)), kl, differ=True)
    exact = log_p(x_many, *numbers[3:]) - gap(x_many, *numbers)
    row("Thm 1.4   mean of log p(x) − KL(q ‖ p(z | x)) | −d · VAE.loss, 50,000 x", exact,
        -d * vae.loss(x_many))
    terms = vae.elbo(x_many)
    row("          (1.35) as printed, with + before the KL | the same mean",
        terms["reconstruction"] + terms["kl"], exact, differ=True)
    return rows


if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="utf-8")  # whatever the terminal's, or a file's, would be
    torch.manual_seed(0)
    print(f"{'formula | what computes it':76}{'formula':>12}{'computed':>12}{'tolerance':>11}")
    for what, formula, computed, tolerance in examples():
        print(f"{what:76}{formula:12.5f}{computed:12.5f}"
              + (f"{tolerance:11.0e}" if tolerance else f"{'differ':>11}"))
