# SPDX-License-Identifier: MIT
"""Section 1 of the tutorial (arXiv 2403.18103): the variational auto-encoder.

Building Blocks (§1.1). An encoder turns the image x into a latent z, a decoder turns z back into
an image, and both are distributions:

    x ──> q_φ(z | x) ──> z ──> p_θ(x | z) ──> x̂            p(z) = N(0, I)

`GaussianMixture` is the paper's worked example, in which all of them are known exactly; `VAE`
learns them from images. `python vae.py` holds the section's claims against what this file computes.
"""
import math
import warnings

if __name__ == "__main__":  # torch's, as soon as it is imported, and no loss here
    warnings.filterwarnings("ignore", "Failed to initialize NumPy")

import torch
from torch import Generator, Tensor, nn
from torch.distributions import MultivariateNormal, Normal, kl_divergence


class GaussianMixture:
    """The example of §1.1: the latent is the number z = k of a Gaussian.

    p(z = k) = π_k, p(x | k) = N(x | μ_k, σ_k² I), p(x) = Σ_k π_k N(x | μ_k, σ_k² I).

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
        """k ~ π, then x ~ N(μ_k, σ_k² I): n independent x, (n,) or (n, d)."""
        k = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        mean = self.decode(k)
        noise = torch.randn(mean.shape, generator=generator, dtype=mean.dtype)
        return mean + self.stds[k].view(-1, *[1] * (mean.ndim - 1)) * noise

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
        """k̂(x) = arg max_k p(k | x): the most probable Gaussian, (n,) integers."""
        return self.posterior(x).argmax(-1)

    def decode(self, k: Tensor) -> Tensor:
        """E[x | k] = μ_k: the picture that the code k stands for, (n,) or (n, d)."""
        return self.means[k]


class VAE(nn.Module):
    """The variational auto-encoder of §1.

        q_φ(z | x) = N(z | μ_φ(x), diag σ_φ²(x))      the encoder network gives μ_φ and log σ_φ²
        p_θ(x | z) = N(x | decode_θ(z), σ_dec² I)     the decoder network gives the mean
        p(z)       = N(z | 0, I)

    Args:
        image_shape: (C, H, W) with H and W at least 8.
        latent_dim: d, the length of z.
        channels: width at half resolution; twice that at quarter resolution.
        decoder_std: σ_dec, on the scale of pixels in [-1, 1]. Small: sharp reconstructions, but
            of z that together cover N(0, I) badly, so that samples look wrong. Large: the reverse.

    Images are float tensors (B, C, H, W) in [-1, 1]. Bad arguments raise ValueError.
    """

    def __init__(self, image_shape: tuple[int, int, int] = (1, 28, 28), latent_dim: int = 8,
                 channels: int = 16, decoder_std: float = 0.6):
        super().__init__()
        if (len(image_shape) != 3 or not all(isinstance(n, int) for n in image_shape)
                or image_shape[0] < 1 or min(image_shape[1:]) < 8):
            raise ValueError(f"image_shape must be (C, H, W) with H and W at least 8, "
                             f"got {image_shape}")
        for name, value in (("latent_dim", latent_dim), ("channels", channels)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number from 1, got {value}")
        if not 0 < decoder_std < math.inf:
            raise ValueError(f"decoder_std must be positive and finite, got {decoder_std}")
        C, H, W = self.image_shape = tuple(image_shape)
        self.latent_dim = latent_dim
        self.decoder_std = decoder_std

        # The paper leaves the networks open. Two halvings down, two doublings up. GroupNorm is what
        # keeps training from settling, in its first steps, for q_φ(z | x) = p(z) and one average
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

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """q_φ(z | x) = N(z | μ_φ(x), diag σ_φ²(x)) (§1.1): (mu, log_var), (B, d) each."""
        if x.shape[1:] != self.image_shape or not x.is_floating_point():
            raise ValueError(f"expected float images (B, {', '.join(map(str, self.image_shape))}), "
                             f"got {x.dtype} {tuple(x.shape)}")
        return self.encoder(x).to(x.dtype).chunk(2, dim=1)

    def reparameterize(self, mu: Tensor, log_var: Tensor) -> Tensor:
        """z = μ + σ ⊙ ε with ε ~ N(0, I), (B, d).

        Training VAE (§1.3): z ~ q_φ(z | x) written so that z is a differentiable function of φ.
        """
        return mu + (0.5 * log_var).exp() * torch.randn_like(mu)

    def decode(self, z: Tensor) -> Tensor:
        """decode_θ(z), the mean of p_θ(x | z) = N(x | decode_θ(z), σ_dec² I) (§1.1).

        (B, d) -> (B, C, H, W) in [-1, 1].
        """
        if z.shape[1:] != (self.latent_dim,) or not z.is_floating_point():
            raise ValueError(f"expected float z (B, {self.latent_dim}), "
                             f"got {z.dtype} {tuple(z.shape)}")
        _, H, W = self.image_shape
        return self.decoder(z)[:, :, :H, :W].to(z.dtype)  # 4 ⌈H/4⌉ may be more than H

    def elbo(self, x: Tensor) -> dict[str, Tensor]:
        """The two terms of the Evidence Lower Bound (§1.2), each (B,), in nats per image:

            log p(x) ≥ ELBO = reconstruction − kl
            reconstruction = E_{q_φ(z | x)} log N(x | decode_θ(z), σ_dec² I), from one sample of z
            kl             = KL(q_φ(z | x) ‖ N(0, I)) = ½ Σ (σ_φ² + μ_φ² − 1 − log σ_φ²)

        Loss Function (§1.4) drops the constant −D/2 log(2π σ_dec²) of the Gaussian; here it is
        kept, so that this is a bound on the log-density of x on [-1, 1]^D.
        """
        mu, log_var = self.encode(x)
        x_hat = self.decode(self.reparameterize(mu, log_var))
        reconstruction = Normal(x_hat, self.decoder_std, validate_args=False).log_prob(x)
        kl = 0.5 * (log_var.exp() + mu.square() - 1 - log_var).sum(1)
        return {"reconstruction": reconstruction.flatten(1).sum(1), "kl": kl}

    def loss(self, x: Tensor) -> Tensor:
        """−ELBO / D (§1.4): a scalar, the mean over the batch, in nats for each of D pixels.

        Its gradient is that of ‖x − decode_θ(z)‖² / 2σ_dec² + KL, divided by D.
        """
        terms = self.elbo(x)
        return (terms["kl"] - terms["reconstruction"]).mean() / x[0].numel()

    forward = loss  # what wraps a module, like data parallelism, calls this

    def bits_per_dim(self, x: Tensor, terms: dict[str, Tensor] | None = None) -> Tensor:
        """−ELBO / (D ln 2) of x as 8-bit pixels: (B,).

        The ELBO bounds a density; over a pixel's bin, 2/255 wide, that is a probability of
        2/255 times as much. terms: what `elbo` gave for x; computed here where it is missing.
        """
        reconstruction, *costs = (terms or self.elbo(x)).values()
        return ((sum(costs) - reconstruction) / x[0].numel() - math.log(2 / 255)) / math.log(2)

    @torch.no_grad()
    def sample(self, n: int, generator: Generator | None = None) -> Tensor:
        """x̂ = decode_θ(z) with z ~ N(0, I): n new images (n, C, H, W) in [-1, 1].

        Inference with VAE (§1.5): the mean of p_θ(x | z), without its white noise of σ_dec.
        generator: on the model's device.
        """
        like = next(self.parameters())
        z = torch.randn(n, self.latent_dim, generator=generator, dtype=like.dtype,
                        device=like.device)
        return self.decode(z)


# ------------------------------------------------------------- the section's claims, computed


class LinearVAE(VAE):
    """x = w z + σ_dec ε with one number z, so that all that a VAE bounds is known:

        p(x)     = N(x | 0, w wᵀ + σ_dec² I)
        p(z | x) = N(z | s² wᵀx / σ_dec², s²),   s² = 1 / (1 + ‖w‖² / σ_dec²)

    Its q_φ(z | x) is p(z | x), moved by `off`.
    """

    def __init__(self, off: float):
        super().__init__((1, 8, 8), latent_dim=1, decoder_std=0.5)
        self.double()
        self.w, self.off = torch.linspace(-0.3, 0.3, 64, dtype=torch.float64), off
        self.variance = 1 / (1 + self.w @ self.w / self.decoder_std**2)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mu = self.variance * x.flatten(1) @ self.w / self.decoder_std**2 + self.off
        return mu[:, None], self.variance.log().expand(len(x), 1)

    def decode(self, z: Tensor) -> Tensor:
        return (z * self.w).view(-1, 1, 8, 8)


def examples() -> list[tuple[str, float, float, float]]:
    """What §1 says and what this file computes: rows of (claim, paper, ours, tolerance).

    Where a row is a mean of random draws its tolerance is 5 standard errors.
    """
    rows = []

    def row(claim: str, paper: float | Tensor, ours: Tensor):
        error = 5 * ours.std().item() / len(ours)**0.5 if ours.ndim else 1e-6
        rows.append((claim, float(paper), ours.mean().item(), error))

    pi, mu, sigma = torch.tensor([0.3, 0.7]), torch.tensor([-1.0, 2.0]), torch.tensor(0.8)
    mixture = GaussianMixture(pi, mu, sigma.expand(2))
    x, mean = mixture.sample(1_000_000), pi @ mu
    row("§1.1  decoder: E[x] = Σ π_k μ_k", mean, x)
    row("      E[(x − E[x])²] = Σ π_k (σ_k² + μ_k²) − E[x]²",
        sigma**2 + pi @ mu**2 - mean**2, (x - mean)**2)
    odds = (pi[1] / pi[0]).log() + (mu[0]**2 - mu[1]**2) / (2 * sigma**2)
    row("      encoder: p(k = 2 | x = 0), by Bayes' rule", odds.sigmoid(),
        mixture.posterior(torch.zeros(1))[0, 1])
    border = mu.mean() - sigma**2 * (pi[1] / pi[0]).log() / (mu[1] - mu[0])
    right = torch.special.ndtr(torch.stack([border - mu[0], mu[1] - border]) / sigma)
    row("      arg max p(k | x) is the true k in this share of cases", pi @ right,
        mixture.posterior(x).max(-1).values)

    x = 0.5 * torch.randn(1, 1, 8, 8, dtype=torch.float64)
    for off in (0.0, 0.5):
        vae = LinearVAE(off)
        p_x = MultivariateNormal(torch.zeros_like(vae.w), torch.outer(vae.w, vae.w)
                                 + vae.decoder_std**2 * torch.eye(64))
        q = Normal(*(value.squeeze() for value in (vae.encode(x)[0], vae.variance.sqrt())))
        gap = kl_divergence(q, Normal(q.mean - off, q.stddev))
        terms = vae.elbo(x.expand(100_000, -1, -1, -1))
        row(f"§1.2  ELBO = log p(x) − KL(q ‖ p(z | x)), where KL = {gap:.4f}",
            p_x.log_prob(x.flatten()) - gap, terms["reconstruction"] - terms["kl"])

    m, log_var = (torch.full((1_000_000, 1), value, requires_grad=True) for value in (0.7, -0.4))
    vae.reparameterize(m, log_var).square().sum().backward()
    row("§1.3  z = μ + σ ⊙ ε: the gradient of E[z²] in μ, 2μ", 1.4, m.grad.flatten())
    row("      and in log σ², σ²", math.exp(-0.4), log_var.grad.flatten())
    row("§1.4  KL(q ‖ N(0, 1)) in closed form", kl_divergence(q, Normal(0.0, 1.0)),
        terms["kl"][0])
    row("§1.5  z ~ N(0, 1): E‖decode(z)‖² = ‖w‖²", vae.w @ vae.w,
        vae.sample(200_000).square().sum((1, 2, 3)))
    return rows


if __name__ == "__main__":
    torch.manual_seed(0)
    print(f"{'':60}{'paper says':>12}{'we compute':>12}{'within':>10}")
    for claim, paper, ours, tolerance in examples():
        print(f"{claim:60}{paper:12.5f}{ours:12.5f}{tolerance:10.0e}")
