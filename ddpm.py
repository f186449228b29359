# SPDX-License-Identifier: MIT
"""Section 2 of the tutorial (arXiv 2403.18103): the denoising diffusion probabilistic model.

Building Blocks (§2.1). A chain of images, all of the same shape, between the picture x_0 and
white noise x_T:

    x_0  ⇄  x_1  ⇄  …  ⇄  x_{t−1}  ⇄  x_t  ⇄  …  ⇄  x_T

    transition block   right: q(x_t | x_{t−1}), fixed, adds a little noise    DDPM.q_transition
                       left:  p_θ(x_{t−1} | x_t), learned, removes it         DDPM.p_transition
    initial block      x_0 is only ever reached from the right; its likelihood is the
                       reconstruction term of the ELBO                        DDPM.elbo
    final block        x_T is only ever reached from the left; q(x_T | x_0) should be N(0, I),
                       which the prior matching term of the ELBO measures     DDPM.elbo

Time is 1-based as in the paper. Tables have T + 1 entries and are indexed by t itself, with
alpha[0] = alpha_bar[0] = 1. The paper's α_t is 1 − β_t in "Denoising Diffusion Probabilistic
Models" (arXiv 2006.11239). Images are float tensors (B, C, H, W) in [-1, 1].

`python ddpm.py` holds the section's claims against what this file computes.
"""
import math
import warnings
from collections.abc import Callable, Iterator

if __name__ == "__main__":  # torch's, as soon as it is imported, and no loss here
    warnings.filterwarnings("ignore", "Failed to initialize NumPy")

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.distributions import Categorical, MixtureSameFamily, Normal


def linear_alphas(T: int) -> Tensor:
    """α_1, …, α_T as a float64 (T,): 1 − α_t grows linearly.

    From 1e-4 to 0.02 for T = 1000, as in arXiv 2006.11239. For any other T both ends are scaled by
    1000/T: then Σ (1 − α_t), and so ᾱ_T ≈ exp(−Σ (1 − α_t)), stays what it was and x_T is white
    noise for every T. (Below T = 21 the last values would pass 1 and are held at 0.999.)
    """
    scale = 1000 / T
    return 1 - torch.linspace(1e-4 * scale, 0.02 * scale, T, dtype=torch.float64).clamp(max=0.999)


def cosine_alphas(T: int) -> Tensor:
    """α_1, …, α_T as a float64 (T,): ᾱ_t = f(t)/f(0) with f(t) = cos²(π/2 · (t/T + s)/(1 + s)).

    Not in the paper, but in "Improved Denoising Diffusion Probabilistic Models" (arXiv 2102.09672),
    with its s = 0.008 and its 1 − α_t ≤ 0.999. It destroys small images more evenly over t than
    the linear schedule, which leaves little but noise in the later half of the chain.
    """
    s = 0.008
    t = torch.arange(T + 1, dtype=torch.float64)
    f = torch.cos(math.pi / 2 * (t / T + s) / (1 + s)) ** 2
    return (f[1:] / f[:-1]).clamp(min=0.001)


SCHEDULES = {"linear": linear_alphas, "cosine": cosine_alphas}


def log_pixel_mass(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """log ∫ N(y | mean, std²) dy over the bin of the 8-bit pixel x, elementwise, in nats.

    What the paper's p_θ(x_0 | x_1) is for pixels, from arXiv 2006.11239, section 3.3. Their 256
    values lie 2/255 apart on [-1, 1]; a bin reaches half-way to the neighbours, and the two
    outermost to ±∞, so that the 256 masses sum to 1.
    """
    lower = torch.where(x < -1 + 1 / 255, -math.inf, (x - 1 / 255 - mean) / std)
    upper = torch.where(x > 1 - 1 / 255, math.inf, (x + 1 / 255 - mean) / std)
    # log(Φ(upper) − Φ(lower)). A bin right of the mean is reflected to the left of it: there Φ is
    # small and log Φ keeps its digits, while right of the mean Φ rounds to 1.
    right = lower > 0
    lower, upper = torch.where(right, -upper, lower), torch.where(right, -lower, upper)
    log_lower, log_upper = torch.special.log_ndtr(lower), torch.special.log_ndtr(upper)
    return log_upper + torch.log(-torch.expm1(log_lower - log_upper))


def _like(values: Tensor, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """values from the CPU on x's device, in x's precision where no dtype is given.

    A single number is written there by a kernel that takes it as its argument. A copy would make
    the host wait for the device, several times in every step of the chain.
    """
    dtype = dtype or x.dtype
    if values.numel() == 1:
        return torch.full_like(values, values.item(), dtype=dtype, device=x.device)
    return values.to(x.device, dtype)


class DDPM(nn.Module):
    """The chain of §2. It takes any network, and learns through `loss`.

    Args:
        denoiser: called as denoiser(x_t, t) with x_t (B, C, H, W) and t (B,) of integers in 1..T;
            returns (B, C, H, W).
        image_shape: (C, H, W).
        T: length of the chain, at least 2.
        schedule: "linear" or "cosine".
        predict: what the network's output is: the "noise" ε̂_θ(x_t) (§2.8) or the "image"
            x̂_θ(x_t) (§2.7).
        t_sampling: how training draws t: "uniform", as in the paper, or by "snr" (see `loss`).

    Wherever a method takes t it is an int, for the whole batch, or a (B,) integer tensor, with
    1 ≤ t ≤ T. Means and variances come back ready to broadcast against (B, C, H, W). Bad arguments
    raise ValueError.
    """

    def __init__(self, denoiser: Callable[[Tensor, Tensor], Tensor],
                 image_shape: tuple[int, int, int], T: int = 1000,
                 schedule: str = "cosine", predict: str = "noise", t_sampling: str = "uniform"):
        super().__init__()
        if len(image_shape) != 3 or not all(isinstance(n, int) and n > 0 for n in image_shape):
            raise ValueError(f"image_shape must be (C, H, W), got {image_shape}")
        if not isinstance(T, int) or T < 2:
            raise ValueError(f"T must be a whole number from 2, got {T}")
        if schedule not in SCHEDULES:
            raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {schedule!r}")
        if predict not in ("noise", "image"):
            raise ValueError(f"predict must be 'noise' or 'image', got {predict!r}")
        if t_sampling not in ("uniform", "snr"):
            raise ValueError(f"t_sampling must be 'uniform' or 'snr', got {t_sampling!r}")
        self.denoiser, self.image_shape = denoiser, tuple(image_shape)
        self.T, self.predict = T, predict
        # The scalars α_t and ᾱ_t = α_1 α_2 … α_t. They stay float64 on the CPU, every formula
        # below is evaluated there, and only its result is cast: 1 − ᾱ_1 in float32 is already
        # wrong in the fourth digit.
        with torch.device("cpu"):
            self.alpha = torch.cat([torch.ones(1, dtype=torch.float64), SCHEDULES[schedule](T)])
        self.alpha_bar = self.alpha.cumprod(0)
        self.snr = self.alpha_bar / (1 - self.alpha_bar)  # signal to noise of x_t; ∞ at t = 0
        # How often training visits a time up to t, but for a factor; never t = 0.
        self.visits = ((1 / self.snr).clamp(max=1).cumsum(0) if t_sampling == "snr" else
                       torch.arange(T + 1, dtype=torch.float64))

    def _index(self, t: int | Tensor, *images: Tensor) -> Tensor:
        """t, checked, as an index into the tables whose entries broadcast against the images,
        which must all be (B, C, H, W)."""
        batch, t = images[0].shape[:1], torch.as_tensor(t).cpu()
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
        return t.long().reshape(-1, 1, 1, 1)

    # ------------------------------------------------------------- the forward direction: q

    def q_transition(self, x_prev: Tensor, t: int | Tensor) -> tuple[Tensor, Tensor]:
        """q(x_t | x_{t−1}) = N(x_t | √α_t x_{t−1}, (1 − α_t) I): (mean, variance).

        The Magical Scalars √α_t and 1 − α_t (§2.2): with them, and no others, the variance of
        x_t tends to 1.
        """
        t = self._index(t, x_prev)
        alpha = self.alpha[t]
        return _like(alpha.sqrt(), x_prev) * x_prev, _like(1 - alpha, x_prev)

    def q_marginal(self, x_0: Tensor, t: int | Tensor) -> tuple[Tensor, Tensor]:
        """q(x_t | x_0) = N(x_t | √ᾱ_t x_0, (1 − ᾱ_t) I): (mean, variance).

        Distribution q_φ(x_t | x_0) (§2.3): t transitions collapse into one.
        """
        t = self._index(t, x_0)
        alpha_bar = self.alpha_bar[t]
        return _like(alpha_bar.sqrt(), x_0) * x_0, _like(1 - alpha_bar, x_0)

    def q_sample(self, x_0: Tensor, t: int | Tensor, noise: Tensor) -> Tensor:
        """x_t = √ᾱ_t x_0 + √(1 − ᾱ_t) ε with ε = noise ~ N(0, I) (§2.3)."""
        self._index(t, x_0, noise)
        mean, variance = self.q_marginal(x_0, t)
        return mean + variance.sqrt() * noise

    def q_posterior(self, x_t: Tensor, x_0: Tensor, t: int | Tensor) -> tuple[Tensor, Tensor]:
        """q(x_{t−1} | x_t, x_0) = N(x_{t−1} | μ_q(x_t, x_0), σ_q²(t) I): (mean, variance).

        Derivation of q_φ(x_{t−1} | x_t, x_0) (§2.6), by Bayes' rule:

            μ_q    = [(1 − ᾱ_{t−1}) √α_t x_t + (1 − α_t) √ᾱ_{t−1} x_0] / (1 − ᾱ_t)
            σ_q²(t) = (1 − α_t) (1 − ᾱ_{t−1}) / (1 − ᾱ_t)

        At t = 1 it is certain: μ_q = x_0 and σ_q²(1) = 0.
        """
        t = self._index(t, x_t, x_0)
        alpha, alpha_bar, alpha_bar_prev = self.alpha[t], self.alpha_bar[t], self.alpha_bar[t - 1]
        mean = (_like((1 - alpha_bar_prev) * alpha.sqrt() / (1 - alpha_bar), x_t) * x_t
                + _like((1 - alpha) * alpha_bar_prev.sqrt() / (1 - alpha_bar), x_t) * x_0)
        variance = (1 - alpha) * (1 - alpha_bar_prev) / (1 - alpha_bar)
        return mean, _like(variance, x_t)

    # ------------------------------------------------------------- the network: x̂_θ and ε̂_θ

    def _denoise(self, x_t: Tensor, t: int | Tensor) -> Tensor:
        """What the network says, in x_t's precision whatever autocast computed it in."""
        t = _like(self._index(t, x_t).flatten(), x_t, torch.long)
        output = self.denoiser(x_t, t.expand(len(x_t)))
        if output.shape != x_t.shape:
            raise ValueError(f"the denoiser returned {tuple(output.shape)} for images of "
                             f"{tuple(x_t.shape)}")
        return output.to(x_t.dtype)

    def _noise_between(self, x_0: Tensor, x_t: Tensor, t: int | Tensor) -> Tensor:
        """The ε that takes x_0 to x_t = √ᾱ_t x_0 + √(1 − ᾱ_t) ε."""
        mean, variance = self.q_marginal(x_0, t)
        return (x_t - mean) / variance.sqrt()

    def predict_x0(self, x_t: Tensor, t: int | Tensor, clip: bool = False) -> Tensor:
        """x̂_θ(x_t); for a noise network (x_t − √(1 − ᾱ_t) ε̂_θ(x_t)) / √ᾱ_t (§2.8).

        With clip it is brought back into [-1, 1], where every x_0 is.
        """
        x0_hat = self._denoise(x_t, t)
        if self.predict == "noise":
            alpha_bar = self.alpha_bar[self._index(t, x_t)]
            x0_hat = ((x_t - _like((1 - alpha_bar).sqrt(), x_t) * x0_hat)
                      / _like(alpha_bar.sqrt(), x_t))
        return x0_hat.clamp(-1, 1) if clip else x0_hat

    def predict_noise(self, x_t: Tensor, t: int | Tensor) -> Tensor:
        """ε̂_θ(x_t); for an image network (x_t − √ᾱ_t x̂_θ(x_t)) / √(1 − ᾱ_t) (§2.8)."""
        output = self._denoise(x_t, t)
        return output if self.predict == "noise" else self._noise_between(output, x_t, t)

    def score(self, x_t: Tensor, t: int | Tensor) -> Tensor:
        """∇ log p_t(x_t) ≈ −ε̂_θ(x_t) / √(1 − ᾱ_t), the s_θ of the paper's section 3."""
        alpha_bar = self.alpha_bar[self._index(t, x_t)]
        return -self.predict_noise(x_t, t) / _like((1 - alpha_bar).sqrt(), x_t)

    # ------------------------------------------------------------- training

    def loss(self, x_0: Tensor) -> Tensor:
        """‖ε − ε̂_θ(x_t)‖² / D (§2.8), or ‖x_0 − x̂_θ(x_t)‖² / D for predict="image" (§2.7).

        A scalar: the mean over the batch, one t and one x_t ~ q(x_t | x_0) for each image, and
        over its D pixels. The ELBO weights every t by its own factor (see `elbo`); like the paper's
        training algorithm this drops them, which costs some likelihood and gives better pictures
        (arXiv 2006.11239, section 3.4).

        t is uniform on {1, …, T}, as in the paper, or p(t) ∝ min(1, 1/snr(t)) with the
        signal-to-noise ratio snr(t) = ᾱ_t / (1 − ᾱ_t): with more signal than noise in x_t little is
        left to learn, and more steps go to the other t. ("Efficient Diffusion Training via Min-SNR
        Weighting Strategy", arXiv 2303.09556, does this by a factor in the loss.) Either way the t
        of a batch are spread evenly over their distribution, which makes the loss less noisy
        ("Variational Diffusion Models", arXiv 2107.00630).
        """
        u = (torch.rand(1, dtype=torch.float64) + torch.arange(len(x_0)) / len(x_0)) % 1
        t = torch.searchsorted(self.visits, u * self.visits[-1], right=True).clamp(max=self.T)
        noise = torch.randn_like(x_0)
        target = noise if self.predict == "noise" else x_0
        return F.mse_loss(self._denoise(self.q_sample(x_0, t, noise), t), target)

    forward = loss  # what wraps a module, like data parallelism, calls this

    @torch.no_grad()
    def elbo(self, x_0: Tensor, k: int | None = None, clip: bool = True,
             generator: Generator | None = None) -> dict[str, Tensor]:
        """log p(x_0) ≥ ELBO = reconstruction − prior_matching − consistency

        The three terms of §2.5, each (B,), in nats per 8-bit image x_0.

        Evidence Lower Bound (§2.4) and Rewrite the Consistency Term (§2.5): the first form of the
        consistency term compares q(x_t | x_{t−1}), an arrow to the right, with p_θ(x_t | x_{t+1}),
        an arrow to the left, and needs two random x to do it. Bayes' rule turns the first arrow
        round, and one x_t is enough:

            reconstruction   E log p_θ(x_0 | x_1),                            x_1 ~ q(x_1 | x_0)
            prior_matching   KL(q(x_T | x_0) ‖ p(x_T)),                       p(x_T) = N(0, I)
            consistency      Σ_{t=2..T} E KL(q(x_{t−1} | x_t, x_0) ‖ p_θ(x_{t−1} | x_t)),
                                                                              x_t ~ q(x_t | x_0)

        Each expectation is taken from one sample. The sum visits every t, in the memory of one
        step; with k it is estimated, without bias, from k random t for each image. x̂_θ is clipped
        unless clip=False, as in the chain whose likelihood this bounds.
        """
        if k is not None and k < 1:
            raise ValueError(f"k must be at least 1, got {k}")

        def q_draw(t: int | Tensor) -> Tensor:
            return self.q_sample(x_0, t, torch.randn(
                x_0.shape, generator=generator, dtype=x_0.dtype, device=x_0.device))

        # The initial block. σ_q²(1) = 0 would make p_θ(x_0 | x_1) a point mass, and every pixel
        # that x̂_θ does not hit exactly impossible: its neighbour σ_q²(2) takes its place.
        mean, _ = self.p_transition(q_draw(1), 1, clip)
        _, variance = self.q_posterior(x_0, x_0, 2)
        reconstruction = log_pixel_mass(x_0, mean, variance.sqrt()).flatten(1).sum(1)

        # The final block: KL(N(√ᾱ_T x_0, (1 − ᾱ_T) I) ‖ N(0, I)).
        alpha_bar = self.alpha_bar[self.T]
        prior_matching = 0.5 * (_like(alpha_bar, x_0) * x_0.square() - _like(
            alpha_bar + torch.log1p(-alpha_bar), x_0)).flatten(1).sum(1)

        # The transition blocks: two Gaussians of the same variance σ_q²(t), whose means differ in
        # x_0 against x̂_θ alone. So KL = ‖μ_q − μ_θ‖² / 2σ_q²(t) = weight · ‖x_0 − x̂_θ‖², with
        # weight = (1 − α_t)² ᾱ_{t−1} / 2σ_q²(t)(1 − ᾱ_t)² = ½ [snr(t − 1) − snr(t)].
        if k is None:
            times, rate = range(2, self.T + 1), 1
        else:
            times = torch.randint(2, self.T + 1, (k, len(x_0)), generator=generator,
                                  device=x_0.device)
            rate = k / (self.T - 1)  # how often each t is met, on average
        consistency = torch.zeros_like(reconstruction)
        for t in times:
            error = x_0 - self.predict_x0(q_draw(t), t, clip)
            t = self._index(t, x_0).flatten()
            weight = 0.5 * (self.snr[t - 1] - self.snr[t]) / rate
            consistency += _like(weight, x_0) * error.square().flatten(1).sum(1)
        return {"reconstruction": reconstruction, "prior_matching": prior_matching,
                "consistency": consistency}

    def bits_per_dim(self, x_0: Tensor, terms: dict[str, Tensor] | None = None) -> Tensor:
        """−ELBO / (D ln 2) with D = C·H·W: bits for each 8-bit pixel, (B,).

        terms: what `elbo` gave for x_0; computed here, in full, where it is missing.
        """
        reconstruction, *costs = (terms or self.elbo(x_0)).values()
        return (sum(costs) - reconstruction) / (x_0[0].numel() * math.log(2))

    # ------------------------------------------------------------- inference: from x_T to x_0

    def p_transition(self, x_t: Tensor, t: int | Tensor,
                     clip: bool = True) -> tuple[Tensor, Tensor]:
        """p_θ(x_{t−1} | x_t) = N(x_{t−1} | μ_θ(x_t), σ_q²(t) I): (mean, variance).

        Training and Inference (§2.7): q(x_{t−1} | x_t, x_0) with x̂_θ(x_t) in the place of the x_0
        that nobody knows. In terms of ε̂_θ it is §2.8's
        μ_θ(x_t) = [x_t − (1 − α_t) / √(1 − ᾱ_t) · ε̂_θ(x_t)] / √α_t, exactly so for clip=False.
        Clipping x̂_θ is not in the paper, but in arXiv 2006.11239's code: at large t the division
        by √ᾱ_t magnifies the network's error, and one step outside [-1, 1] misleads all later ones.
        """
        return self.q_posterior(x_t, self.predict_x0(x_t, t, clip), t)

    def _noise(self, n: int, generator: Generator | None) -> Tensor:
        """n images of N(0, I), on the network's device and in its precision."""
        like = next(self.parameters(), torch.empty(0))
        return torch.randn(n, *self.image_shape, generator=generator, dtype=like.dtype,
                           device=like.device)

    @torch.no_grad()
    def reverse_chain(self, n: int, clip: bool = True,
                      generator: Generator | None = None) -> Iterator[tuple[int, Tensor]]:
        """The inference algorithm of §2.7 and §2.8: yields (t, x_t) for t = T, …, 0.

            x_T ~ N(0, I);   x_{t−1} = μ_θ(x_t) + σ_q(t) z,   z ~ N(0, I), but no z at t = 1

        n images (n, C, H, W) at a time. clip: see `p_transition`. generator: on the network's
        device.
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
        """"Denoising Diffusion Implicit Models" (arXiv 2010.02502): any s < t in one step.

        Yields (t, x_t) for `steps` values t from T to 1, evenly spaced, both ends included, and at
        last for t = 0:

            x_s = √ᾱ_s x̂_θ(x_t) + √(1 − ᾱ_s − σ²) ε̂_θ(x_t) + σ z
            σ   = η √[(1 − ᾱ_s) / (1 − ᾱ_t)] √[1 − ᾱ_t / ᾱ_s]

        η = 1 is the paper's chain in longer strides, and with steps = T it is `reverse_chain`.
        η = 0 draws nothing after x_T, which alone decides the image; the DDIM paper prefers it for
        networks trained to the end. 1 is the default here: the fresh noise of every step makes up
        for much of what a network trained for minutes gets wrong.
        Where x̂_θ is clipped, ε̂_θ is the noise between x_t and the clipped x̂_θ.
        """
        if not 1 <= steps <= self.T:
            raise ValueError(f"steps must be in 1..{self.T}, got {steps}")
        if not 0 <= eta <= 1:
            raise ValueError(f"eta must be in [0, 1], got {eta}")
        times = torch.linspace(self.T, 1, steps).round().int().tolist() + [0]
        x_t = self._noise(n, generator)
        yield self.T, x_t
        for t, s in zip(times, times[1:]):
            x0_hat = self.predict_x0(x_t, t, clip)
            noise_hat = self._noise_between(x0_hat, x_t, t)
            a_t, a_s = self.alpha_bar[t], self.alpha_bar[s]
            variance = eta**2 * (1 - a_s) / (1 - a_t) * (1 - a_t / a_s)
            x_t = (_like(a_s.sqrt(), x_t) * x0_hat
                   + _like((1 - a_s - variance).sqrt(), x_t) * noise_hat)
            if variance > 0:
                x_t = x_t + _like(variance.sqrt(), x_t) * self._noise(n, generator)
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


# ------------------------------------------------------------- the section's claims, computed


class ExactDenoiser(nn.Module):
    """The best denoiser there is, E[x_0 | x_t] or E[ε | x_t], for the mixture that §2.3 follows to
    white noise: images of one pixel, drawn from p(x_0) = Σ_k π_k N(μ_k, σ_k²).

    With it all of §2 has known answers. Every t of a batch must be the same.
    """

    def __init__(self, alpha_bar: Tensor, predict: str):
        super().__init__()
        self.pi, self.mu, self.sigma = (
            nn.Parameter(torch.tensor(values, dtype=torch.float64), requires_grad=False)
            for values in ((0.3, 0.7), (-0.5, 0.4), (0.05, 0.1)))
        self.alpha_bar, self.predict = alpha_bar, predict

    def p(self, t: int) -> MixtureSameFamily:
        """p_t(x) = Σ_k π_k N(x | √ᾱ_t μ_k, ᾱ_t σ_k² + 1 − ᾱ_t), of which p_0 is the data's."""
        a = self.alpha_bar[t]
        return MixtureSameFamily(Categorical(self.pi), Normal(
            a.sqrt() * self.mu, (a * self.sigma**2 + 1 - a).sqrt()))

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        a, parts, x = self.alpha_bar[t[0]], self.p(t[0]).component_distribution, x_t.view(-1, 1)
        posterior = (self.pi.log() + parts.log_prob(x)).softmax(1)  # p(k | x_t)
        gain = a.sqrt() * self.sigma**2 / parts.variance
        x0_hat = (posterior * (self.mu + gain * (x - parts.mean))).sum(1).view_as(x_t)
        return x0_hat if self.predict == "image" else (x_t - a.sqrt() * x0_hat) / (1 - a).sqrt()


def exact_ddpm(T: int, predict: str = "noise", schedule: str = "linear") -> DDPM:
    """A DDPM that has nothing left to learn."""
    ddpm = DDPM(None, (1, 1, 1), T, schedule, predict)
    ddpm.denoiser = ExactDenoiser(ddpm.alpha_bar, predict)
    return ddpm


def examples(schedule: str = "linear") -> list[tuple[str, float, float, float]]:
    """What §2 says and what this file computes: rows of (claim, paper, ours, tolerance).

    Where a row is a mean of random draws its tolerance is 5 standard errors.
    """
    rows = []

    def row(claim: str, paper: float | Tensor, ours: Tensor):
        error = 5 * ours.std().item() / len(ours)**0.5 if ours.ndim else 1e-6
        rows.append((claim, float(paper), ours.mean().item(), error))

    ddpm = exact_ddpm(1000, schedule=schedule)
    data, one = ddpm.denoiser.p(0), torch.ones(1, 1, 1, 1, dtype=torch.float64)
    x_0 = data.sample((100_000,)).view(-1, 1, 1, 1)

    # t single transitions: of the scalars √ᾱ_t and 1 − ᾱ_t, and of 100,000 pixels.
    gain, total, x_t = one, 0 * one, x_0
    for t in range(1, 1001):
        step, added = ddpm.q_transition(one, t)
        gain, total = step * gain, step**2 * total + added
        mean, variance = ddpm.q_transition(x_t, t)
        x_t = mean + variance.sqrt() * torch.randn_like(x_t)
        if t in (100, 300, 1000):
            mean, variance = ddpm.q_marginal(one, t)
            row(f"§2.3  t = {t} transitions: √ᾱ_t", mean, gain.squeeze())
            row("      1 − ᾱ_t", variance, total.squeeze())
            p_t, x = ddpm.denoiser.p(t), x_t.flatten()
            row("      the mixture's mean on its way to 0", p_t.mean, x)
            row("      the mixture's variance on its way to 1", p_t.variance, (x - p_t.mean)**2)

    # Bayes' rule on a grid of x_{t−1}: q(x_{t−1} | x_t, x_0) ∝ q(x_t | x_{t−1}) q(x_{t−1} | x_0).
    grid = torch.linspace(-4, 4, 400_001, dtype=torch.float64).view(-1, 1, 1, 1)
    for t in (10, 500):
        likelihood, prior = (Normal(mean, variance.sqrt()) for mean, variance in (
            ddpm.q_transition(grid, t), ddpm.q_marginal(0.8 * one, t - 1)))
        p = (likelihood.log_prob(0.3 * one) + prior.log_prob(grid)).softmax(0)
        mean, variance = ddpm.q_posterior(0.3 * one, 0.8 * one, t)
        row(f"§2.6  μ_q(x_t, x_0) by Bayes' rule at t = {t}", (p * grid).sum(), mean.squeeze())
        row("      σ_q²(t)", (p * (grid - mean)**2).sum(), variance.squeeze())

    # The ELBO of 8-bit pixels against their exact log-probability. What separates the two is the
    # variance: x_{t−1} given x_t and the k it came from spreads by σ_q²(t) + c² Var[x_0 | x_t, k],
    # with c the weight of x_0 in μ_q, but p_θ has only σ_q²(t). A variance too small by a factor r
    # costs ½ (r − 1 − ln r) nats. (The last step, to x_0, has σ_q²(2) instead.)
    x_0 = ((x_0[:10_000].clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1
    log_p = (data.cdf(x_0 + 1 / 255) - data.cdf(x_0 - 1 / 255)).log().flatten()
    terms = ddpm.elbo(x_0)
    times = torch.arange(2, 1001)
    c, variance = ddpm.q_posterior(0 * one.expand(999, 1, 1, 1), one.expand(999, 1, 1, 1), times)
    a, sigma = ddpm.alpha_bar[1:, None], ddpm.denoiser.sigma
    spread = sigma**2 * (1 - a) / (a * sigma**2 + 1 - a)  # Var[x_0 | x_t, k]: (T, K)
    r = torch.cat([spread[:1] / variance[0].view(1),
                   1 + c.view(-1, 1)**2 * spread[1:] / variance.view(-1, 1)])
    cost = (0.5 * (r - 1 - r.log()).sum(0) * ddpm.denoiser.pi).sum()
    elbo = terms["reconstruction"] - terms["prior_matching"] - terms["consistency"]
    means = " − ".join(f"{term.mean():.2f}" for term in terms.values())
    row(f"§2.5  log p(x_0) = {log_p.mean():.2f} ≥ ELBO = {means} nats: the gap", cost, log_p - elbo)

    # From the same noise, the chain by ε̂_θ, by x̂_θ, and DDIM's that skips nothing.
    noise, image = (exact_ddpm(50, predict, schedule) for predict in ("noise", "image"))
    for clip in (True, False):
        chains = [chain(100, clip=clip, generator=Generator().manual_seed(1), **options)
                  for chain, options in ((noise.reverse_chain, {}), (image.reverse_chain, {}),
                                         (noise.ddim_chain, {"steps": 50, "eta": 1.0}))]
        x = [torch.stack([x_t for _, x_t in chain]) for chain in chains]
        row(f"§2.8  |ε-chain − §2.7's chain| at most (clip={clip})", 0, (x[1] - x[0]).abs().max())
        row("      |ε-chain − DDIM with η = 1, all steps| at most", 0, (x[2] - x[0]).abs().max())
    return rows


if __name__ == "__main__":
    torch.manual_seed(0)
    print(f"{'':70}{'paper says':>12}{'we compute':>12}{'within':>10}")
    for claim, paper, ours, tolerance in examples():
        print(f"{claim:70}{paper:12.5f}{ours:12.5f}{tolerance:10.0e}")
