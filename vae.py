# SPDX-License-Identifier: MIT
"""Section 1 of the tutorial: the variational auto-encoder (VAE).

All numbers (§, theorem, example, equation) are those of version 3, January 2025, of Stanley Chan,
"Tutorial on Diffusion Models for Imaging and Vision" (arXiv 2403.18103).

Building Blocks (§1.1). An encoder turns the image x into a latent z, a decoder turns z back into
an image, and both are distributions:

    x ──> q_φ(z | x) ──> z ──> p_θ(x | z) ──> x̂            p(z) = N(0, I)

`GaussianMixture` is Ex. 1.2, where p(z | x) is known exactly; `VAE` learns both from images.
`python vae.py` computes the section's examples and theorems, each beside its formula.
"""
import math
import warnings

if __name__ == "__main__":  # torch can do without NumPy, and so can this file
    warnings.filterwarnings("ignore", "Failed to initialize NumPy")

import torch
from torch import Generator, Tensor, nn
from torch.distributions import MultivariateNormal, Normal, kl_divergence


class GaussianMixture:
    """Ex. 1.2, (1.1): the latent z = k says which Gaussian x comes from.

    p(k) = π_k, p(x | k) = N(x | μ_k, σ_k² I), p(x) = Σ_k π_k N(x | μ_k, σ_k² I).

    Args:
        weights: π, (K,), positive; scaled to sum 1.
        means: μ, (K,) for numbers x, or (K, d) for vectors x.
        stds: σ, (K,), positive.
    """

    def __init__(self, weights, means, stds):
        self.weights, self.means, self.stds = (
            1.0 * torch.as_tensor(values) for values in (weights, means, stds))
        K = self.weights.shape
        if len(K) != 1 or self.means.shape[:1] != K or self.stds.shape != K:
            raise ValueError(f"weights, means and stds must have one entry for each Gaussian, got "
                             f"{tuple(K)}, {tuple(self.means.shape)}, {tuple(self.stds.shape)}")
        if not ((self.weights > 0).all() and (self.stds > 0).all()):
            raise ValueError(f"weights and stds must be positive, got {weights} and {stds}")
        self.weights = self.weights / self.weights.sum()

    def sample(self, n: int, generator: Generator | None = None) -> Tensor:
        """k ~ π, then x ~ p(x | k): n independent x, (n,) or (n, d)."""
        k = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        return self.decode(k, generator)

    def _log_joint(self, x: Tensor) -> Tensor:
        """log π_k + log N(x | μ_k, σ_k² I): (n, K)."""
        vectors = self.means.view(len(self.weights), -1)  # numbers are vectors with d = 1
        density = Normal(vectors, self.stds[:, None]).log_prob(x.reshape(len(x), 1, -1))
        return self.weights.log() + density.sum(-1)

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x) = log Σ_k π_k N(x | μ_k, σ_k² I) in nats: (n,)."""
        return self._log_joint(x).logsumexp(-1)

    def posterior(self, x: Tensor) -> Tensor:
        """p(k | x) = π_k N(x | μ_k, σ_k² I) / p(x), by Bayes' rule: (n, K), rows sum to 1."""
        return self._log_joint(x).softmax(-1)

    def encode(self, x: Tensor) -> Tensor:
        """The encoder: arg max_k p(k | x), the most probable Gaussian, (n,) integers."""
        return self.posterior(x).argmax(-1)

    def decode(self, k: Tensor, generator: Generator | None = None) -> Tensor:
        """The decoder: a draw of x ~ p(x | k) = N(μ_k, σ_k² I) for each k, (n,) or (n, d)."""
        mean = self.means[k]
        noise = torch.randn(mean.shape, generator=generator, dtype=mean.dtype)
        return mean + self.stds[k].view(-1, *[1] * (mean.ndim - 1)) * noise


class VAE(nn.Module):
    """The variational auto-encoder of §1.1.

        q_φ(z | x) = N(z | μ_φ(x), diag σ_φ²(x))    (1.2)   (μ, log σ²) = Encoder_φ(x)
        p_θ(x | z) = N(x | f_θ(z), σ_dec² I)        (1.3)   f_θ(z) = Decoder_θ(z)
        p(z)       = N(z | 0, I)

    Args:
        image_shape: (C, H, W) with H and W at least 8.
        latent_dim: d, the length of z.
        channels: width at half resolution; twice that at quarter resolution.
        decoder_std: σ_dec, on the scale of pixels in [-1, 1], either a number or "learned", which
            makes it one more parameter ((1.3) allows both). A small σ_dec gives sharp
            reconstructions, but encoded z that are not distributed as N(0, I), and so bad samples.
            A large one gives blurred reconstructions and better samples.

    Images are float tensors (B, C, H, W) in [-1, 1]. Bad arguments raise ValueError.
    """

    def __init__(self, image_shape: tuple[int, int, int] = (1, 28, 28), latent_dim: int = 8,
                 channels: int = 16, decoder_std: float | str = 0.6):
        super().__init__()
        if (len(image_shape) != 3 or not all(isinstance(n, int) for n in image_shape)
                or image_shape[0] < 1 or min(image_shape[1:]) < 8):
            raise ValueError(f"image_shape must be (C, H, W) with H and W at least 8, "
                             f"got {image_shape}")
        for name, value in (("latent_dim", latent_dim), ("channels", channels)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number from 1, got {value}")
        if decoder_std != "learned" and (isinstance(decoder_std, str)
                                         or not 0 < decoder_std < math.inf):
            raise ValueError(f'decoder_std must be positive and finite, or "learned", '
                             f"got {decoder_std!r}")
        C, H, W = self.image_shape = tuple(image_shape)
        self.latent_dim = latent_dim
        self.log_decoder_std = (nn.Parameter(torch.zeros(())) if decoder_std == "learned"
                                else math.log(decoder_std))

        # The paper leaves the networks open. Here they halve the image twice, and double it twice.
        # Without GroupNorm the first steps of training can end in q_φ(z | x) = p(z) and one average
        # image ("posterior collapse").
        def activation(c: int) -> nn.Module:
            return nn.Sequential(nn.GroupNorm(math.gcd(8, c), c), nn.SiLU())

        c, h, w = channels, math.ceil(H / 4), math.ceil(W / 4)
        self.encoder = nn.Sequential(
            nn.Conv2d(C, c, 3, stride=2, padding=1), activation(c),
            nn.Conv2d(c, 2 * c, 3, stride=2, padding=1), activation(2 * c),
            nn.Conv2d(2 * c, 2 * c, 3, padding=1), activation(2 * c),
            nn.Flatten(), nn.Linear(2 * c * h * w, 16 * c), nn.SiLU(),
            nn.Linear(16 * c, 2 * latent_dim))
        self.decoder = nn.Sequential(
            nn.Linear(latent_dim, 16 * c), nn.SiLU(), nn.Linear(16 * c, 2 * c * h * w),
            nn.Unflatten(1, (2 * c, h, w)), activation(2 * c),
            nn.Conv2d(2 * c, 2 * c, 3, padding=1), activation(2 * c),
            nn.Conv2d(2 * c, 4 * c, 3, padding=1), nn.PixelShuffle(2), activation(c),
            nn.Conv2d(c, 4 * C, 3, padding=1), nn.PixelShuffle(2), nn.Tanh())

    @property
    def decoder_std(self) -> float | Tensor:
        """σ_dec: the given number or, if learned, a tensor ()."""
        return math.e ** self.log_decoder_std

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """q_φ(z | x) = N(z | μ_φ(x), diag σ_φ²(x)) (§1.1, (1.2)): (mu, log_var), (B, d) each."""
        if x.shape[1:] != self.image_shape or not x.is_floating_point():
            raise ValueError(f"expected float images (B, {', '.join(map(str, self.image_shape))}), "
                             f"got {x.dtype} {tuple(x.shape)}")
        return self.encoder(x).to(x.dtype).chunk(2, dim=1)

    def reparameterize(self, mu: Tensor, log_var: Tensor) -> Tensor:
        """z = μ + σ ⊙ ε with ε ~ N(0, I), (B, d) (§1.3, (1.16) and Ex. 1.7).

        z ~ q_φ(z | x), as a function of ε and φ: so ∇_φ passes through the expectation, too.
        """
        return mu + (0.5 * log_var).exp() * torch.randn_like(mu)

    def decode(self, z: Tensor) -> Tensor:
        """f_θ(z), the mean of p_θ(x | z) (§1.1, (1.3)): (B, d) -> (B, C, H, W) in [-1, 1]."""
        if z.shape[1:] != (self.latent_dim,) or not z.is_floating_point():
            raise ValueError(f"expected float z (B, {self.latent_dim}), "
                             f"got {z.dtype} {tuple(z.shape)}")
        _, H, W = self.image_shape
        return self.decoder(z)[:, :, :H, :W].to(z.dtype)  # 4 ⌈H/4⌉ may be more than H

    def elbo(self, x: Tensor) -> dict[str, Tensor]:
        """ELBO(x) = E_{q_φ(z | x)} log [p(x, z) / q_φ(z | x)]            (§1.2, Def. 1.3, (1.4))

                = log p(x) − KL(q_φ(z | x) ‖ p(z | x))  ≤  log p(x)    (Thm 1.1, (1.6))
                = reconstruction − kl                                  (Thm 1.2, (1.10))

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
        reconstruction = (-(x - x_hat).square() / (2 * self.decoder_std**2) - self.log_decoder_std
                          - 0.5 * math.log(2 * math.pi)).flatten(1).sum(1)
        kl = 0.5 * (log_var.exp() - 1 + mu.square() - log_var).sum(1)
        return {"reconstruction": reconstruction, "kl": kl}

    def loss(self, x: Tensor) -> Tensor:
        """−ELBO / D (§1.3, Thm 1.4): a scalar, the mean over the batch, in nats for each pixel.

        The maximum of (1.35) is the minimum of this. (1.35) prints + before the KL; (1.32) has −.
        """
        terms = self.elbo(x)
        return (terms["kl"] - terms["reconstruction"]).mean() / x[0].numel()

    forward = loss  # a module is called through forward, for example by DistributedDataParallel

    def bits_per_dim(self, x: Tensor, terms: dict[str, Tensor] | None = None) -> Tensor:
        """−ELBO / (D ln 2) of x as 8-bit pixels: (B,).

        The ELBO bounds a density; over a pixel's bin, 2/255 wide, that is a probability of
        2/255 times as much, if σ_dec is well above 2/255.
        terms: what `elbo` gave for x; computed here where it is missing.
        """
        terms = terms or self.elbo(x)
        elbo = terms["reconstruction"] - terms["kl"]
        return (-elbo / x[0].numel() - math.log(2 / 255)) / math.log(2)

    @torch.no_grad()
    def sample(self, n: int, generator: Generator | None = None) -> Tensor:
        """x̂ = f_θ(z) with z ~ N(0, I): n new images (n, C, H, W) in [-1, 1].

        §1.3, Fig. 1.7: the mean of p_θ(x | z). A draw of x would add noise of standard deviation
        σ_dec.
        generator: on the model's device.
        """
        weight = next(self.parameters())
        z = torch.randn(n, self.latent_dim, generator=generator, dtype=weight.dtype,
                        device=weight.device)
        return self.decode(z)


# ------------------------------------------------------------- worked examples: python vae.py


class LinearVAE(VAE):
    """Ex. 1.3: q_φ(z | x) = N(ax + b, t² I) and p_θ(x | z) = N(cz + v, s² I), d = 64 numbers each.

    (The print has p_θ(x | z) as a density of z, with mean cx + v.) With p(z) = N(0, I) this makes

        p(x)     = N(v, (c² + s²) I)
        p(z | x) = N(c (x − v) / (c² + s²), s² / (c² + s²) I)
    """

    def __init__(self, a: float, b: float, t: float, c: float, v: float, s: float):
        super().__init__((1, 8, 8), latent_dim=64, decoder_std=s)
        self.t, self.s = t, s
        self.a, self.b, self.c, self.v = (
            nn.Parameter(torch.tensor(value, dtype=torch.float64)) for value in (a, b, c, v))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mu = self.a * x.flatten(1) + self.b
        return mu, torch.full_like(mu, 2 * math.log(self.t))

    def decode(self, z: Tensor) -> Tensor:
        return (self.c * z + self.v).view(-1, 1, 8, 8)

    def gap(self, x: Tensor) -> Tensor:
        """KL(q_φ(z | x) ‖ p(z | x)): (B,)."""
        total = self.c**2 + self.s**2
        posterior = Normal(self.c * (x.flatten(1) - self.v) / total, self.s / total.sqrt())
        return kl_divergence(Normal(self.encode(x)[0], self.t), posterior).sum(1)

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x): (B,)."""
        return Normal(self.v, (self.c**2 + self.s**2).sqrt()).log_prob(x.flatten(1)).sum(1)


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
    mixture = GaussianMixture(pi, mu, sigma)
    x, mean = mixture.sample(1_000_000), pi @ mu
    row("Ex. 1.2   Σ π_k μ_k | mean of x ~ p(x | k), k ~ π", mean, x)
    row("          Σ π_k (σ_k² + μ_k²) − mean² | variance of x", pi @ (sigma**2 + mu**2) - mean**2,
        (x - mean)**2)
    at = torch.tensor([-1.5], dtype=torch.float64)
    joint = pi * (-(at - mu)**2 / (2 * sigma**2)).exp() / sigma
    row("          p(k = 1 | x = −1.5), by Bayes' rule | GaussianMixture.posterior",
        joint[0] / joint.sum(), mixture.posterior(at)[0, 0])
    grid = torch.linspace(-10, 10, 200_001, dtype=torch.float64)
    k = torch.multinomial(pi, 1_000_000, replacement=True)
    row("          ∫ max_k π_k p(x | k) dx | share of encode(decode(k)) = k", torch.trapezoid(
        (pi * Normal(mu, sigma).log_prob(grid[:, None]).exp()).amax(1), grid),
        mixture.encode(mixture.decode(k)) == k)

    # x ~ N(μ, σ² I), and the encoder and decoder of Ex. 1.4 and 1.5 apart from their variances.
    # The model's p(x) is N(μ, (σ² + s²) I), the data's density only in the limit s → 0.
    d, mu, sigma = 64, 0.3, 0.5
    x_many = mu + sigma * torch.randn(50_000, 1, 8, 8, dtype=torch.float64)
    x = x_many[:1]
    log_data = Normal(mu, sigma).log_prob(x).sum()

    def matched(t: float, s: float) -> LinearVAE:
        return LinearVAE(a=1 / sigma, b=-mu / sigma, t=t, c=sigma, v=mu, s=s)

    def elbo(vae: LinearVAE, x: Tensor = x.expand(50_000, -1, -1, -1)) -> Tensor:
        terms = vae.elbo(x)
        return terms["reconstruction"] - terms["kl"]

    vae = matched(t=0.5, s=0.5)
    row("Ex. 1.3   σ² | variance of x̂ = cz + v, z ~ N(0, I), where c = σ, v = μ", sigma**2,
        (vae.sample(50_000).flatten(1)[:, 0] - mu)**2)
    vae = LinearVAE(a=1.5, b=-0.2, t=0.7, c=0.6, v=0.1, s=0.8)
    mu_z, log_var = vae.encode(x.expand(50_000, -1, -1, -1))
    q = Normal(mu_z, (0.5 * log_var).exp())
    z = q.sample()
    ratio = (Normal(0.0, 1.0).log_prob(z) - q.log_prob(z)).sum(1) + Normal(
        vae.decode(z).flatten(1), vae.s).log_prob(x.flatten(1)).sum(1)
    row("Thm 1.1   log p(x) − KL(q ‖ p(z | x)) | E_q log p(x, z)/q(z | x), Def. 1.3",
        vae.log_prob(x) - vae.gap(x), ratio)
    row("Thm 1.2   log p(x) − KL(q ‖ p(z | x)) | reconstruction − kl, by VAE.elbo",
        vae.log_prob(x) - vae.gap(x), elbo(vae))
    for a in (1 / sigma, 0.8 / sigma):
        vae = LinearVAE(a=a, b=-mu / sigma, t=0.1, c=sigma, v=mu, s=0.1 * sigma)
        row(f"Ex. 1.4   KL(q ‖ p(z | x)) | log p(x) − ELBO, t = 0.1, a = {a * sigma:.1f}/σ",
            vae.gap(x), vae.log_prob(x) - elbo(vae))
    row("          0 | KL(q ‖ p(z | x)), t = 0.0001, a = 1/σ", 0,
        matched(1e-4, 1e-4 * sigma).gap(x))

    vae = matched(t=1e-9, s=0.1)
    reconstruction = vae.elbo(x)["reconstruction"].sum()
    row("Ex. 1.5   −(d/2) log 2π − d log s, for s = 0.1 | reconstruction, t → 0",
        -d / 2 * math.log(2 * math.pi) - d * math.log(0.1), reconstruction)
    slopes = torch.autograd.grad(reconstruction, (vae.c, vae.v))
    row("          0 | its largest slope in c and v, at c = σ, v = μ", 0,
        torch.stack(slopes).abs().max())
    row("          −½ log 2π − log s, as printed, without d | reconstruction",
        -0.5 * math.log(2 * math.pi) - math.log(0.1), reconstruction, differ=True)

    row("Ex. 1.6   ½ (t²d − d + ‖(x−μ)/σ‖² − 2d log t), for t = 0.5 | kl", 0.5 * (
        0.25 * d - d + ((x - mu) / sigma).square().sum() - 2 * d * math.log(0.5)),
        matched(0.5, 0.5).elbo(x)["kl"])
    row("          −(d/2) log 2π − d log s − σ²d/2s², t = 1, s = σ | reconstruction",
        -d / 2 * math.log(2 * math.pi) - d * math.log(sigma) - d / 2,
        matched(1, sigma).elbo(x.expand(50_000, -1, -1, -1))["reconstruction"])
    for t in (1.0, 0.5, 0.1):
        row(f"          −t²d/2 | ELBO − log N(x | μ, σ² I), for t = {t}, s = σt", -t**2 * d / 2,
            elbo(matched(t, t * sigma)) - log_data)
    row("          −d/2, the best by the print | ELBO − log N(x | μ, σ² I), t = 0.001", -d / 2,
        elbo(matched(1e-3, 1e-3 * sigma)) - log_data, differ=True)

    mu, log_var = (torch.full((1_000_000, 1), value, requires_grad=True) for value in (0.7, -0.4))
    vae.reparameterize(mu, log_var).square().sum().backward()  # any VAE's
    row("Ex. 1.7   2μ, for μ = 0.7 | slope of E z² in μ, through z = μ + σε", 1.4,
        mu.grad.flatten())
    row("          σ², for log σ² = −0.4 | slope of E z² in log σ²", math.exp(-0.4),
        log_var.grad.flatten())
    log_var.grad = None
    z = vae.reparameterize(mu, log_var)
    Normal(mu, (0.5 * log_var).exp()).log_prob(z).sum().neg().backward()
    row("Ex. 1.8   ½ | slope of E[−log q(z | x)] in log σ²", 0.5, log_var.grad.flatten())

    m, S = torch.randn(2, 3).double(), torch.randn(2, 3, 3).double()
    S = S @ S.mT + torch.eye(3)
    difference, inverse = m[1] - m[0], S[1].inverse()
    row("Thm 1.3   (1.25), d = 3, full covariances | KL by torch.distributions", 0.5 * (
        (inverse @ S[0]).trace() - 3 + difference @ inverse @ difference
        + (S[1].det() / S[0].det()).log()),
        kl_divergence(MultivariateNormal(m[0], S[0]), MultivariateNormal(m[1], S[1])))
    vae = LinearVAE(a=1.5, b=-0.2, t=0.7, c=0.6, v=0.1, s=0.8)
    kl = kl_divergence(Normal(vae.encode(x)[0], 0.7), Normal(0.0, 1.0)).sum()
    squares = vae.encode(x)[0].square().sum()
    row("(1.26)    KL by torch.distributions | kl of VAE.elbo", kl, vae.elbo(x)["kl"])
    row("          with 2 log σ_φ for 2d log σ_φ: one of (1.34), (1.35) | KL", 0.5 * (
        0.49 * d - d + squares - 2 * math.log(0.7)), kl, differ=True)
    exact = vae.log_prob(x_many) - vae.gap(x_many)
    row("Thm 1.4   mean of log p(x) − KL(q ‖ p(z | x)) | −d · VAE.loss, 50,000 x", exact,
        -d * vae.loss(x_many))
    terms = vae.elbo(x_many)
    row("          (1.35) as printed, with + before the KL | the same mean",
        terms["reconstruction"] + terms["kl"], exact, differ=True)
    return rows


if __name__ == "__main__":
    torch.manual_seed(0)
    print(f"{'formula | what computes it':76}{'formula':>12}{'computed':>12}{'tolerance':>11}")
    for what, formula, computed, tolerance in examples():
        print(f"{what:76}{formula:12.5f}{computed:12.5f}"
              + (f"{tolerance:11.0e}" if tolerance else f"{'differ':>11}"))
