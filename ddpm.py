# SPDX-License-Identifier: MIT
"""Section 2 of the tutorial: the denoising diffusion probabilistic model (DDPM).

Numbers (§, theorem, example, equation) are those of Stanley Chan, "Tutorial on Diffusion Models for
Imaging and Vision" (arXiv 2403.18103), version 3, January 2025, whose order the class follows.

Building Blocks (§2.1, Fig. 2.1 to 2.4). A chain of images of one shape, from the picture x_0 to
white noise x_T, with q(x_t | x_{t−1}) to the right and p_θ(x_{t−1} | x_t) to the left:

    x_0  ⇄  x_1  ⇄  …  ⇄  x_{t−1}  ⇄  x_t  ⇄  …  ⇄  x_T

    transition block   q is fixed and adds a little noise; p_θ is learned and removes it
    initial block      x_0 has a neighbour on the right only
    final block        x_T has a neighbour on the left only, and should be N(0, I)

Time is 1-based as in the paper. Tables have T + 1 entries and are indexed by t itself, with
alpha[0] = alpha_bar[0] = 1. The paper's α_t is 1 − β_t in "Denoising Diffusion Probabilistic
Models" (arXiv 2006.11239). `python ddpm.py` computes the section's examples and theorems.
"""
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence

if __name__ == "__main__":  # torch can do without NumPy, and so can this file
    warnings.filterwarnings("ignore", "Failed to initialize NumPy")

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Categorical, MixtureSameFamily, Normal, kl_divergence


class DDPM(nn.Module):
    """The chain of §2 with any network, for images or any other data of fixed shape: x_t is (B, …).

    Args:
        denoiser: called as denoiser(x_t, t) with integers t, (B,), in 1..T (an nn.Embedding of t
            needs T + 1 rows); returns x_t's shape.
        alphas: α_1, …, α_T, T ≥ 2, each below 1; α_1 ≥ 0.4, and their product ᾱ_T is 1e-50 to 0.1.
        predict: what the network outputs, the "noise" ε̂_θ(x_t) (§2.5) or "image" x̂_θ(x_t) (§2.4).
        clip: whether x̂_θ is clipped to [-1, 1], the range of images, as in the code of arXiv
            2006.11239. At large t the error of ε̂_θ is divided by a small √ᾱ_t, and one value out
            of range would spoil every later step. Pass False for points, latents and signals beyond
            ±1, whose samples would otherwise be wrong, silently.

    Images are float tensors (B, C, H, W) in [-1, 1]. A time t is an int, or (B,) integers, in 1..T.
    A Gaussian is the pair (mean, variance), where the variance is one number or (B, 1, …, 1).
    `ddpm(x_0)` is the loss, also under a wrapper (torch.compile, DistributedDataParallel).
    `state_dict()` holds the network alone. Raises ValueError for alphas, t, steps, eta or k out of
    range, for an x that is no tensor of floats, and for a network that changes its shape.
    """

    def __init__(self, denoiser: Callable[[Tensor, Tensor], Tensor],
                 alphas: Tensor | Sequence[float], predict: str = "noise", clip: bool = True):
        super().__init__()
        alphas = torch.as_tensor(alphas, dtype=torch.float64, device="cpu").detach()
        wrong = alphas[~((0 < alphas) & (alphas < 1))].tolist()
        if alphas.ndim != 1 or len(alphas) < 2 or wrong:
            raise ValueError("alphas must be two or more numbers between 0 and 1, got "
                             f"{wrong[0] if wrong else tuple(alphas.shape)}")
        if predict not in ("noise", "image"):
            raise ValueError(f"predict must be 'noise' or 'image', got {predict!r}")
        self.denoiser, self.T, self.predict, self.clip = denoiser, len(alphas), predict, clip
        # The tables stay float64 on the CPU, and `at` rounds only the finished coefficient. In
        # float32, 1 − ᾱ_1 of `linear_alphas` would keep only four correct digits.
        self.alpha = F.pad(alphas, (1, 0), value=1.0)
        self.alpha_bar = self.alpha.cumprod(0)  # ᾱ_t = α_1 α_2 … α_t
        self.alpha_bar_prev = F.pad(self.alpha_bar[:-1], (1, 0), value=1.0)  # ᾱ_{t−1}
        variance_q = (1 - self.alpha) * (1 - self.alpha_bar_prev) / (1 - self.alpha_bar)
        self.variance_q = variance_q.nan_to_num()  # σ_q²(t), (2.32); at t = 0 it is 0 / 0
        # √ᾱ_t and √(1 − ᾱ_t) once more, for `roots_at`, on the device, where mps has no float64.
        self.register_buffer("roots", torch.stack(
            [self.alpha_bar.sqrt(), (1 - self.alpha_bar).sqrt()]).float(), persistent=False)
        if not 1e-50 < self.alpha_bar[-1] < 0.1 or alphas[0] < 0.4:
            raise ValueError(f"the product of alphas is {self.alpha_bar[-1]:.2g} and must be 1e-50 "
                             "to 0.1 (else x_T is not white noise, or x_t is long before T); α_1 "
                             f"is {alphas[0]:.2g} and must be at least 0.4. Are these α_t, or "
                             "rather 1 − α_t or ᾱ_t?")

    def at(self, t: int | Tensor, x: Tensor, *tables: Tensor) -> list[Tensor]:
        """The tables at t, in x's precision and on its device: () for an int, else (B, 1, …, 1)."""
        check_floats(x)
        t = torch.as_tensor(t, device="cpu")
        wrong = t[(t < 1) | (t.double() > self.T)].tolist()  # bytes end at 255
        if t.is_floating_point() or t.shape not in ((), x.shape[:1]) or wrong:
            raise ValueError(f"t must be in 1..{self.T}, one integer or {len(x)}, got "
                             f"{wrong[0] if wrong else f'{t.dtype} {tuple(t.shape)}'}")
        t = t.long()  # bytes would be a mask
        if t.ndim == 0:  # new_full copies nothing to the device; a copy could make the host wait
            return [x.new_full((), table[t].item()) for table in tables]
        t = t.view(-1, *[1] * (x.ndim - 1))
        return [table[t].to(x.device, x.dtype, non_blocking=x.is_cuda) for table in tables]

    # -------------------------------------------------- §2.1 Building Blocks: q(x_t | …)

    def q_transition(self, x_prev: Tensor, t: int | Tensor) -> tuple[Tensor, Tensor]:
        """q(x_t | x_{t−1}) = N(x_t | √α_t x_{t−1}, (1 − α_t) I)    Def. 2.1, (2.1)

        Thm 2.1: the variance of x_t = a x_{t−1} + b ε tends to 1 if and only if b = √(1 − a²).
        Hence "the magical scalars" √α_t and 1 − α_t.
        """
        scale, variance = self.at(t, x_prev, self.alpha.sqrt(), 1 - self.alpha)
        return scale * x_prev, variance

    def q_marginal(self, x_0: Tensor, t: int | Tensor) -> tuple[Tensor, Tensor]:
        """q(x_t | x_0) = N(x_t | √ᾱ_t x_0, (1 − ᾱ_t) I)    Thm 2.2, (2.8): t transitions at once"""
        scale, variance = self.at(t, x_0, self.alpha_bar.sqrt(), 1 - self.alpha_bar)
        return scale * x_0, variance

    def q_sample(self, x_0: Tensor, t: int | Tensor, noise: Tensor) -> Tensor:
        """x_t = √ᾱ_t x_0 + √(1 − ᾱ_t) ε with ε = noise ~ N(0, I)    (2.11)"""
        scale, std = self.roots_at(t, x_0)
        return scale * x_0 + std * noise

    def roots_at(self, t: int | Tensor, x: Tensor) -> Sequence[Tensor]:
        """√ᾱ_t and √(1 − ᾱ_t). A t on a device, as `loss` draws it, is looked up there and not
        checked: the host need not wait, and a CUDA graph can record it."""
        if isinstance(t, Tensor) and t.device.type != "cpu":
            return self.roots.to(x)[:, t].view(2, -1, *[1] * (x.ndim - 1))
        return self.at(t, x, self.alpha_bar.sqrt(), (1 - self.alpha_bar).sqrt())

    # -------------------------------------------------- §2.2 Evidence Lower Bound

    @torch.no_grad()
    def elbo(self, x_0: Tensor, k: int | None = None) -> dict[str, Tensor]:
        """log p(x_0) ≥ E_{q(x_{1:T} | x_0)} log [p(x_{0:T}) / q(x_{1:T} | x_0)]            (2.17)

                     = reconstruction − prior_matching − consistency              Thm 2.4, (2.21)

        This bounds the probability of 8-bit pixels (a pixel is the value of one channel); the VAE's
        `elbo` bounds a density. Compare them by `bits_per_dim`. The three terms, each (B,), in nats
        per image x_0 in [-1, 1], without gradients:

            reconstruction   E log p_θ(x_0 | x_1),                            x_1 ~ q(x_1 | x_0)
            prior_matching   KL(q(x_T | x_0) ‖ p(x_T)),                       p(x_T) = N(0, I)
            consistency      Σ_{t=2..T} E KL(q(x_{t−1} | x_t, x_0) ‖ p_θ(x_{t−1} | x_t)),
                                                                              x_t ~ q(x_t | x_0)

        Thm 2.3, the first form, compares q(x_t | x_{t−1}) with p_θ(x_t | x_{t+1}), which takes two
        random neighbours. (As printed it is not (2.17).) Here Bayes' rule (2.20) has reversed q:
        a term needs only one random state. Every expectation is estimated from one sample. With k,
        the sum over t is estimated, too, without bias, from k random t for each image.
        """
        check_floats(x_0, torch.float32, torch.float64)
        if not x_0.abs().max() <= 1:
            raise ValueError(f"x_0 must be pixels in [-1, 1], got {x_0.abs().max():.4g}")
        if k is not None and (k < 1 or k % 1):
            raise ValueError(f"k must be a whole number of at least 1, got {k}")

        # The initial block. In Thm 2.7, (2.44), it is the term t = 1, which divides by σ_q²(1) = 0:
        # any pixel that x̂_θ does not hit exactly would be impossible. So p_θ(x_0 | x_1) has the
        # variance σ_q²(2) here, and a pixel has the probability of its bin.
        std, = self.at(2, x_0, self.variance_q.sqrt())
        mean, _ = self.p_transition(self.q_sample(x_0, 1, torch.randn_like(x_0)), 1)
        reconstruction = log_pixel_mass(x_0, mean, std)

        # The final block: Thm 1.3 for q(x_T | x_0) and N(0, I).
        mean, variance = self.q_marginal(x_0, self.T)
        prior_matching = 0.5 * (variance - 1 + mean**2 - variance.log())

        # All t, each with weight 1; or k random t for each image, each with weight 1 / (k p). A t's
        # probability p is proportional to the mean of its term for x_0 ~ N(0, I) and the best
        # denoiser, ½ [(1 − ᾱ_t) / (1 − ᾱ_{t−1}) − 1].
        times, weights = torch.arange(2, self.T + 1), torch.ones(self.T + 1)
        if k is not None:
            p = F.pad((1 - self.alpha_bar[2:]) / (1 - self.alpha_bar[1:-1]) - 1, (2, 0))
            times = torch.multinomial(p, int(k) * len(x_0), replacement=True).view(-1, len(x_0))
            weights = p.sum() / (k * p)  # infinite for t = 0 and 1, which are never drawn

        # The transition blocks (Thm 2.6): Gaussians of the same variance, so that their KL is
        # ‖μ_q − μ_θ‖² / 2σ_q²(t), (2.37). In x_0 and x̂_θ it is (2.43).
        consistency = torch.zeros_like(x_0)
        for t in times:  # one t for all images, or (B,)
            x_t = self.q_sample(x_0, t, torch.randn_like(x_0))
            mu_q, variance = self.q_posterior(x_t, x_0, t)
            mu_theta, _ = self.p_transition(x_t, t)
            weight, = self.at(t, x_0, weights)
            consistency += weight * (mu_q - mu_theta)**2 / (2 * variance)
        terms = {"reconstruction": reconstruction, "prior_matching": prior_matching,
                 "consistency": consistency}
        return {name: term.reshape(len(x_0), -1).sum(1) for name, term in terms.items()}

    # -------------------------------------------------- §2.3 Distribution of the Reverse Process

    def q_posterior(self, x_t: Tensor, x_0: Tensor, t: int | Tensor) -> tuple[Tensor, Tensor]:
        """q(x_{t−1} | x_t, x_0) = N(x_{t−1} | μ_q(x_t, x_0), σ_q²(t) I)    Thm 2.5

            μ_q     = (1 − ᾱ_{t−1}) √α_t / (1 − ᾱ_t) · x_t  +  (1 − α_t) √ᾱ_{t−1} / (1 − ᾱ_t) · x_0
            σ_q²(t) = (1 − α_t)(1 − ᾱ_{t−1}) / (1 − ᾱ_t)

        by Bayes' rule (2.20). μ_q (2.25) lies between x_t and x_0 (Fig. 2.9), shrunk towards 0: for
        t > 1 its weights sum to less than 1. At t = 1 it is x_0, and σ_q²(1) = 0. (The print of
        (2.26) has √ᾱ_{t−1} for ᾱ_{t−1}.)
        """
        c_t, c_0, variance = self.at(
            t, x_t, (1 - self.alpha_bar_prev) * self.alpha.sqrt() / (1 - self.alpha_bar),
            (1 - self.alpha) * self.alpha_bar_prev.sqrt() / (1 - self.alpha_bar), self.variance_q)
        return c_t * x_t + c_0 * x_0, variance

    def p_transition(self, x_t: Tensor, t: int | Tensor) -> tuple[Tensor, Tensor]:
        """p_θ(x_{t−1} | x_t) = N(x_{t−1} | μ_θ(x_t), σ_q²(t) I)    (2.34)

        μ_θ is μ_q with x̂_θ(x_t) in place of x_0, which is unknown here (2.41). With ε̂_θ, and if
        nothing is clipped, it is (2.50): x_t / √α_t − (1 − α_t) / (√(1 − ᾱ_t) √α_t) · ε̂_θ(x_t).
        `reverse_chain` takes any variance that a subclass returns; `elbo` and DDIM use σ_q²(t).
        """
        return self.q_posterior(x_t, self.predict_x0(x_t, t), t)

    # -------------------------------------------------- §2.4 Training and Inference

    def output(self, x_t: Tensor, t: int | Tensor) -> Tensor:
        """The network's output at t, in x_t's precision even under autocast."""
        if not isinstance(t, Tensor) or t.ndim == 0:
            t = x_t.new_full(x_t.shape[:1], int(t), dtype=torch.long)
        output = self.denoiser(x_t, t.to(x_t.device, torch.long, non_blocking=x_t.is_cuda))
        if output.shape != x_t.shape:
            raise ValueError(f"the denoiser made {tuple(output.shape)} of {tuple(x_t.shape)}")
        return output.to(x_t.dtype)

    def predict_x0(self, x_t: Tensor, t: int | Tensor) -> Tensor:
        """x̂_θ(x_t), clipped if `clip`. From ε̂_θ it is (2.11) solved for x_0:
        (x_t − √(1 − ᾱ_t) ε̂_θ(x_t)) / √ᾱ_t."""
        scale, std = self.at(t, x_t, self.alpha_bar.sqrt(), (1 - self.alpha_bar).sqrt())
        x0_hat = (self.output(x_t, t) if self.predict == "image"
                  else (x_t - std * self.predict_noise(x_t, t)) / scale)
        return x0_hat.clamp(-1, 1) if self.clip else x0_hat

    def loss(self, x_0: Tensor) -> Tensor:
        """‖x̂_θ(x_t) − x_0‖² (§2.4) or ‖ε̂_θ(x_t) − ε‖² (§2.5): a scalar, a mean over all pixels.

        The boxes "Training Algorithm for DDPM" (2.47) and "Training DDPM using ε̂_θ", without the
        gradient step. (The first prints ᾱ_t x_0 for √ᾱ_t x_0.) In the ELBO each t has a factor of
        its own, that of (2.43) for x̂_θ. The boxes drop it. For ε̂_θ this costs some likelihood and
        gives better pictures (arXiv 2006.11239, section 3.4).
        """
        check_floats(x_0)
        t = torch.randint(1, self.T + 1, x_0.shape[:1], device=x_0.device)  # t ~ Uniform[1, T]
        noise = torch.randn_like(x_0)       # ε ~ N(0, I)
        x_t = self.q_sample(x_0, t, noise)  # √ᾱ_t x_0 + √(1 − ᾱ_t) ε
        target = noise if self.predict == "noise" else x_0
        return F.mse_loss(self.output(x_t, t), target)

    def forward(self, x_0: Tensor) -> Tensor:
        return self.loss(x_0)  # so that ddpm(x_0) is the loss

    @torch.no_grad()
    def reverse_chain(self, x_T: Tensor) -> Iterator[tuple[int, Tensor]]:
        """x_{t−1} = μ_θ(x_t) + σ_q(t) z,    z ~ N(0, I),    for t = T, …, 1    (2.48)

                = (x_t − (1 − α_t) / √(1 − ᾱ_t) · ε̂_θ(x_t)) / √α_t  +  σ_q(t) z    (2.52)

        Both boxes "Inference of DDPM"; their first line, x_T ~ N(0, I), is the argument. With ε̂_θ
        the step goes through x̂_θ, so that x̂_θ can be clipped. Yields (t, x_t), t = T − 1, …, 0.
        The next step starts from the yielded tensor: x_t.copy_(…) steers the chain, as in DDIM.
        """
        x_t = x_T
        for t in range(self.T, 0, -1):
            mean, variance = self.p_transition(x_t, t)
            x_t = mean + variance.sqrt() * torch.randn_like(x_t)  # μ_θ(x_t) + σ_q(t) z
            yield t - 1, x_t

    def chain(self, x_T: Tensor, steps: int | list[int] | None = None,
              eta: float = 1.0) -> Iterator[tuple[int, Tensor]]:
        """`ddim_chain` if `steps` is given or η is not 1, else `reverse_chain`."""
        check_floats(x_T, torch.float32, torch.float64)
        if steps is None and eta == 1:
            return self.reverse_chain(x_T)
        return self.ddim_chain(x_T, self.T if steps is None else steps, eta)

    def sample(self, x_T: Tensor, steps: int | list[int] | None = None, eta: float = 1.0) -> Tensor:
        """The last state of `chain`, x_0: new images.

        x_T ~ N(0, I) is (B, …), float32 or float64, on the network's device. If the network has
        dropout, call `eval()` first, and `train()` before training goes on.
        """
        for _, x_t in self.chain(x_T, steps, eta):
            pass
        return x_t

    # -------------------------------------------------- §2.5 Predicting Noise
    # Its two boxes are `loss` and `reverse_chain` above, with predict = "noise".

    def noise_between(self, x_0: Tensor, x_t: Tensor, t: int | Tensor) -> Tensor:
        """ε = (x_t − √ᾱ_t x_0) / √(1 − ᾱ_t), which leads from x_0 to x_t: (2.11) solved for ε"""
        scale, std = self.at(t, x_t, self.alpha_bar.sqrt(), (1 - self.alpha_bar).sqrt())
        return (x_t - scale * x_0) / std

    def predict_noise(self, x_t: Tensor, t: int | Tensor) -> Tensor:
        """ε̂_θ(x_t). From x̂_θ it is the noise between x̂_θ, not clipped, and x_t."""
        self.at(t, x_t)  # refuses a wrong t
        output = self.output(x_t, t)
        return output if self.predict == "noise" else self.noise_between(output, x_t, t)

    # -------------------------------------------------- §2.6 DDIM

    @torch.no_grad()
    def ddim_chain(self, x_T: Tensor, steps: int | list[int],
                   eta: float = 1.0) -> Iterator[tuple[int, Tensor]]:
        """x_s = √ᾱ_s x̂_θ(x_t) + √(1 − ᾱ_s − σ_t²) ε̂_θ(x_t) + σ_t z,  z ~ N(0, I)    (2.59)

        The predicted x_0, a direction pointing to x_t, and fresh noise are added; s < t is the next
        time. (§2.6 prints α_t for ᾱ_t.) With σ_t² under the root every marginal q(x_s | x_0) stays
        the same for any σ_t (Thm 2.9), so one trained network serves all. With √(1 − ᾱ_s), the
        paper's first try, the variance is σ_t² too large. The paper leaves σ_t open; this is that
        of "Denoising Diffusion Implicit Models" (arXiv 2010.02502):

            σ_t² = η² (1 − ᾱ_s) (1 − ᾱ_t / ᾱ_s) / (1 − ᾱ_t),      0 ≤ η ≤ 1

        η = 1 is DDPM with longer steps, and with steps = T it is `reverse_chain`. ε̂_θ is the noise
        between the clipped x̂_θ and x_t. `steps` lists falling times, x_T's first, or is their
        number: from T to 1, denser near T, where long steps lose a picture's brightness.
        Yields (s, x_s), s = 0 last. A wrong argument raises ValueError at the first item.
        """
        if steps in range(1, self.T + 1):
            u = torch.linspace(0, 1, int(steps), dtype=torch.float64)
            passed = torch.maximum((self.T - 1) * u**1.5, torch.arange(len(u)))  # t by t at least
            steps = (self.T - passed).round().int().tolist()
        times = [int(t) for t in steps] if isinstance(steps, list) else []
        falling = sorted({*times} & {*range(1, self.T + 1)}, reverse=True)
        if not times or not times == steps == falling or not 0 <= eta <= 1:
            raise ValueError(f"steps must be a whole number in 1..{self.T}, or a list of falling "
                             f"ones, and eta in [0, 1], got {steps} and {eta}")
        x_t = x_T
        for t, s in zip(times, times[1:] + [0]):
            x0_hat = self.predict_x0(x_t, t)
            noise_hat = self.noise_between(x0_hat, x_t, t)
            bar_t, bar_s = self.alpha_bar[t].item(), self.alpha_bar[s].item()
            sigma2 = eta**2 * (1 - bar_s) * ((1 - bar_t / bar_s) / (1 - bar_t))
            x_t = (bar_s**0.5 * x0_hat + (1 - bar_s - sigma2)**0.5 * noise_hat
                   + sigma2**0.5 * torch.randn_like(x_t))
            yield s, x_t

    # -------------------------------------------------- §3.2 (Stein's) Score Function

    def score(self, x_t: Tensor, t: int | Tensor) -> Tensor:
        """∇ log p_t(x_t) ≈ −ε̂_θ(x_t) / √(1 − ᾱ_t), the s_θ of the paper's section 3"""
        std, = self.at(t, x_t, (1 - self.alpha_bar).sqrt())
        return -self.predict_noise(x_t, t) / std

    # -------------------------------------------------- not in the paper

    def bits_per_dim(self, x_0: Tensor, k: int | None = None) -> Tensor:
        """−ELBO / (D ln 2), bits for each of an image's D = C·H·W 8-bit pixels: (B,)."""
        check_pixels(x_0)
        terms = self.elbo(x_0, k)
        elbo = terms["reconstruction"] - terms["prior_matching"] - terms["consistency"]
        return -elbo / (math.prod(x_0.shape[1:]) * math.log(2))


def check_floats(x: Tensor, *dtypes: torch.dtype):
    """ValueError unless x is a tensor of floats, and of one of the dtypes if any are given."""
    kind = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x)
    if not isinstance(x, Tensor) or not x.is_floating_point() or 0 in x.shape:
        raise ValueError(f"x must be a tensor of floats, images in [-1, 1], got {kind}")
    if dtypes and x.dtype not in dtypes:
        raise ValueError(f"x must be {' or '.join(map(str, dtypes))}, got {kind}")


def check_pixels(x: Tensor):
    check_floats(x)
    if not ((x * 127.5 + 127.5) % 1 - 0.5).abs().min() > 0.4:
        raise ValueError("x must be 8-bit pixels, k / 127.5 − 1 for k = 0, …, 255; some are not")


# -------------------------------------------------- not in the paper: α_t, and a pixel's bin


def linear_alphas(T: int) -> Tensor:
    """α_1, …, α_T as a float64 (T,): 1 − α_t grows linearly.

    From 1e-4 to 0.02 for T = 1000, as in arXiv 2006.11239. For other T both ends are scaled by
    1000/T. For every T ≥ 21 the sum Σ (1 − α_t) is 10.05, so ᾱ_T < e⁻¹⁰ and x_T is white noise.
    """
    scale = 1000 / T
    return 1 - torch.linspace(1e-4 * scale, 0.02 * scale, T, dtype=torch.float64).clamp(max=0.999)


def cosine_alphas(T: int) -> Tensor:
    """α_1, …, α_T as a float64 (T,): ᾱ_t = f(t)/f(0) with f(t) = cos²(π/2 · (t/T + s)/(1 + s)).

    From "Improved Denoising Diffusion Probabilistic Models" (arXiv 2102.09672), with its s = 0.008
    and 1 − α_t ≤ 0.999. x̂_θ multiplies an error of ε̂_θ by 1/√ᾱ_t, which is 20,291 at t = T =
    1000: without clipping take `linear_alphas`, or all T steps.
    """
    s = 0.008
    t = torch.arange(T + 1, dtype=torch.float64)
    f = torch.cos(math.pi / 2 * (t / T + s) / (1 + s)) ** 2
    return (f[1:] / f[:-1]).clamp(min=0.001)


def cauchy_alphas(T: int) -> Tensor:
    """α_1, …, α_T as a float64 (T,): each log snr(t) is a quantile of a Cauchy distribution.

        λ_t = log snr(t) = μ + s tan θ_t,      snr(t) = ᾱ_t / (1 − ᾱ_t),      ᾱ_t = sigmoid(λ_t)

    with θ_t evenly spaced ("Improved Noise Schedule for Diffusion Training", arXiv 2407.03297).
    More than half of all λ_t lie within s of μ, where x_t is mostly noise and the picture takes
    shape; there the steps of λ_t are shortest (0.003 for T = 1000). The tails are heavy for the
    ELBO's sake: the longest step, the first, is only 0.50 (T = 1000), and the noise at t = 1
    (standard deviation 0.002) is small beside a pixel's bin (0.008). For T ≥ 1000 λ goes from 12.4
    to −10; a shorter chain has nearer ends and a wider s, so that no step is too long. μ and s were
    tuned on images: for signals, try the other schedules first.
    """
    r = math.log(max(1, 1000 / T))
    mu, s = -1.5, 1.1 * math.exp(r / 2)
    first, last = (math.atan((end - mu) / s) for end in (12.4 - 2 * r, -10 + 1.15 * r))
    alpha_bar = (mu + s * torch.linspace(first, last, T, dtype=torch.float64).tan()).sigmoid()
    return alpha_bar / F.pad(alpha_bar[:-1], (1, 0), value=1.0)


def log_pixel_mass(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """log ∫ N(y | mean, std²) dy over the bin of the 8-bit pixel x, elementwise, in nats.

    The p_θ(x_0 | x_1) of arXiv 2006.11239, section 3.3. A pixel's 256 values lie 2/255 apart on
    [-1, 1]. A bin reaches halfway to its neighbours, and the two outermost bins reach to ±∞, so
    that the 256 masses sum to 1.
    """
    lower = torch.where(x < -1 + 1 / 255, -math.inf, (x - 1 / 255 - mean) / std)
    upper = torch.where(x > 1 - 1 / 255, math.inf, (x + 1 / 255 - mean) / std)
    # log(Φ(upper) − Φ(lower)). A bin right of the mean is reflected to the left of it: there Φ is
    # small and log Φ keeps its digits, while right of the mean Φ rounds to 1.
    right = lower > 0
    ends = torch.stack([torch.where(right, -upper, lower), torch.where(right, -lower, upper)])
    try:
        log_lower, log_upper = torch.special.log_ndtr(ends)
    except NotImplementedError:  # Apple's mps has no kernel for it
        log_lower, log_upper = torch.special.log_ndtr(ends.cpu()).to(ends.device)
    return log_upper + torch.log(-torch.expm1(log_lower - log_upper))


# -------------------------------------------------- worked examples: python ddpm.py
# A copy can do without everything below. A subsection yields rows (what, formula, computed): two
# numbers, or tensors of draws, whose mean is printed. Rows "as printed" show an error of the print.


class ExactDDPM(DDPM):
    """A DDPM that has nothing left to learn: every pixel is drawn from a mixture of Gaussians,
    p(x_0) = Σ_k π_k N(μ_k, σ_k²), and the denoiser is E[ε | x_t] or E[x_0 | x_t]. The defaults are
    those of Ex. 2.1; T = 200 is this file's."""

    def __init__(self, alphas: Tensor = torch.full((200,), 0.97), predict: str = "noise",
                 clip: bool = False, pi=(0.3, 0.7), mu=(-2.0, 2.0), sigma=(0.2, 1.0)):
        super().__init__(self.exact, alphas, predict, clip)
        self.pi, self.mu, self.sigma = torch.tensor([pi, mu, sigma], dtype=torch.float64)
        self.p(0)  # torch refuses a π_k < 0 and a σ_k = 0, and, above, lists of unequal length

    def p(self, t: int | Tensor) -> MixtureSameFamily:
        """p_t(x) = Σ_k π_k N(x | √ᾱ_t μ_k, 1 − ᾱ_t + ᾱ_t σ_k²)    Ex. 2.2, (2.13)"""
        alpha_bar = self.alpha_bar[t].unsqueeze(-1)
        variance = 1 - alpha_bar + alpha_bar * self.sigma**2
        return MixtureSameFamily(Categorical(self.pi.expand_as(variance)),
                                 Normal(alpha_bar.sqrt() * self.mu, variance.sqrt()))

    def exact(self, x_t: Tensor, t: Tensor) -> Tensor:
        """E[x_0 | x_t] = Σ_k p(k | x_t) [μ_k + √ᾱ_t σ_k² / v_k · (x_t − √ᾱ_t μ_k)],

        with v_k = 1 − ᾱ_t + ᾱ_t σ_k². E[ε | x_t] is the noise between E[x_0 | x_t] and x_t.
        """
        parts = self.p(t.view(-1, *[1] * (x_t.ndim - 1))).component_distribution
        x, (scale,) = x_t.unsqueeze(-1), self.at(t, x_t, self.alpha_bar.sqrt())
        posterior = (self.pi.log() + parts.log_prob(x)).softmax(-1)  # p(k | x_t)
        gain = scale.unsqueeze(-1) * self.sigma**2 / parts.variance
        x0_hat = (posterior * (self.mu + gain * (x - parts.mean))).sum(-1)
        return x0_hat if self.predict == "image" else self.noise_between(x0_hat, x_t, t)


def normal(moments: tuple[Tensor, Tensor]) -> Normal:
    mean, variance = moments
    return Normal(mean, variance.sqrt())


def ones(n: int = 1) -> Tensor:
    return torch.ones(n, dtype=torch.float64)


def section_2_1() -> Iterator[tuple]:
    # Ex. 2.1's mixture after 20 transitions: its parts by (2.2), and 100,000 simulated pixels.
    ddpm = ExactDDPM()
    mean, variance, x_t = ddpm.mu, ddpm.sigma**2, ddpm.p(0).sample((100_000,))
    for t in range(1, 21):
        (mean, added), (scale, _) = ddpm.q_transition(mean, t), ddpm.q_transition(ones(), t)
        variance = scale**2 * variance + added
        x_t = normal(ddpm.q_transition(x_t, t)).sample()
    p_20, parts = ddpm.p(20), ddpm.p(20).component_distribution
    for k in (0, 1):
        yield (f"Ex. 2.1   t = 20, part {k + 1}: mean by (2.13) | by 20 steps of (2.2)",
               parts.mean[k], mean[k])
        yield "          variance by (2.13) | by (2.2)", parts.variance[k], variance[k]

    x = 0 * ones(100_000)
    for _ in range(60):
        x = 0.9 * x + 0.5 * torch.randn_like(x)
    yield "Thm 2.1   b²/(1 − a²), a = 0.9, b = 0.5 | simulated variance", 0.25 / 0.19, x**2

    mean, variance = ones(), 0 * ones()
    for t in range(1, 101):
        scale, added = ddpm.q_transition(ones(), t)
        mean, variance = scale * mean, scale**2 * variance + added
    scale, at_once = ddpm.q_marginal(ones(), 100)
    yield "Thm 2.2   t = 100: √ᾱ_t | product of 100 transitions", scale, mean
    yield "          1 − ᾱ_t | variance of 100 transitions", at_once, variance

    yield "Ex. 2.2   t = 20: mean of (2.13) | of 100,000 simulated pixels", p_20.mean, x_t
    yield "          variance of (2.13) | of the pixels", p_20.variance, (x_t - p_20.mean)**2
    yield "          share below 0 by (2.13) | of the pixels", p_20.cdf(0 * ones()), x_t < 0


def sections_2_2_and_2_3() -> Iterator[tuple]:
    # 20,000 chains x_0 = 0.35, x_1, …, x_T; q(x_t | x_{t−1}) and p_θ(x_{t−1} | x_t) along them;
    # log p_θ(x_0 | x_1); log [p(x_{0:T}) / q(x_{1:T} | x_0)], whose mean is the bound (2.17).
    ddpm, x, q, p, white = ExactDDPM(), [0.35 * ones(20_000)], {}, {}, Normal(0.0, 1.0)
    T = ddpm.T
    for t in range(1, T + 1):
        q[t] = normal(ddpm.q_transition(x[t - 1], t))
        x.append(q[t].sample())
        if t > 1:
            p[t] = normal(ddpm.p_transition(x[t], t))
    initial = log_pixel_mass(x[0], ddpm.p_transition(x[1], 1)[0], p[2].stddev)
    bound = (initial + sum(p[t].log_prob(x[t - 1]) for t in p) + white.log_prob(x[-1])
             - sum(q[t].log_prob(x[t]) for t in q))
    printed = initial - kl_divergence(q[T], white) - sum(
        kl_divergence(q[t], p[t + 1]) for t in range(1, T))
    drawn = initial - (q[T].log_prob(x[T]) - white.log_prob(x[T])) - sum(
        q[t].log_prob(x[t]) - p[t + 1].log_prob(x[t]) for t in range(1, T))
    yield "Thm 2.3   (2.14) as printed, with KLs | (2.17)", printed, bound
    yield ("          0 | largest distance of (2.14), with log q/p for each KL, from (2.17)", 0,
           (drawn - bound).abs().max())

    terms = ddpm.elbo(x[0])
    yield ("Thm 2.4   (2.17), simulated from x_0 = 0.35 | (2.21), by DDPM.elbo", bound,
           terms["reconstruction"] - terms["prior_matching"] - terms["consistency"])

    # Bayes' rule on a grid of x_{t−1}: q(x_{t−1} | x_t, x_0) ∝ q(x_t | x_{t−1}) q(x_{t−1} | x_0).
    t, grid = 20, torch.linspace(-4, 4, 400_001, dtype=torch.float64)
    weight = (normal(ddpm.q_transition(grid, t)).log_prob(0.3 * ones())
              + normal(ddpm.q_marginal(0.8 * ones(), t - 1)).log_prob(grid)).softmax(0)
    mean, variance = ddpm.q_posterior(0.3 * ones(), 0.8 * ones(), t)
    bayes = (weight * (grid - mean)**2).sum()
    printed = (1 - ddpm.alpha[t]) * (1 - ddpm.alpha_bar[t - 1].sqrt()) / (1 - ddpm.alpha_bar[t])
    yield "Thm 2.5   t = 20: μ_q of (2.25) | by Bayes' rule on a grid", mean, (weight * grid).sum()
    yield "          σ_q² of (2.32) | by Bayes' rule", variance, bayes
    yield "          σ_q² of (2.26) as printed, with √ᾱ_{t−1} | by Bayes' rule", printed, bayes

    q_50 = normal(ddpm.q_posterior(x[50], x[0], 50))
    yield ("Thm 2.6   t = 50: ‖μ_q − μ_θ‖² / 2σ_q² | KL(q ‖ p_θ)",
           ((q_50.mean - p[50].mean)**2 / (2 * q_50.variance))[0], kl_divergence(q_50, p[50])[0])


def section_2_4() -> Iterator[tuple]:
    ddpm, x = ExactDDPM(), ones(100_000)
    zero = DDPM(lambda x, t: torch.zeros_like(x), ddpm.alpha[1:], "image")
    alpha_bar = zero.alpha_bar[[1, -1]]
    snr = alpha_bar / (1 - alpha_bar)
    yield ("Thm 2.7   ½ ‖x_0‖² [snr(1) − snr(T)], snr = ᾱ/(1−ᾱ) | (2.44), t ≥ 2, x̂_θ = 0",
           0.5 * 0.35**2 * (snr[0] - snr[1]), zero.elbo(0.35 * ones())["consistency"])
    yield "(2.44)    0 | σ_q²(1), by which its t = 1 divides", 0, zero.variance_q[1]

    x_t = ddpm.q_sample(x, 20, torch.randn(100_000))
    for t in range(1, 21):
        x = normal(ddpm.q_transition(x, t)).sample()
    yield "Training  mean of √ᾱ_t x_0 + √(1 − ᾱ_t) ε | of 20 transitions, x_0 = 1", x_t, x
    yield ("          mean of ᾱ_t x_0 + …, as printed in the box | of 20 transitions",
           ddpm.alpha_bar[20], x)


def distance(chain: Iterator, other: Iterator) -> Tensor:
    """The largest difference of two chains from the same noise."""
    torch.manual_seed(1)
    states = [x_t for _, x_t in chain]
    torch.manual_seed(1)
    return torch.stack([x_t - y_t for x_t, (_, y_t) in zip(states, other)]).abs().max()


def section_2_5() -> Iterator[tuple]:
    ddpm, image, x, t = ExactDDPM(), ExactDDPM(predict="image"), torch.randn(100).double(), 50
    alpha, alpha_bar, noise_hat = ddpm.alpha[t], ddpm.alpha_bar[t], ddpm.predict_noise(x, t)
    mean = (x - (1 - alpha) / (1 - alpha_bar).sqrt() * noise_hat) / alpha.sqrt()
    yield ("(2.52)    0 | largest distance of the means of (2.52) and (2.48), t = 50", 0,
           (mean - image.p_transition(x, t)[0]).abs().max())
    yield ("          0 | largest difference of the chains by ε̂_θ and x̂_θ", 0,
           distance(ddpm.reverse_chain(x), image.reverse_chain(x)))


def section_2_6() -> Iterator[tuple]:
    A, covariance = torch.tensor([[1.0, 0.5], [-1.0, 2.0]]), torch.diag(torch.tensor([1.0, 0.09]))
    x = torch.randn(100_000, 2) * covariance.diag().sqrt()  # Λ⁻¹ = diag(1, 0.09)
    y = x @ A.T + 1 + 0.5 * torch.randn(100_000, 2)         # L⁻¹ = 0.25 I
    yield ("Thm 2.8   L⁻¹ + A Λ⁻¹ Aᵀ | covariance of y_1 and y_2",
           (0.25 * torch.eye(2) + A @ covariance @ A.T)[0, 1], (y - 1).prod(1))

    ddpm, n = ExactDDPM(), 100_000
    knows = DDPM(lambda x, t: torch.full_like(x, 0.35), ddpm.alpha[1:], "image")
    x = dict(knows.ddim_chain(torch.randn(n).double(), knows.T, eta=0.5))
    alpha_bar, sigma2 = knows.alpha_bar[20], 0.5**2 * knows.variance_q[21]
    rest, noise = x[20] - alpha_bar.sqrt() * 0.35, knows.predict_noise(x[21], 21)
    first_try = (1 - alpha_bar).sqrt() * noise + 0.5 * torch.randn(n)
    yield ("Thm 2.9   1 − ᾱ_20 | variance of x_20 by DDIM, η = ½, if x̂_θ = x_0", 1 - alpha_bar,
           rest**2)
    yield ("          η² σ_q²(21) | variance of x_20 given x_21 and x_0, η = ½", sigma2,
           (rest - (1 - alpha_bar - sigma2).sqrt() * noise)**2)
    yield ("          1 − ᾱ_20 + σ_t², σ_t = ½ | variance by the first try, √(1 − ᾱ_20)",
           1 - alpha_bar + 0.25, first_try**2)

    x_T = torch.randn(100).double()
    yield ("(2.60)    0 | largest difference of DDIM's chain, η = 1 and every t, and DDPM's", 0,
           distance(ddpm.reverse_chain(x_T), ddpm.ddim_chain(x_T, ddpm.T)))


EXAMPLES = section_2_1, sections_2_2_and_2_3, section_2_4, section_2_5, section_2_6


def main():
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's can't, and need not
        sys.stdout.reconfigure(encoding="utf-8")
    torch.manual_seed(0)
    print("     formula    computed   formula | what computes it (≠: an error of the print)")
    for section in EXAMPLES:
        for what, *sides in section():
            formula, computed = (torch.as_tensor(x, dtype=torch.float64).mean() for x in sides)
            print(f"{formula:12.5f}{computed:12.5f} {'≠' if 'as printed' in what else ' '} {what}")


if __name__ == "__main__":
    main()
