# SPDX-License-Identifier: MIT
"""Section 2 of the tutorial: the denoising diffusion probabilistic model (DDPM).

§, theorem, example and equation numbers refer to Stanley Chan, "Tutorial on Diffusion Models for
Imaging and Vision" (arXiv 2403.18103), version 3, January 2025; the class follows its order.

Building Blocks (§2.1, Fig. 2.1 to 2.4). A chain of images of the same shape, from an image x_0 to
white noise x_T. q(x_t | x_{t−1}) steps to the right, p_θ(x_{t−1} | x_t) to the left:

    x_0  ⇄  x_1  ⇄  …  ⇄  x_{t−1}  ⇄  x_t  ⇄  …  ⇄  x_T

    transition block   q is fixed and adds a little noise; p_θ is learned and removes it
    initial block      x_0 has a neighbour on the right only
    final block        x_T has a neighbour on the left only, and is close to N(0, I)

It is a VAE in T steps. The encoder q has nothing to learn, and its steps are so small that each,
reversed, is nearly Gaussian, as p_θ is. `python ddpm.py` checks examples and theorems numerically.
"""
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

if __name__ == "__main__":  # hides torch's warning; NumPy is not needed
    warnings.filterwarnings("ignore", "Failed to initialize NumPy")

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Categorical, MixtureSameFamily, Normal, kl_divergence


class DDPM(nn.Module):
    """The chain of §2 with any denoiser, for images or other data of fixed shape: x_t is (B, …).

    Args:
        denoiser: the network, called as denoiser(x_t, t), t being (B,) integers in 1..T (so an
            nn.Embedding needs T + 1 rows); returns a tensor of x_t's shape.
        alphas: α_1, …, α_T in (0, 1), T ≥ 2, α_1 ≥ 0.4, and their product ᾱ_T in (1e-50, 0.1).
        predict: what the network predicts: "noise", ε̂_θ(x_t) (§2.5), or "image", x̂_θ(x_t) (§2.4).
        clip: whether to clip x̂_θ to [-1, 1], the range of images, as the code of arXiv 2006.11239
            does. At large t the error of ε̂_θ is divided by a small √ᾱ_t, and a single value out of
            range would spoil all later steps. Pass False for data beyond ±1 (points, latents,
            signals): clipping makes their samples wrong, without an error.

    Images are float tensors (B, C, H, W) in [-1, 1]. A time t is an int or a (B,) integer tensor,
    in 1..T as in the paper. Tables have T + 1 entries and are indexed by t itself. A Gaussian is
    the pair (mean, variance), where the variance is one number or (B, 1, …, 1). One reverse step is
    `reverse_chain` → `p_transition` → `predict_x0` (→ `predict_noise`) → `output` → denoiser.
    `state_dict()` holds the network only. Raises ValueError for alphas, t, steps, eta or k out of
    range, for an x that is not a floating-point tensor, and if the network changes its shape.
    """

    def __init__(self, denoiser: Callable[[Tensor, Tensor], Tensor],
                 alphas: Tensor | Sequence[float], predict: str = "noise", clip: bool = True):
        super().__init__()
        # The paper's α_t is 1 − β_t in arXiv 2006.11239. Tables are float64, on the CPU: in float32
        # 1 − ᾱ_1 of `linear_alphas` would keep only four correct digits.
        alphas = checked_alphas(alphas)
        self.alpha = F.pad(alphas, (1, 0), value=1.0)                        # α_0 = 1
        self.alpha_bar = self.alpha.cumprod(0)                               # ᾱ_t = α_1 α_2 … α_t
        self.alpha_bar_prev = F.pad(self.alpha_bar[:-1], (1, 0), value=1.0)  # ᾱ_{t−1}
        variance_q = (1 - self.alpha) * (1 - self.alpha_bar_prev) / (1 - self.alpha_bar)
        self.variance_q = variance_q.nan_to_num()  # σ_q²(t), (2.32); at t = 0 it is 0 / 0
        self.denoiser, self.T, self.predict, self.clip = denoiser, len(alphas), predict, clip
        if predict not in ("noise", "image"):
            raise ValueError(f"predict must be 'noise' or 'image', got {predict!r}")

    # -------------------------------------------------- §2.1 Building Blocks: q(x_t | …)

    def q_transition(self, x_prev: Tensor, t: int | Tensor) -> tuple[Tensor, Tensor]:
        """q(x_t | x_{t−1}) = N(x_t | √α_t x_{t−1}, (1 − α_t) I)    Def. 2.1, (2.1)

        Why "the magical scalars" √α_t and 1 − α_t (Thm 2.1)? x_t = a x_{t−1} + b ε (2.3) has a
        variance that tends to b² (1 + a² + a⁴ + …) = b² / (1 − a²) (2.4), (2.5), (2.6). It is 1,
        and the chain ends in N(0, I), only if b² = 1 − a² (2.7): for a = √α_t, b² is 1 − α_t.
        """
        scale, variance = self.at(t, x_prev, self.alpha.sqrt(), 1 - self.alpha)
        return scale * x_prev, variance

    def q_marginal(self, x_0: Tensor, t: int | Tensor) -> tuple[Tensor, Tensor]:
        """q(x_t | x_0) = N(x_t | √ᾱ_t x_0, (1 − ᾱ_t) I)    Thm 2.2, (2.8), (2.12)

        t transitions at once, so that training need not simulate the chain. By induction (2.9),
        (2.10): a transition multiplies the mean by √α_t, and the variances of independent noise
        add up, α_t (1 − ᾱ_{t−1}) + 1 − α_t = 1 − ᾱ_t.
        """
        scale, variance = self.at(t, x_0, self.alpha_bar.sqrt(), 1 - self.alpha_bar)
        return scale * x_0, variance

    def q_sample(self, x_0: Tensor, t: int | Tensor, noise: Tensor) -> Tensor:
        """x_t = √ᾱ_t x_0 + √(1 − ᾱ_t) ε with ε = noise ~ N(0, I)    (2.11)"""
        scale, std = self.at(t, x_0, self.alpha_bar.sqrt(), (1 - self.alpha_bar).sqrt())
        return scale * x_0 + std * noise

    # -------------------------------------------------- §2.2 Evidence Lower Bound

    @torch.no_grad()
    def elbo(self, x_0: Tensor, k: int | None = None) -> dict[str, Tensor]:
        """log p(x_0) ≥ E_{q(x_{1:T} | x_0)} log [p(x_{0:T}) / q(x_{1:T} | x_0)]            (2.17)

                     = reconstruction − prior_matching − consistency              Thm 2.4, (2.21)

        As in §1.2: p(x_0) is an integral, here over all x_{1:T}, and q gives a bound instead.
        Returns the three terms, each (B,), in nats per image (x_0 in [-1, 1]), without gradients:

            reconstruction   E log p_θ(x_0 | x_1),                            x_1 ~ q(x_1 | x_0)
            prior_matching   KL(q(x_T | x_0) ‖ p(x_T)),                       p(x_T) = N(0, I)
            consistency      Σ_{t=2..T} E KL(q(x_{t−1} | x_t, x_0) ‖ p_θ(x_{t−1} | x_t)),
                                                                              x_t ~ q(x_t | x_0)

        The first form, Thm 2.3, (2.14), (2.15), (2.16), compares q(x_t | x_{t−1}) with
        p_θ(x_t | x_{t+1}): two random neighbours of x_t. (As printed, it does not equal (2.17).)
        Here q is reversed by Bayes' rule (2.20), so each term has only one random state. Each
        expectation is estimated from one sample, and with k the sum over t from k random t per
        image, without bias. The bound is on the log probability of 8-bit pixels ("pixel": one
        value of one channel), `VAE.elbo`'s on a log density; `bits_per_dim` compares them.
        """
        check_floats(x_0, torch.float32, torch.float64)
        if not x_0.abs().max() <= 1:
            raise ValueError(f"x_0 must be in [-1, 1], but max |x_0| is {x_0.abs().max():.4g}")

        # The initial block. In Thm 2.7, (2.44), it is the term t = 1, which divides by σ_q²(1) = 0:
        # unless x̂_θ hits every pixel exactly, the bound is −∞. So here p_θ(x_0 | x_1) has σ_q²(2),
        # the next step's variance, and each pixel counts with the probability of its bin.
        mean, _ = self.p_transition(self.q_sample(x_0, 1, torch.randn_like(x_0)), 1)
        (std,) = self.at(2, x_0, self.variance_q.sqrt())
        reconstruction = log_pixel_mass(x_0, mean, std)

        # The final block, by Thm 1.3. It has no θ, so it trains nothing (Thm 2.6). It is near 0,
        # because ᾱ_T is: q(x_T | x_0) is nearly the N(0, I) that the reverse chain starts from.
        mean, variance = self.q_marginal(x_0, self.T)
        prior_matching = 0.5 * (variance - 1 + mean**2 - variance.log())

        # The transition blocks (Thm 2.6, (2.38)). q and p_θ are Gaussians of the same variance, so
        # their KL is ‖μ_q − μ_θ‖² / 2σ_q²(t) (2.35), (2.36), (2.37). In terms of x_0 and x̂_θ it is
        # [1/2σ_q²(t)] [(1 − α_t)² ᾱ_{t−1} / (1 − ᾱ_t)²] ‖x̂_θ(x_t) − x_0‖² (2.43).
        times, weights = self.importance_sampling(k, len(x_0))
        consistency = torch.zeros_like(x_0)
        for t in times:  # one t for all images, or (B,)
            x_t = self.q_sample(x_0, t, torch.randn_like(x_0))
            mu_q, variance = self.q_posterior(x_t, x_0, t)
            mu_theta, _ = self.p_transition(x_t, t)
            (weight,) = self.at(t, x_0, weights)
            consistency += weight * (mu_q - mu_theta)**2 / (2 * variance)

        terms = {"reconstruction": reconstruction, "prior_matching": prior_matching,
                 "consistency": consistency}
        return {name: term.reshape(len(x_0), -1).sum(1) for name, term in terms.items()}

    # -------------------------------------------------- §2.3 Distribution of the Reverse Process

    def q_posterior(self, x_t: Tensor, x_0: Tensor, t: int | Tensor) -> tuple[Tensor, Tensor]:
        """q(x_{t−1} | x_t, x_0) = N(x_{t−1} | μ_q(x_t, x_0), σ_q²(t) I)    Thm 2.5, (2.23), (2.24)

            μ_q     = (1 − ᾱ_{t−1}) √α_t / (1 − ᾱ_t) · x_t  +  (1 − α_t) √ᾱ_{t−1} / (1 − ᾱ_t) · x_0
            σ_q²(t) = (1 − α_t)(1 − ᾱ_{t−1}) / (1 − ᾱ_t)

        This is the target for p_θ. q(x_{t−1} | x_t) cannot be computed: it would need the
        distribution of all images. Given x_0 as well, which training knows, Bayes' rule (2.20) has
        three known Gaussians, q(x_t | x_{t−1}) q(x_{t−1} | x_0) / q(x_t | x_0), and gives a fourth.
        μ_q (2.25), (2.31) is a weighted sum of x_t and x_0 (Fig. 2.9), whose weights sum to less
        than 1 for t > 1. At t = 1 it is x_0, and σ_q²(1) = 0: x_{t−1} is then the given x_0 itself.
        ((2.26) is misprinted with √ᾱ_{t−1} for ᾱ_{t−1}; (2.32) is right.)
        """
        c_t, c_0, variance = self.at(
            t, x_t, (1 - self.alpha_bar_prev) * self.alpha.sqrt() / (1 - self.alpha_bar),
            (1 - self.alpha) * self.alpha_bar_prev.sqrt() / (1 - self.alpha_bar), self.variance_q)
        return c_t * x_t + c_0 * x_0, variance

    def p_transition(self, x_t: Tensor, t: int | Tensor) -> tuple[Tensor, Tensor]:
        """p_θ(x_{t−1} | x_t) = N(x_{t−1} | μ_θ(x_t), σ_q²(t) I)    (2.34)

        Its variance is set to that of its target, `q_posterior`, so that only the means differ,
        as in (2.37). μ_θ is μ_q with the prediction x̂_θ(x_t) for the unknown x_0 (2.41), (2.42).
        Without clipping, in terms of ε̂_θ, it is (2.50), as μ_q is (2.49) in terms of ε:
        x_t / √α_t − (1 − α_t) / (√(1 − ᾱ_t) √α_t) · ε̂_θ(x_t). A subclass may return another
        variance: `reverse_chain` uses it, `elbo` and DDIM ignore it.
        """
        return self.q_posterior(x_t, self.predict_x0(x_t, t), t)

    # -------------------------------------------------- §2.4 Training and Inference

    def predict_x0(self, x_t: Tensor, t: int | Tensor) -> Tensor:
        """x̂_θ(x_t), clipped if `clip` is set. From ε̂_θ, by solving (2.11) for x_0:
        (x_t − √(1 − ᾱ_t) ε̂_θ(x_t)) / √ᾱ_t."""
        scale, std = self.at(t, x_t, self.alpha_bar.sqrt(), (1 - self.alpha_bar).sqrt())
        x0_hat = (self.output(x_t, t) if self.predict == "image"
                  else (x_t - std * self.predict_noise(x_t, t)) / scale)
        return x0_hat.clamp(-1, 1) if self.clip else x0_hat

    def loss(self, x_0: Tensor) -> Tensor:
        """‖x̂_θ(x_t) − x_0‖² (§2.4) or ‖ε̂_θ(x_t) − ε‖² (§2.5): a scalar, the mean over all pixels.

        The algorithm boxes "Training Algorithm for DDPM" (2.47) and "Training DDPM using ε̂_θ",
        without the gradient step. (The first is misprinted with ᾱ_t x_0 for √ᾱ_t x_0.) A random t
        stands for the ELBO's sum over t, and the batch averages over many. In the ELBO each t has
        its own weight, for x̂_θ that of (2.43). The boxes drop it; for ε̂_θ this costs some
        likelihood but gives better pictures (arXiv 2006.11239, section 3.4). ε̂_θ is the default,
        as its error reaches x̂_θ times √(1 − ᾱ_t) / √ᾱ_t: little at small t, where (2.43) is large.
        """
        check_floats(x_0)
        t = torch.randint(1, self.T + 1, x_0.shape[:1])  # t ~ Uniform[1, T]
        noise = torch.randn_like(x_0)                    # ε ~ N(0, I)
        x_t = self.q_sample(x_0, t, noise)               # √ᾱ_t x_0 + √(1 − ᾱ_t) ε
        target = noise if self.predict == "noise" else x_0
        return F.mse_loss(self.output(x_t, t), target)

    def forward(self, x_0: Tensor) -> Tensor:
        return self.loss(x_0)  # ddpm(x_0) is the loss, also inside DistributedDataParallel

    @torch.no_grad()
    def reverse_chain(self, x_T: Tensor) -> Iterator[tuple[int, Tensor]]:
        """x_{t−1} = μ_θ(x_t) + σ_q(t) z,    z ~ N(0, I),    for t = T, …, 1    (2.48)

                = (x_t − (1 − α_t) / √(1 − ᾱ_t) · ε̂_θ(x_t)) / √α_t  +  σ_q(t) z    (2.51), (2.52)

        Both "Inference of DDPM" boxes; the caller does their first line, x_T ~ N(0, I). Even with
        ε̂_θ the step uses x̂_θ, so that it can be clipped. Yields (t, x_t), t = T − 1, …, 0.
        To steer this chain or `ddim_chain`, overwrite the yielded tensor: x_t.copy_(…).
        """
        x_t = x_T
        for t in range(self.T, 0, -1):
            mean, variance = self.p_transition(x_t, t)
            # x_{t−1} = μ_θ(x_t) + σ_q(t) z. The last step adds no noise, because σ_q(1) = 0.
            x_t = mean + variance.sqrt() * torch.randn_like(x_t)
            yield t - 1, x_t

    def chain(self, x_T: Tensor, steps: int | Sequence[int] | None = None,
              eta: float = 1.0) -> Iterator[tuple[int, Tensor]]:
        """`ddim_chain` if `steps` is given or η is not 1, else `reverse_chain`."""
        check_floats(x_T, torch.float32, torch.float64)
        if x_T.requires_grad and torch.is_grad_enabled():
            raise ValueError("x_T requires a gradient, but a chain has none. One with gradients: "
                             "DDPM.ddim_chain.__wrapped__(ddpm, x_T, steps, eta)")
        if steps is None and eta == 1:
            return self.reverse_chain(x_T)
        return self.ddim_chain(x_T, self.T if steps is None else steps, eta)

    def sample(self, x_T: Tensor, steps: int | Sequence[int] | None = None,
               eta: float = 1.0) -> Tensor:
        """The last state of `chain`, x_0: new images. x_T ~ N(0, I) is (B, …), float32 or float64,
        on the network's device. If the network has dropout, call `eval()` first, and `train()`
        before you resume training."""
        for _, x_t in self.chain(x_T, steps, eta):
            pass
        return x_t

    # -------------------------------------------------- §2.5 Predicting Noise
    # Its two boxes are `loss` and `reverse_chain` above, with predict = "noise".

    def noise_between(self, x_0: Tensor, x_t: Tensor, t: int | Tensor) -> Tensor:
        """ε = (x_t − √ᾱ_t x_0) / √(1 − ᾱ_t), the noise from x_0 to x_t: (2.11) solved for ε"""
        scale, std = self.at(t, x_t, self.alpha_bar.sqrt(), (1 - self.alpha_bar).sqrt())
        return (x_t - scale * x_0) / std

    def predict_noise(self, x_t: Tensor, t: int | Tensor) -> Tensor:
        """ε̂_θ(x_t). From x̂_θ: the noise between the unclipped x̂_θ and x_t."""
        self.at(t, x_t)  # raises ValueError for an invalid t
        output = self.output(x_t, t)
        return output if self.predict == "noise" else self.noise_between(output, x_t, t)

    # -------------------------------------------------- §2.6 DDIM

    @torch.no_grad()
    def ddim_chain(self, x_T: Tensor, steps: int | Sequence[int],
                   eta: float = 1.0) -> Iterator[tuple[int, Tensor]]:
        """x_s = √ᾱ_s x̂_θ(x_t) + √(1 − ᾱ_s − σ_t²) ε̂_θ(x_t) + σ_t z,  z ~ N(0, I)  (2.58), (2.59)

        The sum of the predicted x_0, a direction pointing to x_t and fresh noise; s < t is the next
        time, the paper's t − 1 or further down. (§2.6 prints α_t for ᾱ_t.)

        The idea: in x_s = √ᾱ_s x_0 + √(1 − ᾱ_s) ε let ε be the noise from x_0 to x_t, then draw a
        part of it afresh (2.53), (2.54), (2.55), (2.56). With σ_t² under the root, every marginal
        q(x_s | x_0) is the same for any σ_t (Thm 2.9, (2.57)); the loss knows only these marginals,
        so one trained network serves any σ_t and any s. With √(1 − ᾱ_s), the paper's first try, the
        variance is too large by σ_t². The paper leaves σ_t open; here it is taken from "Denoising
        Diffusion Implicit Models" (arXiv 2010.02502):

            σ_t² = η² (1 − ᾱ_s) (1 − ᾱ_t / ᾱ_s) / (1 − ᾱ_t),      0 ≤ η ≤ 1

        η = 1 is DDPM with longer steps and, with steps = T, `reverse_chain` (2.60). ε̂_θ is
        recomputed from the clipped x̂_θ. Yields (s, x_s), s = 0 last; `times` explains `steps`.
        Invalid arguments raise ValueError at the first item.
        """
        if not 0 <= eta <= 1:
            raise ValueError(f"eta must be in [0, 1], got {eta}")
        x_t = x_T
        for t, s in pairwise([*self.times(steps), 0]):
            x0_hat = self.predict_x0(x_t, t)
            noise_hat = self.noise_between(x0_hat, x_t, t)
            alpha_bar_t, alpha_bar_s = self.alpha_bar[t].item(), self.alpha_bar[s].item()
            # The quotient first: even rounded, it is at most 1, so 1 − ᾱ_s − σ_t² is never < 0.
            quotient = (1 - alpha_bar_t / alpha_bar_s) / (1 - alpha_bar_t)
            sigma2 = eta**2 * (1 - alpha_bar_s) * quotient
            x_t = (alpha_bar_s**0.5 * x0_hat + (1 - alpha_bar_s - sigma2)**0.5 * noise_hat
                   + sigma2**0.5 * torch.randn_like(x_t))
            yield s, x_t

    # -------------------------------------------------- §3.2 (Stein's) Score Function

    def score(self, x_t: Tensor, t: int | Tensor) -> Tensor:
        """∇ log p_t(x_t) ≈ −ε̂_θ(x_t) / √(1 − ᾱ_t), s_θ(x_t) in section 3 of the paper, because
        ∇ log q(x_t | x_0) = −(x_t − √ᾱ_t x_0) / (1 − ᾱ_t) = −ε / √(1 − ᾱ_t). ∇ log p_t(x_t) is the
        mean of this over q(x_0 | x_t), and ε̂_θ(x_t) estimates the mean of ε."""
        (std,) = self.at(t, x_t, (1 - self.alpha_bar).sqrt())
        return -self.predict_noise(x_t, t) / std

    # -------------------------------------------------- not in the paper

    def at(self, t: int | Tensor, x: Tensor, *tables: Tensor) -> list[Tensor]:
        """table[t] of each table, in x's precision, on its device, and shaped so that it multiplies
        x: () for one t or (B, 1, …, 1). The first half checks x and t."""
        check_floats(x)
        t = torch.as_tensor(t, device="cpu")
        # As floats: uint8 ends at 255. torch.compile cannot branch on the values of t.
        wrong = [] if torch.compiler.is_compiling() else t[(t < 1) | (t.double() > self.T)].tolist()
        if t.is_floating_point() or t.shape not in ((), x.shape[:1]) or wrong:
            raise ValueError(f"t must be one integer or {len(x)} integers in 1..{self.T}, got "
                             f"{wrong[0] if wrong else f'{t.dtype} {tuple(t.shape)}'}")
        t = t.long()  # a uint8 index would be a mask
        if t.ndim == 0:  # new_full: no copy to the device, for which the CPU might have to wait
            return [x.new_full((), table[t].item()) for table in tables]
        t = t.view(-1, *[1] * (x.ndim - 1))
        return [table[t].to(x.device, x.dtype, non_blocking=x.is_cuda) for table in tables]

    def output(self, x_t: Tensor, t: int | Tensor) -> Tensor:
        """The denoiser's output at t, in x_t's precision even under autocast."""
        if torch.as_tensor(t).is_floating_point():
            raise ValueError(f"t must be integers in 1..{self.T}, got {t}")
        if not isinstance(t, Tensor) or t.ndim == 0:
            t = x_t.new_full(x_t.shape[:1], int(t), dtype=torch.long)
        output = self.denoiser(x_t, t.to(x_t.device, torch.long, non_blocking=x_t.is_cuda))
        if output.shape != x_t.shape:
            raise ValueError(f"denoiser: shape must be {tuple(x_t.shape)}, got "
                             f"{tuple(output.shape)}")
        return output.to(x_t.dtype)

    def times(self, steps: int | Sequence[int] | Tensor) -> list[int]:
        """The times of DDIM: `steps` of them from T to 1, more near T, where long steps cost
        brightness; or the given list, range or tensor of decreasing times, x_T's first."""
        steps = steps.tolist() if isinstance(steps, Tensor) else steps
        if steps in range(1, self.T + 1) and steps is not True:
            u = torch.linspace(0, 1, int(steps), dtype=torch.float64)
            passed = torch.maximum((self.T - 1) * u**1.5, torch.arange(len(u)))  # ≥ one t apart
            return (self.T - passed).round().int().tolist()
        times = [*steps] if isinstance(steps, (list, tuple, range)) else []
        if not times or times != sorted({*times} & {*range(1, self.T + 1)}, reverse=True):
            raise ValueError(f"steps must be an integer in 1..{self.T} or a decreasing list of "
                             f"them, got {steps}")
        return [int(t) for t in times]

    def importance_sampling(self, k: int | None, B: int) -> tuple[Tensor, Tensor]:
        """The times of `elbo`'s sum over t ≥ 2, and a weight for every t, (T + 1,): all times with
        weight 1, or k random ones for each of B images, (k, B), with weight 1 / (k p), for a sum
        without bias. p, the probability of t, is proportional to its term for x_0 ~ N(0, I) and the
        best denoiser, (2.43) with E (x̂_θ − x_0)² = 1 − ᾱ_t: ½ [(1 − ᾱ_t) / (1 − ᾱ_{t−1}) − 1]."""
        if k is None:
            return torch.arange(2, self.T + 1), torch.ones(self.T + 1)
        if k < 1 or k % 1:
            raise ValueError(f"k must be a positive integer, got {k}")
        p = F.pad((1 - self.alpha_bar[2:]) / (1 - self.alpha_bar[1:-1]) - 1, (2, 0))
        times = torch.multinomial(p, int(k) * B, replacement=True).view(-1, B)
        return times, p.sum() / (k * p)  # inf for t = 0 and 1, which are never drawn

    def bits_per_dim(self, x_0: Tensor, k: int | None = None) -> Tensor:
        """−ELBO / (D ln 2): bits per dimension, (B,), for images of D = C·H·W 8-bit pixels. Without
        gradients. If the network has dropout, call `eval()` first."""
        check_pixels(x_0)
        terms = self.elbo(x_0, k)
        elbo = terms["reconstruction"] - terms["prior_matching"] - terms["consistency"]
        return -elbo / (math.prod(x_0.shape[1:]) * math.log(2))


def checked_alphas(alphas: Tensor | Sequence[float]) -> Tensor:
    """α_1, …, α_T as float64 on the CPU. Raises ValueError for what cannot be meant as α_t."""
    alphas = torch.as_tensor(alphas, dtype=torch.float64, device="cpu").detach()
    wrong = alphas[~((0 < alphas) & (alphas < 1))].tolist()
    if alphas.ndim != 1 or len(alphas) < 2 or wrong:
        raise ValueError("alphas must be two or more numbers between 0 and 1, got "
                         f"{wrong[0] if wrong else tuple(alphas.shape)}")
    if not 1e-50 < alphas.prod() < 0.1 or alphas[0] < 0.4:
        raise ValueError(f"the product of alphas is {alphas.prod():.2g} but must lie in 1e-50..0.1 "
                         "(or x_T is not white noise, or x_t is so long before T); α_1 is "
                         f"{alphas[0]:.2g} but must be at least 0.4. Did you pass 1 − α_t or ᾱ_t?")
    return alphas


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


# -------------------------------------------------- not in the paper: schedules α_t, pixel mass


def linear_alphas(T: int) -> Tensor:
    """α_1, …, α_T as a float64 (T,): 1 − α_t grows linearly, from 1e-4 to 0.02 for T = 1000, as in
    arXiv 2006.11239; for other T both ends are scaled by 1000/T. So Σ (1 − α_t) is 10.05 for every
    T ≥ 21; hence ᾱ_T < e⁻¹⁰, and x_T is white noise."""
    factor = 1000 / T
    return 1 - torch.linspace(1e-4 * factor, 0.02 * factor, T, dtype=torch.float64).clamp(max=0.999)


def cosine_alphas(T: int) -> Tensor:
    """α_1, …, α_T as a float64 (T,): ᾱ_t = f(t)/f(0), f(t) = cos²(π/2 · (t/T + s)/(1 + s)), from
    "Improved Denoising Diffusion Probabilistic Models" (arXiv 2102.09672), with its s = 0.008 and
    1 − α_t ≤ 0.999. Computing x̂_θ multiplies the error of ε̂_θ by 1/√ᾱ_t, 20,291 at t = T = 1000:
    without clipping, use `linear_alphas` or all T steps."""
    s = 0.008
    t = torch.arange(T + 1, dtype=torch.float64)
    f = torch.cos(math.pi / 2 * (t / T + s) / (1 + s)) ** 2
    return (f[1:] / f[:-1]).clamp(min=0.001)


def cauchy_alphas(T: int) -> Tensor:
    """α_1, …, α_T as a float64 (T,): log snr(t) follows the quantiles of a Cauchy distribution.

        λ_t = log snr(t) = μ + width · tan θ_t,     snr(t) = ᾱ_t / (1 − ᾱ_t), signal to noise ratio

    with θ_t evenly spaced ("Improved Noise Schedule for Diffusion Training", arXiv 2407.03297).
    More than half of the λ_t lie within one width of μ, where x_t is mostly noise and the image
    takes shape; there the increments of λ_t are smallest (0.003 for T = 1000). The heavy tails
    serve the ELBO: even the largest increment, the first, is only 0.50 (T = 1000), and the noise at
    t = 1 (standard deviation 0.002) is small compared with a pixel's bin (0.008). For T ≥ 1000, λ
    runs from 12.4 to −10; shorter chains use a narrower range and a larger width, so that no
    increment is too large. The numbers were tuned on images; elsewhere try another first."""
    r = math.log(max(1, 1000 / T))
    mu, width = -1.5, 1.1 * math.exp(r / 2)
    first, last = (math.atan((end - mu) / width) for end in (12.4 - 2 * r, -10 + 1.15 * r))
    alpha_bar = (mu + width * torch.linspace(first, last, T, dtype=torch.float64).tan()).sigmoid()
    return alpha_bar / F.pad(alpha_bar[:-1], (1, 0), value=1.0)


def log_pixel_mass(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """log ∫ N(y | mean, std²) dy over the bin of the 8-bit pixel x, elementwise, in nats. This is
    p_θ(x_0 | x_1) in arXiv 2006.11239, section 3.3. A bin reaches halfway to its neighbours, which
    are 2/255 away, and the two outermost bins reach to ±∞, so that the 256 masses sum to 1."""
    lower = torch.where(x < -1 + 1 / 255, -math.inf, (x - 1 / 255 - mean) / std)
    upper = torch.where(x > 1 - 1 / 255, math.inf, (x + 1 / 255 - mean) / std)
    # log(Φ(upper) − Φ(lower)). A bin to the right of the mean is mirrored to the left, where Φ is
    # small and log Φ keeps its precision; on the right, Φ rounds to 1.
    right = lower > 0
    ends = torch.stack([torch.where(right, -upper, lower), torch.where(right, -lower, upper)])
    try:
        log_lower, log_upper = torch.special.log_ndtr(ends)
    except NotImplementedError:  # not implemented on Apple's mps
        log_lower, log_upper = torch.special.log_ndtr(ends.cpu()).to(ends.device)
    return log_upper + torch.log(-torch.expm1(log_lower - log_upper))


# -------------------------------------------------- worked examples: python ddpm.py
# If you copy this file, you can delete all below. Functions yield rows (what, formula, computed),
# the last two numbers, or tensors whose mean is printed. Rows "as printed" show an error.
ONE = torch.ones(1, dtype=torch.float64)


class ExactDDPM(DDPM):
    """A DDPM with the exact denoiser, so nothing to learn: each pixel is drawn from a mixture of
    Gaussians, p(x_0) = Σ_k π_k N(μ_k, σ_k²), and the denoiser is E[ε | x_t] or E[x_0 | x_t]. The
    defaults are those of Ex. 2.1; T = 200 is our choice."""

    def __init__(self, alphas: Tensor = torch.full((200,), 0.97), predict: str = "noise",
                 clip: bool = False, pi=(0.3, 0.7), mu=(-2.0, 2.0), sigma=(0.2, 1.0)):
        super().__init__(self.exact, alphas, predict, clip)
        self.pi, self.mu, self.sigma = torch.tensor([pi, mu, sigma], dtype=torch.float64)
        self.p(0)  # torch refuses π_k < 0 or σ_k = 0 here, and lists of unequal length above

    def p(self, t: int | Tensor) -> MixtureSameFamily:
        """p_t(x) = Σ_k π_k N(x | √ᾱ_t μ_k, 1 − ᾱ_t + ᾱ_t σ_k²)    Ex. 2.2, (2.13)"""
        alpha_bar = self.alpha_bar[t].unsqueeze(-1)
        variance = 1 - alpha_bar + alpha_bar * self.sigma**2
        return MixtureSameFamily(Categorical(self.pi.expand_as(variance)),
                                 Normal(alpha_bar.sqrt() * self.mu, variance.sqrt()))

    def exact(self, x_t: Tensor, t: Tensor) -> Tensor:
        """E[x_0 | x_t] = Σ_k p(k | x_t) [μ_k + √ᾱ_t σ_k² / v_k · (x_t − √ᾱ_t μ_k)], where v_k is
        1 − ᾱ_t + ᾱ_t σ_k². E[ε | x_t] is the noise that takes E[x_0 | x_t] to x_t."""
        components = self.p(t.view(-1, *[1] * (x_t.ndim - 1))).component_distribution
        x, (scale,) = x_t.unsqueeze(-1), self.at(t, x_t, self.alpha_bar.sqrt())
        posterior = (self.pi.log() + components.log_prob(x)).softmax(-1)  # p(k | x_t)
        gain = scale.unsqueeze(-1) * self.sigma**2 / components.variance
        x0_hat = (posterior * (self.mu + gain * (x - components.mean))).sum(-1)
        return x0_hat if self.predict == "image" else self.noise_between(x0_hat, x_t, t)


def normal(moments: tuple[Tensor, Tensor]) -> Normal:
    mean, variance = moments
    return Normal(mean, variance.sqrt())


def section_2_1() -> Iterator[tuple]:
    # After 20 transitions: 100,000 pixels of Ex. 2.1's mixture, and by (2.2) its two components. A
    # third one, x_0 = 1 of variance 0, serves Thm 2.2.
    ddpm, x_t = ExactDDPM(), ExactDDPM().p(0).sample((100_000,))
    mean, variance = torch.cat([ddpm.mu, ONE]), torch.cat([ddpm.sigma**2, 0 * ONE])
    for t in range(1, 21):
        scale, added = ddpm.q_transition(ONE, t)
        mean, variance = scale * mean, scale**2 * variance + added
        x_t = normal(ddpm.q_transition(x_t, t)).sample()
    p_20, components = ddpm.p(20), ddpm.p(20).component_distribution
    for k in (0, 1):
        yield (f"Ex. 2.1   t = 20, component {k + 1}: mean by (2.13) vs. by 20 steps of (2.2)",
               components.mean[k], mean[k])
        yield "          variance by (2.13) vs. by (2.2)", components.variance[k], variance[k]

    x = torch.zeros(100_000)
    for _ in range(60):
        x = 0.9 * x + 0.5 * torch.randn_like(x)
    yield "Thm 2.1   b²/(1 − a²), a = 0.9, b = 0.5 vs. simulated variance", 0.25 / 0.19, x**2

    scale, at_once = ddpm.q_marginal(ONE, 20)
    yield "Thm 2.2   t = 20: √ᾱ_t vs. product of 20 transitions", scale, mean[2]
    yield "          1 − ᾱ_t vs. variance of 20 transitions", at_once, variance[2]
    yield "Ex. 2.2   t = 20: mean of (2.13) vs. of 100,000 simulated pixels", p_20.mean, x_t
    yield "          variance of (2.13) vs. of the pixels", p_20.variance, (x_t - p_20.mean)**2
    yield "          fraction below 0 by (2.13) vs. of the pixels", p_20.cdf(0 * ONE), x_t < 0


def sections_2_2_and_2_3() -> Iterator[tuple]:
    # Draws 20,000 chains x_0 = 0.35, x_1, …, x_T, with q(x_t | x_{t−1}) and p_θ(x_{t−1} | x_t) at
    # each step. `initial` is log p_θ(x_0 | x_1); the mean of `bound` is (2.17).
    ddpm, T, white = ExactDDPM(), 200, Normal(0.0, 1.0)
    x, q, p = [0.35 * ONE.expand(20_000)], {}, {}
    for t in range(1, T + 1):
        q[t] = normal(ddpm.q_transition(x[t - 1], t))
        x.append(q[t].sample())
        if t > 1:
            p[t] = normal(ddpm.p_transition(x[t], t))
    initial = log_pixel_mass(x[0], ddpm.p_transition(x[1], 1)[0], p[2].stddev)
    bound = (initial + sum(p[t].log_prob(x[t - 1]) for t in p) + white.log_prob(x[-1])
             - sum(q[t].log_prob(x[t]) for t in q))
    # (2.14) compares q(x_t | x_{t−1}), which is q[t], with p_θ(x_t | x_{t+1}), which is p[t + 1].
    printed = initial - kl_divergence(q[T], white) - sum(
        kl_divergence(q[t], p[t + 1]) for t in range(1, T))
    drawn = initial - (q[T].log_prob(x[T]) - white.log_prob(x[T])) - sum(
        q[t].log_prob(x[t]) - p[t + 1].log_prob(x[t]) for t in range(1, T))
    yield "Thm 2.3   (2.14) as printed, with KLs vs. (2.17)", printed, bound
    yield ("          0 vs. largest difference between (2.17) and (2.14) with log q/p for KL", 0,
           (drawn - bound).abs().max())

    terms = ddpm.elbo(x[0])
    yield ("Thm 2.4   (2.17), simulated from x_0 = 0.35 vs. (2.21), by DDPM.elbo", bound,
           terms["reconstruction"] - terms["prior_matching"] - terms["consistency"])

    # Bayes' rule, q(x_{t−1} | x_t, x_0) ∝ q(x_t | x_{t−1}) q(x_{t−1} | x_0); softmax normalises it.
    t, grid = 20, torch.linspace(-4, 4, 400_001, dtype=torch.float64)
    weight = (normal(ddpm.q_transition(grid, t)).log_prob(0.3 * ONE)
              + normal(ddpm.q_marginal(0.8 * ONE, t - 1)).log_prob(grid)).softmax(0)
    mean, variance = ddpm.q_posterior(0.3 * ONE, 0.8 * ONE, t)
    bayes = (weight * (grid - mean)**2).sum()
    printed = (1 - ddpm.alpha[t]) * (1 - ddpm.alpha_bar[t - 1].sqrt()) / (1 - ddpm.alpha_bar[t])
    yield "Thm 2.5   μ_q of (2.25) vs. by Bayes' rule on a grid", mean, (weight * grid).sum()
    yield "          σ_q² of (2.32) vs. by Bayes' rule", variance, bayes
    yield "          σ_q² of (2.26) as printed, with √ᾱ_{t−1} vs. by Bayes' rule", printed, bayes

    q_50 = normal(ddpm.q_posterior(x[50], x[0], 50))
    yield ("Thm 2.6   t = 50: ‖μ_q − μ_θ‖² / 2σ_q² vs. KL(q ‖ p_θ)",
           ((q_50.mean - p[50].mean)**2 / (2 * q_50.variance))[0], kl_divergence(q_50, p[50])[0])


def section_2_4() -> Iterator[tuple]:
    ddpm, x = ExactDDPM(), ONE.expand(100_000)
    zero = DDPM(lambda x, t: torch.zeros_like(x), ddpm.alpha[1:], "image")
    snr = zero.alpha_bar / (1 - zero.alpha_bar)
    yield ("Thm 2.7   ½ ‖x_0‖² [snr(1) − snr(T)], snr = ᾱ/(1−ᾱ) vs. (2.44), t ≥ 2, x̂_θ = 0",
           0.5 * 0.35**2 * (snr[1] - snr[-1]), zero.elbo(0.35 * ONE)["consistency"])
    yield "(2.44)    0 vs. σ_q²(1), by which the term t = 1 is divided", 0, zero.variance_q[1]

    x_t = ddpm.q_sample(x, 20, torch.randn(100_000))
    for t in range(1, 21):
        x = normal(ddpm.q_transition(x, t)).sample()
    yield "Training  mean of √ᾱ_t x_0 + √(1 − ᾱ_t) ε vs. after 20 transitions, x_0 = 1", x_t, x
    yield ("          mean of ᾱ_t x_0 + …, as printed in the box vs. after 20 transitions",
           ddpm.alpha_bar[20], x)


def difference(chain: Iterator, other: Iterator) -> Tensor:
    """The largest difference between two chains driven by the same noise."""
    torch.manual_seed(1)
    states = [x_t for _, x_t in chain]
    torch.manual_seed(1)
    return torch.stack([x_t - y_t for x_t, (_, y_t) in zip(states, other)]).abs().max()


def section_2_5() -> Iterator[tuple]:
    ddpm, image, x, t = ExactDDPM(), ExactDDPM(predict="image"), torch.randn(100).double(), 50
    alpha, alpha_bar, noise_hat = ddpm.alpha[t], ddpm.alpha_bar[t], ddpm.predict_noise(x, t)
    mean = (x - (1 - alpha) / (1 - alpha_bar).sqrt() * noise_hat) / alpha.sqrt()
    yield ("(2.52)    0 vs. largest difference between the means of (2.52) and (2.48), t = 50", 0,
           (mean - image.p_transition(x, t)[0]).abs().max())
    yield ("          0 vs. largest difference between the chains by ε̂_θ and by x̂_θ", 0,
           difference(ddpm.reverse_chain(x), image.reverse_chain(x)))


def section_2_6() -> Iterator[tuple]:
    A, covariance = torch.tensor([[1.0, 0.5], [-1.0, 2.0]]), torch.diag(torch.tensor([1.0, 0.09]))
    x = torch.randn(100_000, 2) * covariance.diag().sqrt()  # Λ⁻¹ = diag(1, 0.09)
    y = x @ A.T + 1 + 0.5 * torch.randn(100_000, 2)         # L⁻¹ = 0.25 I
    yield ("Thm 2.8   L⁻¹ + A Λ⁻¹ Aᵀ vs. covariance of y_1 and y_2",
           (0.25 * torch.eye(2) + A @ covariance @ A.T)[0, 1], (y - 1).prod(1))

    ddpm, n = ExactDDPM(), 100_000
    knows = DDPM(lambda x, t: torch.full_like(x, 0.35), ddpm.alpha[1:], "image")
    x = dict(knows.ddim_chain(torch.randn(n).double(), knows.T, eta=0.5))
    alpha_bar, sigma2 = knows.alpha_bar[20], 0.5**2 * knows.variance_q[21]
    rest, noise = x[20] - alpha_bar.sqrt() * 0.35, knows.predict_noise(x[21], 21)
    first_try = (1 - alpha_bar).sqrt() * noise + 0.5 * torch.randn(n)
    yield ("Thm 2.9   1 − ᾱ_20 vs. variance of x_20 by DDIM, η = ½, if x̂_θ = x_0", 1 - alpha_bar,
           rest**2)
    yield ("          η² σ_q²(21) vs. variance of x_20 given x_21 and x_0, η = ½", sigma2,
           (rest - (1 - alpha_bar - sigma2).sqrt() * noise)**2)
    yield ("          1 − ᾱ_20 + σ_t², σ_t = ½ vs. variance with the first try's √(1 − ᾱ_20)",
           1 - alpha_bar + 0.25, first_try**2)

    x_T = torch.randn(100).double()
    yield ("(2.60)    0 vs. largest difference between DDIM's chain (η = 1, every t) and DDPM's", 0,
           difference(ddpm.reverse_chain(x_T), ddpm.ddim_chain(x_T, ddpm.T)))


EXAMPLES = section_2_1, sections_2_2_and_2_3, section_2_4, section_2_5, section_2_6


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
