# SPDX-License-Identifier: MIT
"""Section 2 of the tutorial: the denoising diffusion probabilistic model (DDPM).

All numbers (§, theorem, example, equation) are those of version 3, January 2025, of Stanley Chan,
"Tutorial on Diffusion Models for Imaging and Vision" (arXiv 2403.18103).

Building Blocks (§2.1, Fig. 2.1 to 2.4). A chain of images of one shape, from the picture x_0 to
white noise x_T, with q(x_t | x_{t−1}) to the right and p_θ(x_{t−1} | x_t) to the left:

    x_0  ⇄  x_1  ⇄  …  ⇄  x_{t−1}  ⇄  x_t  ⇄  …  ⇄  x_T

    transition block   q is fixed and adds a little noise; p_θ is learned and removes it
    initial block      x_0 has a neighbour on the right only
    final block        x_T has a neighbour on the left only, and should be N(0, I)

Time is 1-based as in the paper. Tables have T + 1 entries and are indexed by t itself, with
alpha[0] = alpha_bar[0] = 1. The paper's α_t is 1 − β_t in "Denoising Diffusion Probabilistic
Models" (arXiv 2006.11239). Images are float tensors (B, C, H, W) in [-1, 1].

`python ddpm.py` computes the section's examples and theorems, each beside its formula.
"""
import math
import warnings
from collections.abc import Callable, Iterator, Sequence

if __name__ == "__main__":  # torch can do without NumPy, and so can this file
    warnings.filterwarnings("ignore", "Failed to initialize NumPy")

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.distributions import Categorical, MixtureSameFamily, Normal, kl_divergence


def linear_alphas(T: int) -> Tensor:
    """α_1, …, α_T as a float64 (T,): 1 − α_t grows linearly.

    From 1e-4 to 0.02 for T = 1000, as in arXiv 2006.11239. For other T both ends are scaled by
    1000/T. From T = 21 on this keeps Σ (1 − α_t) at 10.05, so ᾱ_T below e⁻¹⁰: x_T is white noise.
    (For smaller T the last values would reach 1 or pass it, and are held at 0.999.)
    """
    scale = 1000 / T
    return 1 - torch.linspace(1e-4 * scale, 0.02 * scale, T, dtype=torch.float64).clamp(max=0.999)


def cosine_alphas(T: int) -> Tensor:
    """α_1, …, α_T as a float64 (T,): ᾱ_t = f(t)/f(0) with f(t) = cos²(π/2 · (t/T + s)/(1 + s)).

    From "Improved Denoising Diffusion Probabilistic Models" (arXiv 2102.09672), with its s = 0.008
    and 1 − α_t ≤ 0.999. It destroys small images more evenly over t than the linear schedule,
    whose last quarter is almost pure noise.
    """
    s = 0.008
    t = torch.arange(T + 1, dtype=torch.float64)
    f = torch.cos(math.pi / 2 * (t / T + s) / (1 + s)) ** 2
    return (f[1:] / f[:-1]).clamp(min=0.001)


SCHEDULES = {"linear": linear_alphas, "cosine": cosine_alphas}


def posterior_variance(alpha: Tensor, alpha_bar: Tensor, alpha_bar_prev: Tensor) -> Tensor:
    """σ_q²(t) = (1 − α_t)(1 − ᾱ_{t−1}) / (1 − ᾱ_t) (§2.3, Thm 2.5).

    As in (2.32). In (2.26) ᾱ_{t−1} is printed with a root, which Bayes' rule does not give.
    """
    return (1 - alpha) * (1 - alpha_bar_prev) / (1 - alpha_bar)


def snr_rate(alpha_bar: Tensor) -> Tensor:
    """p(t) of `DDPM.draw_t` with t_sampling="snr", up to a factor. Takes ᾱ_0, …, ᾱ_T, (T + 1,);
    returns rate(1), …, rate(T), (T,).

        rate(t) = min(1, 1/snr(t)², 30 snr(t) + 0.1) + T/200 · min(0.6, w(t))

        snr(t) = ᾱ_t / (1 − ᾱ_t),      w(t) = ½ [(1 − ᾱ_t) / (1 − ᾱ_{t−1}) − 1]

    The first term is for the pictures. It is 1 where they take shape (for the cosine schedule from
    T/2 to 0.89 T) and falls towards both ends: with more signal than noise in x_t little is left to
    decide, and in almost pure noise little can be decided yet. "Efficient Diffusion Training via
    Min-SNR Weighting Strategy" (arXiv 2303.09556) weighs ‖ε̂_θ − ε‖² by min(1, 5/snr), and
    "Elucidating the Design Space of Diffusion-Based Generative Models" (arXiv 2206.00364) draws few
    noise levels at either end.

    The second term is for the likelihood. For t ≥ 2 w(t) is the weight of ‖v̂_θ − v_t‖² in the
    ELBO: that of ‖x̂_θ − x_0‖² in (2.43), times 1 − ᾱ_t. It is half the relative growth of the
    noise's variance in step t: for the cosine schedule and T = 1000, 0.8/t to 1.1/t in the first
    half of the chain. The cap is for w(1) = ∞ (for T = 200 it cuts w(2), too). With T/200 the
    term's share of the draws depends little on T: one in 25 for T = 50, in 18 for T = 1000 (half of
    these at t ≤ 26), in 16 for T = 4000.

    The numbers were found by trial, for predict="velocity". With "noise" or "image" the same rate
    gives each t another weight (see `DDPM.loss`).
    """
    variance, T = 1 - alpha_bar, len(alpha_bar) - 1
    snr = alpha_bar[1:] / variance[1:]
    w = 0.5 * (variance[1:] / variance[:-1] - 1)  # w(1) = ∞: variance[0] = 0
    pictures = torch.minimum(1 / snr**2, 30 * snr + 0.1).clamp(max=1)
    return pictures + T / 200 * w.clamp(max=0.6)


def log_ndtr(x: Tensor) -> Tensor:
    """log Φ(x), elementwise; on the CPU for a device that can't (Apple's mps)."""
    try:
        return torch.special.log_ndtr(x)
    except NotImplementedError:
        return torch.special.log_ndtr(x.cpu()).to(x.device)


def log_pixel_mass(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """log ∫ N(y | mean, std²) dy over the bin of the 8-bit pixel x, elementwise, in nats.

    Our p_θ(x_0 | x_1), for pixels, from arXiv 2006.11239, section 3.3. A pixel's 256 values lie
    2/255 apart on [-1, 1]; a bin reaches half-way to its neighbours, and the two outermost bins
    reach to ±∞, so that the 256 masses sum to 1.
    """
    lower = torch.where(x < -1 + 1 / 255, -math.inf, (x - 1 / 255 - mean) / std)
    upper = torch.where(x > 1 - 1 / 255, math.inf, (x + 1 / 255 - mean) / std)
    # log(Φ(upper) − Φ(lower)). A bin right of the mean is reflected to the left of it: there Φ is
    # small and log Φ keeps its digits, while right of the mean Φ rounds to 1.
    right = lower > 0
    lower, upper = torch.where(right, -upper, lower), torch.where(right, -lower, upper)
    log_lower, log_upper = log_ndtr(lower), log_ndtr(upper)
    return log_upper + torch.log(-torch.expm1(log_lower - log_upper))


def _like(x: Tensor, *coefficients: Tensor) -> Sequence[Tensor]:
    """A formula's coefficients, from float64 on the CPU to x's precision and x's device. A single
    number is filled in there: copying it could make the host wait for the device."""
    if coefficients[0].ndim == 0:
        return [x.new_full((), number.item()) for number in coefficients]
    return torch.stack(coefficients).to(x.device, x.dtype, non_blocking=True)


class DDPM(nn.Module):
    """The chain of §2. It takes any network, and learns through `loss`.

    Args:
        denoiser: called as denoiser(x_t, t) with x_t (B, C, H, W) and t (B,) of integers in 1..T;
            returns (B, C, H, W).
        image_shape: (C, H, W).
        T: length of the chain, at least 2.
        schedule: "linear", "cosine", or a tensor (T,) of α_1, …, α_T with 0 < α_t < 1.
        predict: what the network's output is: the "noise" ε̂_θ(x_t) (§2.5), the "image" x̂_θ(x_t)
            (§2.4) or, not in the paper, the "velocity" v̂_θ(x_t): see `predict_x0`.
        t_sampling: how training draws t, "uniform" as in the paper or "snr": see `draw_t`.

    Wherever a method takes t it is an int, for the whole batch, or a (B,) integer tensor, with
    1 ≤ t ≤ T. Means and variances come back ready to broadcast against (B, C, H, W). Bad arguments
    raise ValueError.
    """

    def __init__(self, denoiser: Callable[[Tensor, Tensor], Tensor],
                 image_shape: tuple[int, int, int], T: int = 1000,
                 schedule: str | Tensor = "cosine", predict: str = "noise",
                 t_sampling: str = "uniform"):
        super().__init__()
        if len(image_shape) != 3 or not all(isinstance(n, int) and n > 0 for n in image_shape):
            raise ValueError(f"image_shape must be (C, H, W), got {image_shape}")
        if not isinstance(T, int) or T < 2:
            raise ValueError(f"T must be a whole number from 2, got {T}")
        if isinstance(schedule, Tensor):
            alphas = schedule.detach().to("cpu", torch.float64)
            if alphas.shape != (T,) or not ((alphas > 0) & (alphas < 1)).all():
                raise ValueError(f"schedule must be T = {T} numbers α_t, each above 0 and below 1, "
                                 f"got {schedule}")
        elif schedule not in list(SCHEDULES):  # a list: it may be unhashable
            raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, or a tensor, "
                             f"got {schedule!r}")
        if predict not in ("noise", "image", "velocity"):
            raise ValueError("predict must be 'noise', 'image' or 'velocity', "
                             f"got {predict!r}")
        if t_sampling not in ("uniform", "snr"):
            raise ValueError(f"t_sampling must be 'uniform' or 'snr', got {t_sampling!r}")
        self.denoiser, self.image_shape = denoiser, tuple(image_shape)
        self.T, self.predict = T, predict
        # The scalars α_t and ᾱ_t = α_1 α_2 … α_t. They stay float64 on the CPU, every formula
        # below computes its coefficients there, and only these are rounded: in float32 already
        # 1 − ᾱ_1 is wrong in the fourth digit.
        with torch.device("cpu"):
            if not isinstance(schedule, Tensor):
                alphas = SCHEDULES[schedule](T)
            self.alpha = torch.cat([torch.ones(1, dtype=torch.float64), alphas])
            self.alpha_bar = self.alpha.cumprod(0)
            # p(t) of `draw_t`, summed up: P(t ≤ 0) = 0, P(t ≤ 1), …, P(t ≤ T) = 1.
            rate = snr_rate(self.alpha_bar) if t_sampling == "snr" else torch.ones(T).double()
            cdf = F.pad(rate.cumsum(0), (1, 0))
            self.t_cdf = cdf / cdf[-1]

    def _check(self, t: int | Tensor, *images: Tensor) -> Tensor:
        """t as an index into the tables: () for an int, else (B, 1, 1, 1). ValueError unless all
        images are float (B, C, H, W) and every t is an integer in 1..T."""
        batch, t = images[0].shape[:1], torch.as_tensor(t, device="cpu")
        for x in images:
            if x.shape != batch + self.image_shape or not x.is_floating_point():
                shape = ", ".join(map(str, self.image_shape))
                raise ValueError(f"expected float images ({batch.numel()}, {shape}), "
                                 f"got {x.dtype} {tuple(x.shape)}")
        if t.shape not in ((), batch) or t.is_floating_point():
            raise ValueError(f"t must be an int or {batch.numel()} integers, "
                             f"got {t.dtype} {tuple(t.shape)}")
        if t.numel() and not 1 <= t.min() <= t.max() <= self.T:
            raise ValueError(f"t must be in 1..{self.T}, got {t.tolist()}")
        return t.long().view(-1, 1, 1, 1) if t.ndim else t.long()

    def _scalars(self, t: int | Tensor, *images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(α_t, ᾱ_t, ᾱ_{t−1}) in float64 on the CPU, once t and the images are checked."""
        t = self._check(t, *images)
        return self.alpha[t], self.alpha_bar[t], self.alpha_bar[t - 1]

    def _roots(self, t: int | Tensor, *images: Tensor) -> Sequence[Tensor]:
        """(√ᾱ_t, √(1 − ᾱ_t)), the coefficients of (2.11), ready for the images."""
        _, alpha_bar, _ = self._scalars(t, *images)
        return _like(images[0], alpha_bar.sqrt(), (1 - alpha_bar).sqrt())

    # ------------------------------------------------------------- the forward direction: q

    def q_transition(self, x_prev: Tensor, t: int | Tensor) -> tuple[Tensor, Tensor]:
        """q(x_t | x_{t−1}) = N(x_t | √α_t x_{t−1}, (1 − α_t) I): (mean, variance).

        §2.1, Def. 2.1, (2.1). Thm 2.1: of all x_t = a x_{t−1} + b ε, those with b = √(1 − a²)
        lead to variance 1. Hence the "magical scalars" √α_t and 1 − α_t.
        """
        alpha, _, _ = self._scalars(t, x_prev)
        scale, variance = _like(x_prev, alpha.sqrt(), 1 - alpha)
        return scale * x_prev, variance

    def q_marginal(self, x_0: Tensor, t: int | Tensor) -> tuple[Tensor, Tensor]:
        """q(x_t | x_0) = N(x_t | √ᾱ_t x_0, (1 − ᾱ_t) I): (mean, variance).

        §2.1, Thm 2.2, (2.8): t transitions in one.
        """
        _, alpha_bar, _ = self._scalars(t, x_0)
        scale, variance = _like(x_0, alpha_bar.sqrt(), 1 - alpha_bar)
        return scale * x_0, variance

    def q_sample(self, x_0: Tensor, t: int | Tensor, noise: Tensor) -> Tensor:
        """x_t = √ᾱ_t x_0 + √(1 − ᾱ_t) ε with ε = noise ~ N(0, I) (§2.1, (2.11))."""
        signal, std = self._roots(t, x_0, noise)
        return signal * x_0 + std * noise

    def q_posterior(self, x_t: Tensor, x_0: Tensor, t: int | Tensor) -> tuple[Tensor, Tensor]:
        """q(x_{t−1} | x_t, x_0) = N(x_{t−1} | μ_q(x_t, x_0), σ_q²(t) I): (mean, variance).

        §2.3, Thm 2.5, by Bayes' rule (2.20); σ_q²(t) is `posterior_variance`:

            μ_q = (1 − ᾱ_{t−1}) √α_t / (1 − ᾱ_t) · x_t  +  (1 − α_t) √ᾱ_{t−1} / (1 − ᾱ_t) · x_0

        (2.25), between x_t and x_0 (Fig. 2.9), but nearer to 0: for t > 1 the weights sum to less
        than 1. At t = 1 it is x_0, and σ_q²(1) = 0.
        """
        alpha, alpha_bar, alpha_bar_prev = self._scalars(t, x_t, x_0)
        c_t, c_0, variance = _like(x_t, (1 - alpha_bar_prev) * alpha.sqrt() / (1 - alpha_bar),
                                   (1 - alpha) * alpha_bar_prev.sqrt() / (1 - alpha_bar),
                                   posterior_variance(alpha, alpha_bar, alpha_bar_prev))
        return c_t * x_t + c_0 * x_0, variance

    # ------------------------------------------------------------- the network: x̂_θ and ε̂_θ

    def _denoise(self, x_t: Tensor, t: int | Tensor) -> Tensor:
        """The network's output, in x_t's precision even where autocast computed in another."""
        t = self._check(t, x_t)
        t = (t.flatten().to(x_t.device, non_blocking=True) if t.ndim else
             x_t.new_full(x_t.shape[:1], t.item(), dtype=torch.long))
        output = self.denoiser(x_t, t)
        if output.shape != x_t.shape:
            raise ValueError(f"the denoiser returned {tuple(output.shape)} for images of "
                             f"{tuple(x_t.shape)}")
        return output.to(x_t.dtype)

    def predict_x0(self, x_t: Tensor, t: int | Tensor, clip: bool = False) -> Tensor:
        """x̂_θ(x_t). With clip it is brought back into [-1, 1], where every x_0 is.

            predict="noise"       (x_t − √(1 − ᾱ_t) ε̂_θ(x_t)) / √ᾱ_t,    (2.11) solved for x_0
            predict="velocity"    √ᾱ_t x_t − √(1 − ᾱ_t) v̂_θ(x_t)

        The velocity v_t = √ᾱ_t ε − √(1 − ᾱ_t) x_0 ("v-prediction", from "Progressive Distillation
        for Fast Sampling of Diffusion Models", arXiv 2202.00512) is the derivative with respect to
        φ of x_t = cos φ x_0 + sin φ ε, where cos φ = √ᾱ_t. So (x_t, v_t) is (x_0, ε) turned by φ,
        and turning it back takes no division. Near t = 0 v_t is almost ε, near T almost −x_0. At T,
        where √ᾱ_t ≈ 0, a noise network's x̂_θ is mostly its error, divided by √ᾱ_t, a bad start
        that DDIM with η = 0 never makes good; a velocity network's is close to the mean image.
        """
        output = self._denoise(x_t, t)
        signal, std = self._roots(t, x_t)
        if self.predict == "noise":
            output = (x_t - std * output) / signal
        elif self.predict == "velocity":
            output = signal * x_t - std * output
        return output.clamp(-1, 1) if clip else output

    def predict_noise(self, x_t: Tensor, t: int | Tensor) -> Tensor:
        """ε̂_θ(x_t).

            predict="image"       (x_t − √ᾱ_t x̂_θ(x_t)) / √(1 − ᾱ_t),    (2.11) solved for ε
            predict="velocity"    √(1 − ᾱ_t) x_t + √ᾱ_t v̂_θ(x_t)
        """
        output = self._denoise(x_t, t)
        if self.predict == "image":
            output = self.noise_between(output, x_t, t)
        elif self.predict == "velocity":
            signal, std = self._roots(t, x_t)
            output = std * x_t + signal * output
        return output

    def noise_between(self, x_0: Tensor, x_t: Tensor, t: int | Tensor) -> Tensor:
        """ε = (x_t − √ᾱ_t x_0) / √(1 − ᾱ_t), the noise that leads from x_0 to x_t ((2.11))."""
        signal, std = self._roots(t, x_t, x_0)
        return (x_t - signal * x_0) / std

    def score(self, x_t: Tensor, t: int | Tensor) -> Tensor:
        """∇ log p_t(x_t) ≈ −ε̂_θ(x_t) / √(1 − ᾱ_t), the s_θ of the paper's section 3."""
        _, std = self._roots(t, x_t)
        return -self.predict_noise(x_t, t) / std

    # ------------------------------------------------------------- training

    def draw_t(self, n: int) -> Tensor:
        """t ~ Uniform[1, T] (§2.4, (2.47)): n of them, (n,) int64 on the CPU.

        With t_sampling="snr" p(t) is `snr_rate` instead, up to a factor.

        The n times are spread evenly over their distribution, from one random start: the loss is
        less noisy than with independent draws ("Variational Diffusion Models", arXiv 2107.00630).
        """
        u = torch.rand(1, dtype=torch.float64, device="cpu") + torch.arange(n, device="cpu") / n
        return torch.searchsorted(self.t_cdf, u % 1, right=True)

    def loss(self, x_0: Tensor) -> Tensor:
        """‖ε̂_θ(x_t) − ε‖² (§2.5); with predict="image" ‖x̂_θ(x_t) − x_0‖² (§2.4); with "velocity"
        ‖v̂_θ(x_t) − v_t‖², which is ‖ε̂_θ(x_t) − ε‖² / ᾱ_t and ‖x̂_θ(x_t) − x_0‖² / (1 − ᾱ_t).

        The boxes "Training Algorithm for DDPM" (§2.4, which prints ᾱ_t x_0 where (2.11) has
        √ᾱ_t x_0) and "Training DDPM using ε̂_θ" (§2.5), up to the gradient step, for a batch of
        images: a scalar, the mean over the images and their pixels. In the ELBO each t has a factor
        of its own (see `elbo`). The boxes drop it, which costs some likelihood and gives better
        pictures (arXiv 2006.11239, section 3.4). How often t is drawn is a factor, too: `snr_rate`
        gives some of the likelihood back.
        """
        t = self.draw_t(len(x_0))
        signal, std = self._roots(t, x_0)
        noise = torch.randn_like(x_0)
        x_t = self.q_sample(x_0, t, noise)
        target = {"noise": noise, "image": x_0, "velocity": signal * noise - std * x_0}
        return F.mse_loss(self._denoise(x_t, t), target[self.predict])

    forward = loss  # a module is called through forward, for example by DistributedDataParallel

    @torch.no_grad()
    def elbo(self, x_0: Tensor, k: int | None = None, clip: bool = True,
             generator: Generator | None = None) -> dict[str, Tensor]:
        """log p(x_0) ≥ E_{q(x_{1:T} | x_0)} log [p(x_{0:T}) / q(x_{1:T} | x_0)]    (§2.2, (2.17))

                     = reconstruction − prior_matching − consistency         (Thm 2.4, (2.21))

        The three terms, each (B,), in nats per 8-bit image x_0:

            reconstruction   E log p_θ(x_0 | x_1),                            x_1 ~ q(x_1 | x_0)
            prior_matching   KL(q(x_T | x_0) ‖ p(x_T)),                       p(x_T) = N(0, I)
            consistency      Σ_{t=2..T} E KL(q(x_{t−1} | x_t, x_0) ‖ p_θ(x_{t−1} | x_t)),
                                                                              x_t ~ q(x_t | x_0)

        Thm 2.3, the first form, compares q(x_t | x_{t−1}) with p_θ(x_t | x_{t+1}), two arrows that
        meet in x_t. It equals (2.17) if the mean is over x_{t−1}, x_t and x_{t+1}, but not with the
        KL that is printed, which draws x_t without regard to x_{t+1} (`python ddpm.py` has the
        numbers). Bayes' rule (2.20) turns the first arrow round: Thm 2.4 needs only one random x_t.

        Each expectation is taken from one sample. The sum is over every t, one after the other;
        with k it is estimated, without bias, from k random t for each image, with P(t) ∝ 1/t, about
        as the summands fall. x̂_θ is clipped unless clip=False, as in the chain whose likelihood
        this bounds.
        """
        if k is not None and k < 1:
            raise ValueError(f"k must be at least 1, got {k}")

        def q_draw(t: int | Tensor) -> Tensor:
            return self.q_sample(x_0, t, torch.randn(
                x_0.shape, generator=generator, dtype=x_0.dtype, device=x_0.device))

        # The initial block. (2.44) makes it the sum's t = 1, which divides by σ_q²(1) = 0: a pixel
        # that x̂_θ does not hit exactly would be impossible. So here p_θ(x_0 | x_1) has the variance
        # σ_q²(2), and a pixel has the probability of its bin.
        std, = _like(x_0, posterior_variance(*self._scalars(2, x_0)).sqrt())
        mean, _ = self.p_transition(q_draw(1), 1, clip)
        reconstruction = log_pixel_mass(x_0, mean, std).flatten(1).sum(1)

        # The final block: KL(N(√ᾱ_T x_0, (1 − ᾱ_T) I) ‖ N(0, I)), a case of Thm 1.3.
        alpha_bar = self.alpha_bar[self.T]
        alpha_bar, constant = _like(x_0, alpha_bar, alpha_bar + torch.log1p(-alpha_bar))
        prior_matching = 0.5 * (alpha_bar * x_0.square() - constant).flatten(1).sum(1)

        # The times, and how often each comes up for an image, on average.
        if k is None:
            times, visits = range(2, self.T + 1), torch.ones(self.T + 1, device="cpu")
        else:
            t = torch.arange(2, self.T + 1, dtype=torch.float64, device="cpu")
            visits = F.pad(k / t / (1 / t).sum(), (2, 0))
            u = torch.rand(k, len(x_0), generator=generator, dtype=torch.float32,  # for mps, too
                           device=generator.device if generator else "cpu")
            times = torch.searchsorted(visits.cumsum(0), k * u.cpu().double(), right=True)

        # The transition blocks (Thm 2.6): two Gaussians with the same variance, so that
        # KL = ‖μ_q − μ_θ‖² / 2σ_q²(t), (2.37). Their means differ in x_0 and x̂_θ only: (2.43). Its
        # weight is also ½ [snr(t − 1) − snr(t)] with snr(t) = ᾱ_t / (1 − ᾱ_t).
        consistency = torch.zeros_like(reconstruction)
        for t in times:
            alpha, alpha_bar, alpha_bar_prev = self._scalars(t, x_0)
            variance = posterior_variance(alpha, alpha_bar, alpha_bar_prev)
            weight, = _like(x_0, 1 / (2 * variance)
                            * (1 - alpha)**2 * alpha_bar_prev / (1 - alpha_bar)**2
                            / visits[self._check(t, x_0)])
            error = self.predict_x0(q_draw(t), t, clip) - x_0
            consistency += (weight * error.square()).flatten(1).sum(1)
        return {"reconstruction": reconstruction, "prior_matching": prior_matching,
                "consistency": consistency}

    def bits_per_dim(self, x_0: Tensor, terms: dict[str, Tensor] | None = None) -> Tensor:
        """−ELBO / (D ln 2) with D = C·H·W: bits for each 8-bit pixel, (B,).

        terms: what `elbo` gave for x_0; computed here, in full, where it is missing.
        """
        terms = terms or self.elbo(x_0)
        elbo = terms["reconstruction"] - terms["prior_matching"] - terms["consistency"]
        return -elbo / (x_0[0].numel() * math.log(2))

    # ------------------------------------------------------------- inference: from x_T to x_0

    def p_transition(self, x_t: Tensor, t: int | Tensor,
                     clip: bool = True) -> tuple[Tensor, Tensor]:
        """p_θ(x_{t−1} | x_t) = N(x_{t−1} | μ_θ(x_t), σ_q²(t) I): (mean, variance).

        §2.3, (2.34): q(x_{t−1} | x_t, x_0) with x̂_θ(x_t) in place of x_0, which is unknown here
        ((2.41)). Through ε̂_θ, with clip=False, μ_θ is (2.50),

            μ_θ = x_t / √α_t  −  (1 − α_t) / (√(1 − ᾱ_t) √α_t) · ε̂_θ(x_t)

        Clipping x̂_θ comes from the code of arXiv 2006.11239: one step outside [-1, 1] misleads all
        later ones, and at large t a noise network's error is divided by √ᾱ_t.
        """
        return self.q_posterior(x_t, self.predict_x0(x_t, t, clip), t)

    def _noise(self, n: int, generator: Generator | None) -> Tensor:
        """n images of N(0, I), on the network's device and in its precision."""
        weight = next(self.parameters(), torch.empty(0))
        return torch.randn(n, *self.image_shape, generator=generator, dtype=weight.dtype,
                           device=weight.device)

    @torch.no_grad()
    def reverse_chain(self, n: int, clip: bool = True,
                      generator: Generator | None = None) -> Iterator[tuple[int, Tensor]]:
        """The boxes "Inference of DDPM" (§2.4, (2.48)) and "… using ε̂_θ" (§2.5, (2.52)).

            x_T ~ N(0, I);   x_{t−1} = μ_θ(x_t) + σ_q(t) z,   z ~ N(0, I),   t = T, …, 1

        Yields (t, x_t) for t = T, …, 0, with n images (n, C, H, W) at a time. No z is drawn at
        t = 1, where σ_q = 0. clip: see `p_transition`. generator: on the network's device.
        """
        x_t = self._noise(n, generator)
        yield self.T, x_t
        for t in range(self.T, 0, -1):
            x_t, variance = self.p_transition(x_t, t, clip)
            if t > 1:
                x_t = x_t + variance.sqrt() * self._noise(n, generator)
            yield t - 1, x_t

    @torch.no_grad()
    def ddim_chain(self, n: int, steps: int, eta: float = 1.0, clip: bool = True,
                   generator: Generator | None = None) -> Iterator[tuple[int, Tensor]]:
        """DDIM (§2.6; arXiv 2010.02502): from x_t to x_s for any s < t in one step.

            x_s = √ᾱ_s x̂_θ(x_t)  +  √(1 − ᾱ_s − σ_t²) ε̂_θ(x_t)  +  σ_t z,      z ~ N(0, I)
                  predicted x_0     direction pointing to x_t       noise

        (2.59), for s = t − 1. Beware: in §2.6 alone the paper writes α_t for ᾱ_t.

        With the true x_0 and ε this draws from q(x_s | x_t, x_0) of (2.57). Given x_0 its variance
        is (1 − ᾱ_s − σ_t²) + σ_t²: thanks to the root every marginal q(x_s | x_0) stays what it was
        (Thm 2.9), for any σ_t, so that one network serves all. With √(1 − ᾱ_s), the paper's first
        try, the variance is σ_t² too large. The paper leaves σ_t open; as in arXiv 2010.02502

            σ_t = η √[(1 − ᾱ_s) / (1 − ᾱ_t)] √[1 − ᾱ_t / ᾱ_s],      0 ≤ η ≤ 1

        With η = 1 σ_t² is σ_q²(t) with s for t − 1 and ᾱ_t / ᾱ_s for α_t: DDPM in longer strides,
        and for steps = T `reverse_chain` itself. With η = 0 only x_T is random. 1 is the default
        here: the fresh noise of every step makes up for much of what a network trained for minutes
        gets wrong.

        Yields (t, x_t) for `steps` values t, evenly spaced from T to 1 (only T for steps = 1), and
        at last for t = 0. Where x̂_θ is clipped, ε̂_θ is the noise between the clipped x̂_θ and x_t.
        """
        if not 1 <= steps <= self.T:
            raise ValueError(f"steps must be in 1..{self.T}, got {steps}")
        if not 0 <= eta <= 1:
            raise ValueError(f"eta must be in [0, 1], got {eta}")
        times = torch.linspace(self.T, 1, steps, dtype=torch.float64, device="cpu")
        times = times.round().int().tolist() + [0]
        x_t = self._noise(n, generator)
        yield self.T, x_t
        for t, s in zip(times, times[1:]):
            x0_hat = self.predict_x0(x_t, t, clip)
            noise_hat = self.noise_between(x0_hat, x_t, t)
            alpha = self.alpha[s + 1:t + 1].prod()  # ᾱ_t / ᾱ_s, which may be 0 / 0
            alpha_bar_s = self.alpha_bar[s]
            variance = eta**2 * posterior_variance(alpha, self.alpha_bar[t], alpha_bar_s)
            c_0, c_noise, sigma = _like(x_t, alpha_bar_s.sqrt(),
                                        (1 - alpha_bar_s - variance).sqrt(), variance.sqrt())
            x_t = c_0 * x0_hat + c_noise * noise_hat
            if variance > 0:
                x_t = x_t + sigma * self._noise(n, generator)
            yield s, x_t

    def chain(self, n: int, steps: int | None = None, eta: float = 1.0,
              generator: Generator | None = None) -> Iterator[tuple[int, Tensor]]:
        """The reverse chain, or DDIM with this η where `steps` is given."""
        if steps is None:
            return self.reverse_chain(n, generator=generator)
        return self.ddim_chain(n, steps, eta, generator=generator)

    def sample(self, n: int, steps: int | None = None, eta: float = 1.0,
               generator: Generator | None = None) -> Tensor:
        """n new images (n, C, H, W) in [-1, 1]: the x_0 at the end of `chain`."""
        for _, x_t in self.chain(n, steps, eta, generator):
            pass
        return x_t


# ------------------------------------------------------------- worked examples: python ddpm.py


class ExactDenoiser(nn.Module):
    """The best denoiser there is, E[x_0 | x_t], E[ε | x_t] or E[v_t | x_t], for images of one pixel
    drawn from a mixture of Gaussians, p(x_0) = Σ_k π_k N(μ_k, σ_k²): by default the one of Ex. 2.1.

    Every t of a batch must be the same.
    """

    def __init__(self, alpha_bar: Tensor, predict: str, mu=(-2.0, 2.0), sigma=(0.2, 1.0)):
        super().__init__()
        self.pi, self.mu, self.sigma = (
            nn.Parameter(torch.tensor(values, dtype=torch.float64), requires_grad=False)
            for values in ((0.3, 0.7), mu, sigma))
        self.alpha_bar, self.predict = alpha_bar, predict

    def p(self, alpha_bar: Tensor) -> MixtureSameFamily:
        """p_t(x) = Σ_k π_k N(x | √ᾱ_t μ_k, 1 − ᾱ_t + ᾱ_t σ_k²) (Ex. 2.2, (2.13))."""
        return MixtureSameFamily(Categorical(self.pi), Normal(
            alpha_bar.sqrt() * self.mu, (1 - alpha_bar + alpha_bar * self.sigma**2).sqrt()))

    def expected_x0(self, x_t: Tensor, alpha_bar: Tensor) -> Tensor:
        """E[x_0 | x_t] = Σ_k p(k | x_t) E[x_0 | x_t, k]."""
        parts, x = self.p(alpha_bar).component_distribution, x_t.reshape(-1, 1)
        posterior = (self.pi.log() + parts.log_prob(x)).softmax(1)  # p(k | x_t)
        gain = alpha_bar.sqrt() * self.sigma**2 / parts.variance
        return (posterior * (self.mu + gain * (x - parts.mean))).sum(1).view_as(x_t)

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        alpha_bar = self.alpha_bar[t[0]]
        signal, std = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        x0_hat = self.expected_x0(x_t, alpha_bar)
        noise_hat = (x_t - signal * x0_hat) / std
        return {"noise": noise_hat, "image": x0_hat,
                "velocity": signal * noise_hat - std * x0_hat}[self.predict]


def exact_ddpm(T: int = 200, predict: str = "noise", schedule: str | Tensor | None = None,
               **mixture) -> DDPM:
    """A DDPM that has nothing left to learn: by default that of Ex. 2.1, with α_t = 0.97."""
    ddpm = DDPM(None, (1, 1, 1), T, torch.full((T,), 0.97, dtype=torch.float64)
                if schedule is None else schedule, predict)
    ddpm.denoiser = ExactDenoiser(ddpm.alpha_bar, predict, **mixture)
    return ddpm


def normal(moments: tuple[Tensor, Tensor]) -> Normal:
    mean, variance = moments
    return Normal(mean, variance.sqrt())


def examples() -> list[tuple[str, float, float, float | None]]:
    """Rows of ("formula | computed", formula, computed, tolerance). ELBOs and KLs are in nats.

    Where a side is a mean of random draws the tolerance is 5 standard errors. A tolerance of None
    marks a formula that is printed in the paper and that the computation does not confirm.
    """
    rows = []

    def row(what: str, formula: float | Tensor, computed: Tensor, differ: bool = False):
        formula, computed = (torch.as_tensor(side, dtype=torch.float64)
                             for side in (formula, computed))
        variance = sum(x.var() / x.numel() for x in (formula, computed) if x.numel() > 1)
        tolerance = max(5 * float(variance) ** 0.5, 1e-6)
        rows.append((what, formula.mean().item(), computed.mean().item(),
                     None if differ else tolerance))

    ddpm = exact_ddpm()
    mixture, alpha, alpha_bar = ddpm.denoiser, ddpm.alpha, ddpm.alpha_bar
    one = torch.ones(1, 1, 1, 1, dtype=torch.float64)

    # Forwards: the moments of both humps, and 100,000 pixels, transition by transition.
    mean, variance = mixture.mu.view(2, 1, 1, 1), mixture.sigma.view(2, 1, 1, 1)**2
    x_t = mixture.p(one.squeeze()).sample((100_000,)).view(-1, 1, 1, 1)
    for t in range(1, 61):
        (mean, added), (scale, _) = ddpm.q_transition(mean, t), ddpm.q_transition(one, t)
        variance = scale**2 * variance + added
        x_t = normal(ddpm.q_transition(x_t, t)).sample()
        if t in (20, 60):
            p_t, x = mixture.p(alpha_bar[t]), x_t.flatten()
            parts = p_t.component_distribution
            for k in (0, 1):
                row(f"Ex. 2.1   t = {t}, part {k + 1}: mean by (2.13) | by {t} steps of (2.2)",
                    parts.mean[k], mean[k].squeeze())
                row("          variance by (2.13) | by (2.2)", parts.variance[k],
                    variance[k].squeeze())
            row(f"Ex. 2.2   t = {t}: mean of (2.13) | of 100,000 simulated pixels", p_t.mean, x)
            row("          variance of (2.13) | of the pixels", p_t.variance, (x - p_t.mean)**2)
            row("          share below 0 by (2.13) | of the pixels",
                (mixture.pi * parts.cdf(torch.zeros(2))).sum(), x < 0)

    x = torch.zeros(100_000, dtype=torch.float64)
    for _ in range(60):
        x = 0.9 * x + 0.5 * torch.randn_like(x)
    row("Thm 2.1   b²/(1 − a²), a = 0.9, b = 0.5 | simulated variance", 0.25 / 0.19, x**2)

    signal, variance = one, 0 * one
    for t in range(1, 101):
        scale, added = ddpm.q_transition(one, t)
        signal, variance = scale * signal, scale**2 * variance + added
    mean, at_once = ddpm.q_marginal(one, 100)
    row("Thm 2.2   t = 100: √ᾱ_t | product of 100 transitions", mean, signal.squeeze())
    row("          1 − ᾱ_t | variance of 100 transitions", at_once, variance.squeeze())

    # Bayes' rule on a grid of x_{t−1}: q(x_{t−1} | x_t, x_0) ∝ q(x_t | x_{t−1}) q(x_{t−1} | x_0).
    t, grid = 20, torch.linspace(-4, 4, 400_001, dtype=torch.float64).view(-1, 1, 1, 1)
    likelihood = normal(ddpm.q_transition(grid, t))
    prior = normal(ddpm.q_marginal(0.8 * one, t - 1))
    weight = (likelihood.log_prob(0.3 * one) + prior.log_prob(grid)).softmax(0)
    mean, variance = ddpm.q_posterior(0.3 * one, 0.8 * one, t)
    row(f"Thm 2.5   t = {t}: μ_q of (2.25) | by Bayes' rule on a grid", mean, (weight * grid).sum())
    bayes = (weight * (grid - mean)**2).sum()
    row("          σ_q² of (2.32) | by Bayes' rule", variance, bayes)
    row("          σ_q² of (2.26) as printed, with √ᾱ_{t−1} | by Bayes' rule", (1 - alpha[t])
        * (1 - alpha_bar[t - 1].sqrt()) / (1 - alpha_bar[t]), bayes, differ=True)
    row("(2.44)    0 | σ_q²(1), by which its t = 1 divides", 0, ddpm.q_posterior(one, one, 1)[1])

    # The ELBO of one pixel x_0 = 0.35, from 20,000 chains x_1, …, x_T of q.
    x_0 = torch.full((20_000, 1, 1, 1), 0.35, dtype=torch.float64)
    x, q, p = [x_0], {}, {}
    for t in range(1, ddpm.T + 1):
        q[t] = normal(ddpm.q_transition(x[t - 1], t))
        x.append(q[t].sample())
        if t > 1:
            p[t] = normal(ddpm.p_transition(x[t], t, clip=False))
    initial = log_pixel_mass(x_0, ddpm.p_transition(x[1], 1, clip=False)[0], p[2].stddev)
    white, last, transitions = Normal(0.0, 1.0), q[ddpm.T], range(1, ddpm.T)
    bound = (initial + sum(p[t].log_prob(x[t - 1]) for t in p) + white.log_prob(x[-1])
             - sum(q[t].log_prob(x[t]) for t in q)).flatten()
    terms = ddpm.elbo(x_0, clip=False)
    row("Thm 2.4   (2.17), simulated from x_0 = 0.35 | (2.21), by DDPM.elbo", bound,
        terms["reconstruction"] - terms["prior_matching"] - terms["consistency"])
    printed = initial - kl_divergence(last, white) - sum(
        kl_divergence(q[t], p[t + 1]) for t in transitions)
    row("Thm 2.3   (2.14) as printed, with KLs | (2.17)", printed.flatten(), bound, differ=True)
    drawn = initial - (last.log_prob(x[-1]) - white.log_prob(x[-1])) - sum(
        q[t].log_prob(x[t]) - p[t + 1].log_prob(x[t]) for t in transitions)
    row("          0 | largest distance of (2.14), with log q/p for each KL, from (2.17)", 0,
        (drawn.flatten() - bound).abs().max())
    x_t, t = x[50], 50
    posterior = normal(ddpm.q_posterior(x_t, x_0, t))
    row(f"Thm 2.6   t = {t}: ‖μ_q − μ_θ‖² / 2σ_q² | KL(q ‖ p_θ)",
        (posterior.mean - p[t].mean)[0]**2 / (2 * posterior.variance[0]),
        kl_divergence(posterior, p[t])[0])
    zero = DDPM(lambda x, t: torch.zeros_like(x), (1, 1, 1), 200, ddpm.alpha[1:], "image")
    snr = alpha_bar[[1, 200]] / (1 - alpha_bar[[1, 200]])
    row("Thm 2.7   ½ ‖x_0‖² [snr(1) − snr(T)], snr = ᾱ/(1−ᾱ) | (2.44), t ≥ 2, x̂_θ = 0",
        0.5 * 0.35**2 * (snr[0] - snr[1]), zero.elbo(x_0[:1])["consistency"][0])
    x_t = ddpm.q_sample(one.expand(100_000, 1, 1, 1), 20, torch.randn(100_000, 1, 1, 1).double())
    product = one.expand(100_000, 1, 1, 1)
    for t in range(1, 21):
        product = normal(ddpm.q_transition(product, t)).sample()
    row("Training  mean of √ᾱ_t x_0 + √(1 − ᾱ_t) ε | of 20 transitions, x_0 = 1",
        x_t.flatten(), product.flatten())
    row("          mean of ᾱ_t x_0 + …, as the box prints it | of 20 transitions", alpha_bar[20],
        product.flatten(), differ=True)

    # From the same noise: the chain by ε̂_θ, by x̂_θ, and DDIM's that skips nothing.
    image, x_t, t = exact_ddpm(predict="image"), 3 * torch.randn(100, 1, 1, 1).double(), 50
    noise_hat = ddpm.predict_noise(x_t, t)
    row(f"(2.52)    0 | largest distance of the means of (2.52) and (2.48), t = {t}", 0, (
        (x_t - (1 - alpha[t]) / (1 - alpha_bar[t]).sqrt() * noise_hat) / alpha[t].sqrt()
        - image.p_transition(x_t, t, clip=False)[0]).abs().max())
    for clip in (False, True):
        by_noise, by_image, ddim = (
            torch.stack([x_t for _, x_t in chain(100, clip=clip, **options,
                                                 generator=Generator().manual_seed(1))])
            for chain, options in ((ddpm.reverse_chain, {}), (image.reverse_chain, {}),
                                   (ddpm.ddim_chain, {"steps": 200, "eta": 1.0})))
        row(f"          0 | largest difference of chains by ε̂_θ and x̂_θ, clip = {clip}", 0,
            (by_noise - by_image).abs().max())
        row(f"(2.60)    0 | of DDIM with η = 1, every t, and that chain, clip = {clip}", 0,
            (ddim - by_noise).abs().max())

    A = torch.tensor([[1.0, 0.5], [-1.0, 2.0]], dtype=torch.float64)
    x = torch.tensor([1.0, 0.3]).double() * torch.randn(100_000, 2).double()  # Λ⁻¹ = diag(1, 0.09)
    y = x @ A.T + 1 + 0.5 * torch.randn_like(x)                               # L⁻¹ = 0.25 I
    covariance = 0.25 * torch.eye(2) + A @ torch.diag(torch.tensor([1.0, 0.09]).double()) @ A.T
    row("Thm 2.8   L⁻¹ + A Λ⁻¹ Aᵀ | covariance of y_1 and y_2", covariance[0, 1],
        (y - 1).prod(1))
    knows = DDPM(lambda x, t: torch.full_like(x, 0.35), (1, 1, 1), 200, ddpm.alpha[1:], "image")
    x = dict(knows.ddim_chain(100_000, 200, eta=0.5))
    row("Thm 2.9   1 − ᾱ_20 | variance of x_20 by DDIM, η = ½, if x̂_θ = x_0", 1 - alpha_bar[20],
        (x[20] - alpha_bar[20].sqrt() * 0.35).flatten()**2)
    noise = knows.predict_noise(x[21], 21)
    sigma2 = 0.5**2 * posterior_variance(alpha[21], alpha_bar[21], alpha_bar[20])
    row("          η² σ_q²(21) | variance of x_20 given x_21 and x_0, η = ½", sigma2, (
        x[20] - alpha_bar[20].sqrt() * 0.35 - (1 - alpha_bar[20] - sigma2).sqrt() * noise
    ).flatten()**2)
    row("          1 − ᾱ_20 + σ_t², σ_t = ½ | variance by the first try, √(1 − ᾱ_20)",
        1 - alpha_bar[20] + 0.25, ((1 - alpha_bar[20]).sqrt() * noise
                                   + 0.5 * torch.randn_like(noise)).flatten()**2)

    # Inversion by Direct Denoising (§2.9 of the paper's first version): x_t = (1 − t) x_0 + t y,
    # here with y ~ N(0, 1), and averaged over all x_t between 0.9 and 1.1.
    t, tau = 0.6, 0.2
    x_0, y = mixture.p(one.squeeze()).sample((1_000_000,)), torch.randn(1_000_000).double()
    x_t, x_before = ((1 - s) * x_0 + s * y for s in (t, t - tau))
    near = (x_t - 1).abs() < 0.1
    scale = ((1 - t)**2 + t**2) ** 0.5  # x_t / scale is a state of §2's chain
    x0_hat = mixture.expected_x0(x_t[near] / scale, torch.tensor((1 - t)**2 / scale**2).double())
    row("InDI      (1 − τ/t) x_t + (τ/t) E[x_0 | x_t] | mean of x_{t−τ}, t = 0.6, τ = 0.2",
        (1 - tau / t) * x_t[near] + tau / t * x0_hat, x_before[near])
    return rows


if __name__ == "__main__":
    torch.manual_seed(0)
    print(f"{'formula | what computes it':76}{'formula':>12}{'computed':>12}{'tolerance':>11}")
    for what, formula, computed, tolerance in examples():
        print(f"{what:76}{formula:12.5f}{computed:12.5f}"
              + (f"{tolerance:11.0e}" if tolerance else f"{'differ':>11}"))
