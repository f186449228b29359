"""The tests: `python test_all.py`, or `pytest test_all.py`. No network and no GPU needed.

Every formula is compared with an independent source: a closed form, torch.distributions, numerical
integration, or a Monte-Carlo mean with a tolerance of 5 of its own standard errors. What the rows
of `python vae.py` and `python ddpm.py` show has no second test after TestExamples. Then, in order:
section 1, section 2, the network, files, whole runs, the README, and what it promises.
"""
import errno
import functools
import gzip
import inspect
import io
import itertools
import math
import os
import re
import shlex
import signal
import struct
import subprocess
import sys
import tempfile
import time
import unittest
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from itertools import product
from pathlib import Path
from unittest import mock

warnings.filterwarnings("ignore", "Failed to initialize NumPy")  # torch works without it

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Normal, kl_divergence

import ddpm as section_2
import sample
import train
import unet as network
import vae as section_1
from ddpm import DDPM, ExactDDPM, cauchy_alphas, cosine_alphas, linear_alphas, log_pixel_mass
from unet import Fourier, UNet
from vae import VAE, GaussianMixture, conv_networks

HERE = Path(__file__).resolve().parent
MNIST = [train.read_idx(HERE / "data" / "mnist", split) for split in ("train", "t10k")]
CPU = torch.device("cpu")
patch = mock.patch.object
NO_FLOATS = (("uint8", torch.zeros(2, 1, 8, 8).byte()), ("list", [torch.zeros(1, 8, 8)] * 2),
             ("int", 16), (r"\(0, 1, 8, 8\)", torch.zeros(0, 1, 8, 8)))


class Test(unittest.TestCase):
    """Seeds every test, and knows when tensors are close."""

    def setUp(self):
        torch.manual_seed(0)

    def assertClose(self, actual, expected, rtol=1e-6, atol=1e-9):
        a, b = (torch.as_tensor(x, dtype=torch.float64) for x in (actual, expected))
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)

    def assertSame(self, actual, expected):
        """Bit for bit: tensors, or lists and dicts of tensors and numbers."""
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)

    def assertMean(self, draws, expected):
        """The mean of independent draws is what it should be, to within 5 standard errors."""
        mean, error = draws.double().mean(0), draws.double().std(0) / len(draws) ** 0.5
        worst = ((mean - expected).abs() / error).max().item()
        self.assertLess(worst, 5, f"{mean} should be {expected} ± {error}")

    def assertRefuses(self, expected, function, *arguments, **options):
        self.assertRaisesRegex(ValueError, expected, function, *arguments, **options)


@functools.cache
def rows(section):
    """The rows of all worked examples of a section, computed once: (what, formula, computed)."""
    torch.manual_seed(0)
    return [(what, *(torch.as_tensor(side, dtype=torch.float64) for side in sides))
            for example in section.EXAMPLES for what, *sides in example()]


class TestExamples(Test):
    def test_every_formula_is_what_is_computed(self):
        for section in (section_1, section_2):
            for what, formula, computed in rows(section):
                variance = sum(x.var() / x.numel() for x in (formula, computed) if x.numel() > 1)
                distance = abs(formula.mean() - computed.mean()).item()
                if "as printed" not in what:
                    self.assertLess(distance, max(5 * float(variance)**0.5, 1e-6), what)

    def test_every_misprint_is_as_large_as_it_should_be(self):
        errors = {what.strip(): (formula.mean() - computed.mean()).item()
                  for section in (section_1, section_2)
                  for what, formula, computed in rows(section) if "as printed" in what}
        once, root = -0.5 * math.log(2 * math.pi) - math.log(0.1), 0.97**9.5
        kl = section_1.LinearVAE().elbo(section_1.data())["kl"].mean().item()
        for start, error in (
                ("−½ log 2π", once - 64 * once), ("−d/2", -32), ("(1.34)", 63 * math.log(0.7)),
                ("(1.35)", 2 * kl),  # reconstruction + KL, not −
                # σ_q² with another numerator; √ᾱ_20 in place of ᾱ_20
                ("σ_q² of (2.26)", 0.03 * (root**2 - root) / (1 - 0.97**20)),
                ("mean of ᾱ_t", 0.97**20 - 0.97**10)):
            actual, = (value for what, value in errors.items() if what.startswith(start))
            self.assertAlmostEqual(actual, error, delta=2e-2 * abs(error), msg=start)
        self.assertEqual(len(errors), 7)

    def test_into_a_notebook_or_a_file_of_any_encoding(self):
        # A notebook's stdout can't be reconfigured; a Windows file's encoding has no ε̂.
        for section in (section_1, section_2):
            for output in (io.StringIO(), io.TextIOWrapper(io.BytesIO(), encoding="cp1252")):
                with patch(section, "EXAMPLES", [lambda: rows(section)]), redirect_stdout(output):
                    section.main()
                output.seek(0)
                head, *lines = output.read().splitlines()
                shown = [f"{a.mean():12.5f}{b.mean():12.5f}{what}" for what, a, b in rows(section)]
                self.assertEqual([line[:24] + line[27:] for line in lines], shown)
                for line in (head, *lines):  # misprints are marked
                    self.assertEqual("≠" in line, "print" in line, line)


class TestGaussianMixture(Test):
    def test_density_and_posterior_against_torch_distributions(self):
        pi, mu = torch.tensor([0.25, 0.75]), torch.tensor([[0.0, 1.0], [2.0, -1.0]])
        sigma, x = torch.tensor([0.5, 1.5]), torch.randn(50, 2)
        parts, mixture = Normal(mu, sigma[:, None]), GaussianMixture(4 * pi, mu, sigma)
        joint = pi.log() + parts.log_prob(x[:, None]).sum(2)
        self.assertClose(mixture.log_prob(x), joint.logsumexp(1), rtol=1e-5)
        self.assertClose(mixture.posterior(x), joint.softmax(1), rtol=1e-4)
        draws = mixture.decode(torch.ones(20_000).long())
        self.assertMean(draws, mu[1])
        self.assertMean((draws - mu[1])**2, sigma[1]**2)
        for pi, mu, sigma in (([1], [[0], [1]], [1]), ([1, -1], [[0], [1]], [1, 1]),
                              ([1, 1], [[0], [1]], [1, -1]), ([1, 1], [0, 1], [1, 1]),
                              ([1, 1], [[0], [1]], [1])):
            self.assertRaises(ValueError, GaussianMixture, *map(torch.tensor, (pi, mu, sigma)))


def small_vae(image_shape=(1, 8, 8), latent_dim=4, decoder_std=0.6):
    return VAE(*conv_networks(image_shape, latent_dim, channels=4), decoder_std)


class TestVAE(Test):
    def test_the_gradient_of_the_loss(self):
        # Against that of −ELBO / D in closed form, log p(x) − KL(q ‖ p(z | x)), for a linear VAE.
        # The derivative in a learned log σ_dec is that in σ_dec, which starts at 1.
        a, b, c, v, s = weights = [torch.tensor(value, dtype=torch.float64, requires_grad=True)
                                   for value in (1.5, -0.2, 0.6, 0.1, 1.0)]
        vae, x = section_1.LinearVAE(a, b, 0.7, c, v, "learned").double(), section_1.data()[:200]
        std = (c**2 + s**2).sqrt()
        gap = kl_divergence(Normal(a * x + b, 0.7), Normal(c * (x - v) / std**2, s / std))
        exact = (gap - Normal(v, std).log_prob(x)).mean()
        exact = torch.stack(torch.autograd.grad(exact, weights))
        draws = [torch.stack(torch.autograd.grad(vae.loss(x), [a, b, c, v, vae.log_decoder_std]))
                 for _ in range(300)]
        self.assertMean(torch.stack(draws), exact)

    def test_bits_per_dim(self):
        # Where x̂ = x and KL(N(1, e) ‖ N(0, 1)) = (e − 1) / 2, the rest is the noise inside a bin.
        x = torch.full((1000, 50), 0.2, dtype=torch.float64)
        for std in (1e-1, 2 / 255 / 12**0.5, 1e-4):  # too large, the best, too small
            vae = VAE(lambda x: torch.ones(len(x), 2), lambda z: torch.full_like(x, 0.2), std)
            density = (2 / 255)**2 / 12 / (2 * std**2) + math.log(math.sqrt(2 * math.pi) * std)
            nats = (math.e - 1) / 2 / 50 + density - math.log(2 / 255)
            self.assertMean(vae.bits_per_dim(x), nats / math.log(2))

    def test_latents_of_any_shape(self):
        # With a σ_i for each coordinate: q(z | x) = N(x, exp(x / 2)), and p(x | z) = N(z, 0.6²).
        for shape in ((4,), (4, 6), (4, 3, 5), (4, 2, 3, 5)):
            vae = VAE(lambda x: torch.cat([x, 0.5 * x], dim=1), lambda z: z, 0.6)
            for B in (4, 7):
                x, others = torch.randn(B, *shape), tuple(range(1, 1 + len(shape)))
                kl = kl_divergence(Normal(x, (0.25 * x).exp()), Normal(0.0, 1.0)).sum(others)
                self.assertClose(vae.elbo(x)["kl"], kl, rtol=1e-5)
                density = Normal(-x, 0.6).log_prob(x).sum(others)
                self.assertClose(vae.log_likelihood(x, -x), density, rtol=1e-5)
                self.assertEqual(vae.bits_per_dim(x.sign()).shape, (B,))
                self.assertEqual(vae.loss(x).shape, ())
            low = VAE(lambda x: vae.encoder(x).bfloat16(), lambda z: z.bfloat16())  # as by autocast
            self.assertEqual({y.dtype for y in (*low.encode(x), low.decode(x))}, {torch.float32})

    def test_every_size_from_8_up(self):
        for shape in ((1, 8, 8), (1, 28, 28), (3, 32, 32), (1, 33, 33), (2, 9, 31)):
            vae, x = random_weights(small_vae(shape)), torch.rand(2, *shape) * 2 - 1
            losses = []
            for f in (vae.loss, lambda x: (terms := vae.elbo(x))["kl"] - terms["reconstruction"]):
                torch.manual_seed(0)
                losses.append(f(x).mean())
            self.assertClose(losses[0].item(), losses[1].item() / x[0].numel(), rtol=1e-4)
            images = vae.sample(torch.randn(3, 4))
            self.assertEqual((images.shape, images.requires_grad), ((3, *shape), False))
            self.assertLessEqual(images.abs().max().item(), 1)
        for shape in ((1, 7, 28), (1, 28, 7)):
            self.assertRefuses(f"at least 8.*{re.escape(str(shape))}", small_vae, shape)

    def test_bad_arguments(self):
        for std in (0, -1, math.nan, math.inf, "taught", None):
            self.assertRefuses(re.escape(repr(std)), small_vae, decoder_std=std)
        for kind, x in NO_FLOATS:
            for method in (small_vae().loss, small_vae().bits_per_dim, small_vae().encode):
                self.assertRefuses(f"float tensor.*{kind}", method, x)
        vae, x = VAE(lambda x: x, lambda z: torch.zeros(2, 5)), torch.zeros(2, 4)
        self.assertEqual(vae.decoder_std, 0.6)
        self.assertRefuses("2, 4.*got .2, 5", vae.loss, x)
        for shape in ((2, 3), (1, 4), (2,)):
            vae = VAE(lambda x: torch.zeros(shape), lambda z: z)
            self.assertRefuses(rf"2d.*got {re.escape(str(shape))}", vae.loss, x)

    def test_what_has_no_gradient_says_so(self):
        ddpm, vae = DDPM(lambda x, t: x, cosine_alphas(10)), VAE(None, lambda z: z)
        x = torch.zeros(2, 4, requires_grad=True)
        self.assertRefuses("ddim_chain.__wrapped__", ddpm.sample, x, 3)
        self.assertRefuses("decode", vae.sample, x)
        with torch.no_grad():
            self.assertEqual(ddpm.sample(x, 3).shape, vae.sample(x).shape)
        *_, (_, x_0) = DDPM.ddim_chain.__wrapped__(ddpm, x, 3)
        self.assertTrue(x_0.requires_grad)

    def test_both_files_in_one_notebook(self):
        x = torch.zeros(2, 4)
        for sections in ((section_1, section_2), (section_2, section_1)):
            names = {"__name__": "notebook"}
            for section in sections:
                exec(inspect.getsource(section), names)
            self.assertRefuses("8-bit", names["VAE"](lambda x: x, lambda z: z).bits_per_dim, x + 3)
            ddpm = names["DDPM"](lambda x, t: x, cosine_alphas(10))
            self.assertRefuses("float16", ddpm.elbo, x.half())


class TestSchedules(Test):
    def test_linear_and_cosine_are_the_published_ones(self):
        # For another T than 1000 the linear one's ends are scaled, so that the sum is the same.
        for T in (30, 250, 1000, 4000):
            beta = 1 - linear_alphas(T)
            self.assertClose(beta[[0, -1]], [0.1 / T, 20 / T])
            self.assertClose(beta.diff(), torch.full((T - 1,), (20 - 0.1) / T / (T - 1)))
            self.assertClose(beta.sum(), 10.05)
        variance = DDPM(None, linear_alphas(1000)).q_marginal(torch.zeros(1), 1)[1]
        self.assertEqual(variance.item(), torch.tensor(1e-4).item())  # to float32's last digit
        f = [math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(1000)]
        alphas = cosine_alphas(1000)
        self.assertClose(alphas.cumprod(0)[:-1], torch.tensor(f[1:]) / f[0], rtol=1e-5)
        self.assertClose(1 - alphas[-1], 0.999)  # where f(T) = 0

    def test_cauchy_is_the_distribution_of_log_snr(self):
        # By torch.distributions: log snr(t) has the quantiles of a Cauchy, cut off at both ends.
        alpha_bar = cauchy_alphas(1001).cumprod(0)
        quantiles = torch.distributions.Cauchy(-1.5, 1.1).cdf((alpha_bar / (1 - alpha_bar)).log())
        self.assertClose(quantiles, torch.linspace(*quantiles[[0, -1]].tolist(), 1001), rtol=1e-5)
        self.assertClose((1 - alpha_bar[0]).sqrt(), 0.00203, rtol=0.01)
        for T, r in ((1000, 0), (100, math.log(10))):
            ends = cauchy_alphas(T).cumprod(0)[[0, -1]].logit()
            self.assertClose(ends, torch.tensor([12.4 - 2 * r, -10 + 1.15 * r]))
        # A short chain's bound is cosine's, to a tenth, and the variance of its samples.
        for T in (400, 130, 60, 27, 20):
            chains = [ExactDDPM(schedule(T), clip=True, mu=(-0.7, 0.6), sigma=(0.05, 0.1))
                      for schedule in (cauchy_alphas, cosine_alphas)]
            x_0 = sample.to_uint8(chains[0].p(0).sample((4000,))) / 127.5 - 1
            cauchy, cosine = (ddpm.bits_per_dim(x_0, k=min(T, 100)).mean() for ddpm in chains)
            self.assertLess(cauchy, 1.1 * cosine, T)
        cauchy, cosine = (ddpm.sample(torch.randn(50_000).double()).var() for ddpm in chains)
        self.assertGreater(cauchy, 0.985 * cosine)

    def test_what_can_be_meant_and_what_not(self):
        # All end in white noise. 1 − α_t and, unless a chain is short, ᾱ_t are no α_t.
        for schedule in sample.SCHEDULES.values():
            for T in [*range(2, 100), 500, 1000, 4000]:
                alphas, most = schedule(T), 0.06 if T < 20 else 0.011 if T < 1000 else 1e-3
                self.assertLess(DDPM(None, alphas).alpha_bar[T], 0.1 if T < 10 else most)
                for wrong in (1 - alphas, alphas.cumprod(0))[:1 + (T >= 100)]:
                    self.assertRefuses("Did you pass", DDPM, None, wrong)
        for wrong, got in (([0.5], r"\(1,\)"), ([0.5, 1.0], "1.0"), ([0.5, 0.0, 0.5], "0.0"),
                           ([0.5] * 999 + [math.nan], "nan"), ([[0.5, 0.5]], r"\(1, 2\)")):
            self.assertRefuses(rf"between 0 and 1, got {got}\Z", DDPM, None, wrong)
        for product, fits in ((0.101, False), (0.099, True), (1e-49, True), (1e-51, False)):
            alphas = [product ** (1 / 500)] * 500
            if fits:
                self.assertClose(DDPM(None, alphas).alpha_bar[500], product, atol=0)
            else:
                self.assertRefuses("but must lie in 1e-50..0.1", DDPM, None, alphas)
        self.assertRefuses("0.39 but must be at least", DDPM, None, [0.39] * 3)
        DDPM(None, [0.4] * 3)
        # A list is as good as a tensor of float64; no table has a nan.
        ddpm = DDPM(None, linear_alphas(10).tolist())
        self.assertSame(ddpm.alpha[1:], linear_alphas(10))
        self.assertSame(ddpm.variance_q[:2], torch.zeros(2).double())


class TestForward(Test):
    def test_a_t_for_each_image(self):
        ddpm, t = DDPM(None, cosine_alphas(1000)), torch.tensor([1, 500, 1000])
        for shape in ((), (2,), (1, 2, 2)):  # numbers, points, images
            x = torch.randn(3, *shape)
            for f in (ddpm.q_transition, ddpm.q_marginal, lambda x, t: ddpm.q_posterior(x, -x, t)):
                mean, variance = f(x, t)
                for i in range(3):
                    self.assertClose(mean[i], f(x[i], int(t[i]))[0])
                    self.assertClose(variance[i].item(), f(x[i], int(t[i]))[1].item())

    def test_a_network_in_bfloat16(self):
        # As under autocast. The chain keeps its own precision.
        ddpm = DDPM(lambda x, t: x.bfloat16() + t[:, None] * 0, cosine_alphas(1000))
        for dtype in (torch.float32, torch.float64):
            x_t = torch.randn(3, 2, dtype=dtype)
            self.assertEqual(ddpm.predict_noise(x_t, torch.tensor(500)).dtype, dtype)

    def test_bad_arguments(self):
        seen, x = [], torch.zeros(3, 1, 2, 2)
        ddpm = DDPM(lambda x, t: seen.append(t) or x, cosine_alphas(10))
        for t in (0, 11, -1, torch.tensor([1, 2, 0]), torch.tensor([1, 2]), 1.5, math.nan):
            for method in (ddpm.q_marginal, ddpm.predict_x0, ddpm.predict_noise):
                self.assertRefuses("t must be .*in 1..10", method, x, t)
        for t in (0.5, torch.rand(3)):  # of other methods, from 0 to 1
            self.assertRefuses("t must be integers", ddpm.output, x, t)
        self.assertRefuses(r"got 11\Z", ddpm.q_marginal, torch.zeros(99), torch.arange(3, 102))
        for dtype in (torch.uint8, torch.int32):  # an index of bytes would be a mask
            t, marginal = torch.tensor([1, 5, 10]), DDPM(None, cosine_alphas(1000)).q_marginal
            self.assertClose(marginal(x, (25 * t).to(dtype))[1], marginal(x, 25 * t)[1])
            ddpm.predict_noise(x, t.to(dtype))
            self.assertSame(seen.pop(), t)  # the network sees int64, as an nn.Embedding needs it
        for kind, wrong in NO_FLOATS:
            for method in (ddpm.loss, ddpm.bits_per_dim, ddpm.sample, lambda x: ddpm.score(x, 1)):
                self.assertRefuses(f"float tensor.*{kind}", method, wrong)
        for dtype in (torch.bfloat16, torch.float16):
            for method in (ddpm.elbo, ddpm.chain, ddpm.sample):
                self.assertRefuses(str(dtype), method, x.to(dtype))
        for value in (1.01, math.nan):
            self.assertRefuses(f"is {value}", ddpm.elbo, x - value)
        one = DDPM(lambda x, t: x[:1], cosine_alphas(10))
        self.assertRefuses(r"denoiser: .*\(3, 1.*got \(1", one.loss, x)
        self.assertRefuses("'x'", DDPM, None, cosine_alphas(10), predict="x")
        for steps, eta in ((0, 0), (11, 0), (2.5, 0), (5, -0.1), (5, 1.1), (5, math.nan), ("5", 0),
                           ([], 0), ([3, 5], 0), ([5, 5, 1], 0), ([5, 0], 0), ([11, 2], 0),
                           (True, 0), (torch.tensor([3, 5]), 0), (range(0, 10), 0)):
            self.assertRaises(ValueError, ddpm.sample, x, steps, eta)
        for k in (0, 1.5):
            self.assertRaises(ValueError, ddpm.elbo, x, k)


def pixel_ddpm(T, predict="noise"):
    """With an exact denoiser, for pixels in [-1, 1], unlike those of Ex. 2.1."""
    return ExactDDPM(linear_alphas(T), predict, clip=True, mu=(-0.5, 0.4), sigma=(0.05, 0.1))


class TestLoss(Test):
    def test_a_method_of_ones_own_is_the_one_that_is_called(self):
        for model in (VAE(None, None), DDPM(None, cosine_alphas(10))):
            model.loss = lambda x: 7 * x
            self.assertEqual(model(1), 7)
        exact, x_T, seen = pixel_ddpm(30), torch.randn(40).double(), []
        ddpm = DDPM(lambda x, t: seen.append(x) or x, exact.alpha[1:])
        ddpm.predict_noise = exact.predict_noise
        self.assertSame(ddpm.sample(x_T, 9, 0.0), exact.sample(x_T, 9, 0.0))
        ddpm.p_transition = lambda x_t, t: (x_t + t, torch.zeros(()))
        self.assertClose(ddpm.sample(x_T), x_T + 30 * 31 / 2)
        ddpm.alpha_bar = torch.full((31,), 0.25).double()  # or a table
        ddpm.loss(1e9 * x_T)
        self.assertClose(seen.pop(), 0.5e9 * x_T, atol=10)
        ddpm.q_sample = lambda x_0, t, noise: x_0 + 7
        ddpm.loss(x_T)
        self.assertSame(seen.pop(), x_T + 7)
        ddpm.output = lambda x_t, t: torch.full_like(x_t, 1e4)  # guidance
        self.assertClose(ddpm.loss(x_T), 1e8, rtol=1e-3)
        terms = []
        for factor in (1, 100):  # another variance: `elbo` ignores it
            exact.p_transition = lambda x_t, t: [
                y * c for y, c in zip(DDPM.p_transition(exact, x_t, t), (1, factor))]
            torch.manual_seed(0)
            terms.append(exact.elbo(torch.zeros(40).double()))
        self.assertSame(*terms)

    def test_every_t_is_as_likely(self):
        seen = []
        ddpm = DDPM(lambda x, t: seen.append(t) or x, cosine_alphas(20))
        for _ in range(4000):
            ddpm.loss(torch.zeros(3))
        t = torch.stack(seen)
        for column in t.T:
            counts = torch.bincount(column, minlength=21) - torch.tensor([0] + [200] * 20)
            self.assertTrue(counts[0] == 0 and counts.abs().max() < 5 * 200**0.5)
        for dim in range(2):  # independent of call and image
            self.assertMean((t - 10.5) * (t - 10.5).roll(1, dim), 0)

    def test_the_gradient_and_the_noise(self):
        # A network that knows x_0 has no loss if the noise and the t are those of x_t.
        x_0 = torch.rand(64, 1, 4, 4) * 4 - 2
        ddpm = DDPM(lambda x_t, t: x_0, cosine_alphas(1000), "image")
        self.assertClose(ddpm.loss(x_0), 0, atol=1e-8)
        ddpm = DDPM(lambda x_t, t: ddpm.noise_between(x_0, x_t, t), cosine_alphas(1000))
        self.assertClose(ddpm.loss(x_0), 0, atol=1e-8)
        # For the network a x_t and x_0 = 0 the derivative at a = 0 is −2 E x_t ε = −2 E √(1 − ᾱ_t).
        seen, a = [], torch.zeros((), requires_grad=True)
        ddpm = DDPM(lambda x, t: seen.append((x, t)) or a * x, cosine_alphas(50))
        draws = [torch.autograd.grad(ddpm.loss(torch.zeros(50, 4)), a)[0] for _ in range(2000)]
        std = (1 - ddpm.alpha_bar).sqrt()
        self.assertMean(torch.stack(draws), -2 * std[1:].mean())
        noise = torch.stack([x / std[t][:, None] for x, t in seen])
        for moment, expected in ((noise, 0), (noise**2, 1), (noise**4, 3)):  # N(0, 1),
            self.assertMean(moment, expected)
        for dim in range(3):  # and independent of call, image and pixel
            self.assertMean(noise * noise.roll(1, dim), 0)


class TestMixture(Test):
    def test_score_is_the_gradient_of_log_p_t(self):
        for predict in ("image", "noise"):
            x, ddpm = torch.linspace(-1, 1, 21).double().requires_grad_(), pixel_ddpm(100, predict)
            for t in (1, 20, 100):
                gradient, = torch.autograd.grad(ddpm.p(t).log_prob(x).sum(), x)
                self.assertClose(ddpm.score(x.detach(), t), gradient, rtol=1e-5)

    def test_the_chains_draw_from_the_mixture(self):
        # The second has components of its own, and a variance of 3.5: `clip` would cut it off.
        wide = ExactDDPM(linear_alphas(2000), pi=(3, 2, 5), mu=(-2, 1, 2), sigma=(0.2, 0.3, 0.9))
        self.assertClose(wide.p(0).mean, 0.3 * -2 + 0.2 * 1 + 0.5 * 2)
        for wrong in ({"pi": (0.2, 0.3, 0.5)}, {"pi": (2, -1)}, {"sigma": (1, 0)}):
            self.assertRaises(ValueError, ExactDDPM, **wrong)
        for ddpm, sampler in ((pixel_ddpm(2000, "image"), {}), (wide, {"steps": 500}),
                              (pixel_ddpm(2000), {"steps": 500, "eta": 0.0})):
            x = ddpm.sample(torch.randn(20_000).double(), **sampler)
            data, left = ddpm.p(0), x < -0.1  # at least 2 σ from every mean
            self.assertMean(left, data.cdf(torch.tensor(-0.1).double()).item())
            # A chain is too narrow by about Σ [1 − α_t − σ_q²(t)], which falls like 1/T.
            self.assertClose(x.mean(), data.mean, atol=5 * (data.variance / 20_000)**0.5)
            self.assertClose(x.var(), data.variance, rtol=0.03)

    def test_clipped_unless_told_otherwise(self):
        x_T = torch.randn(50).double()
        for clip, predict in product((True, False), ("noise", "image")):
            ddpm = DDPM(lambda x, t: -3 * x, cosine_alphas(10), predict, clip)
            for x in (ddpm.sample(x_T), ddpm.sample(x_T, 5), ddpm.predict_x0(x_T, 5)):
                self.assertEqual(bool(x.abs().max() <= 1), clip)
        # 3 is clipped to 1. DDIM's ε̂_θ is the noise to 1, (2.59) with η = 0; the network's, to 3.
        ddpm = DDPM(lambda x, t: torch.full_like(x, 3), cosine_alphas(10), "image")
        alpha_bar, alpha_bar_1 = ddpm.alpha_bar[[10, 1]]
        root, std = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        _, x_1 = next(ddpm.ddim_chain(x_T, 2, 0.0))
        noise = (x_T - root) / std
        self.assertClose(x_1, alpha_bar_1.sqrt() + (1 - alpha_bar_1).sqrt() * noise)
        self.assertClose(ddpm.predict_noise(x_T, 10), (x_T - 3 * root) / std)

    def test_the_times_of_a_chain_and_the_tensor_that_it_goes_on_from(self):
        ddpm, x_T = pixel_ddpm(100), torch.randn(5).double()
        for chain in ddpm.reverse_chain(x_T), ddpm.ddim_chain(x_T, 100, eta=1.0):
            for t, x_t in chain:
                if t == 1:  # before the last step, in which there is no noise
                    x_t.copy_(torch.linspace(-1, 1, 5))
                    expected, _ = ddpm.p_transition(x_t, 1)
            self.assertClose(x_t, expected)
        self.assertEqual([t for t, _ in ddpm.reverse_chain(x_T)], list(range(99, -1, -1)))
        for times in ([0], [1, 0], [81, 46, 1, 0], list(range(99, -1, -1))):
            falling = [100, *times[:-1]]
            for steps in (len(times), float(len(times)), falling, torch.tensor(falling)):
                self.assertEqual([t for t, _ in ddpm.ddim_chain(x_T, steps)], times)
        # Where x_0 is known and η = 0, one ε leads to all x_t; and a chain may begin anywhere.
        x_0 = torch.full_like(x_T, 0.3)
        knows = DDPM(lambda x, t: x_0, ddpm.alpha[1:], "image")
        self.assertEqual(ddpm.times(range(70, 0, -1)), list(range(70, 0, -1)))
        chain = dict(knows.ddim_chain(knows.q_sample(x_0, 70, x_T), [70, 12, 5], 0))
        self.assertEqual(list(chain), [12, 5, 0])
        for t, x_t in chain.items():
            variance = 1 - ddpm.alpha_bar[t]
            self.assertClose(x_t, (1 - variance).sqrt() * x_0 + variance.sqrt() * x_T)


class TestElbo(Test):
    def test_pixel_masses(self):
        pixels = (torch.arange(256).double() / 127.5 - 1)[:, None]
        mean = torch.tensor([-1.2, -1, 0.123, 0.99, 5]).double()
        edges = (torch.arange(1, 256).double() - 0.5)[:, None] / 127.5 - 1
        for std in torch.tensor([1e-3, 0.02, 1.0]).double():
            log_mass, cdf = log_pixel_mass(pixels, mean, std), Normal(mean, std).cdf(edges)
            mass = F.pad(cdf, (0, 0, 1, 0)).diff(dim=0, append=torch.ones(1, 5))
            self.assertClose(log_mass.exp(), mass, rtol=1e-5, atol=1e-12)
            far = log_pixel_mass(pixels.float(), mean.float(), std.float())
            self.assertTrue(far.isfinite().all())
            self.assertClose(far, log_mass, rtol=1e-3, atol=1e-3)
            with patch(torch.special, "log_ndtr", wraps=torch.special.log_ndtr,
                                   side_effect=[NotImplementedError, mock.DEFAULT]):  # as on mps
                self.assertSame(log_pixel_mass(pixels, mean, std), log_mass)

    def test_bits_per_dim_of_8_bit_pixels_alone(self):
        # The grids of 4, 2 and 1 bits are part of theirs; those of other numbers of bits are not.
        vae = VAE(lambda x: torch.cat([x, x], dim=1), lambda z: z)
        ddpm = DDPM(lambda x, t: x, cosine_alphas(10))
        grids = {bits: torch.linspace(-1, 1, 2**bits).double() for bits in range(1, 17)}
        grids |= {"0 to 1": torch.arange(256) / 255, "odd, to 255": torch.arange(1.0, 256, 2)}
        for bits, x in grids.items():
            for x, f in product((x[None], x[None].float()), (vae, ddpm)):
                if bits in (1, 2, 4, 8):
                    self.assertTrue(f.bits_per_dim(x).isfinite(), bits)
                else:
                    self.assertRefuses("must hold 8-bit pixels", f.bits_per_dim, x)

    def test_the_terms_and_bits_per_dim(self):
        # x_0 = ±1 and the best linear denoiser: each term is as large as t is likely, on average.
        ddpm, x_0 = DDPM(None, torch.full((20,), 0.85), clip=False), torch.randn(20_000, 4).sign()
        ddpm.denoiser = lambda x, t: x * (1 - ddpm.alpha_bar[t]).sqrt().view(-1, 1)
        x_0, snr = x_0.double(), ddpm.alpha_bar[1:] / (1 - ddpm.alpha_bar[1:])
        mean, variance = ddpm.q_marginal(x_0, 20)
        prior = kl_divergence(Normal(mean, variance.sqrt()), Normal(0.0, 1.0)).sum(1)
        # (2.43), with E (x̂_θ − x_0)² = 1 − ᾱ_t, for 4 numbers.
        total = (4 * 0.5 * (snr[:-1] - snr[1:]) * (1 - ddpm.alpha_bar[2:])).sum()
        for k in (None, 3.0, 1):
            terms = ddpm.elbo(x_0, k)
            self.assertClose(terms["prior_matching"], prior)
            self.assertMean(terms["consistency"], total)
            elbo = terms["reconstruction"] - prior - terms["consistency"]
            self.assertMean(ddpm.bits_per_dim(x_0, k) + elbo / (4 * math.log(2)), 0)
        self.assertLess(terms["consistency"].std(), total)  # of one t's 4 squared errors alone
        times, _ = ddpm.importance_sampling(3, 20_000)  # a t for each image, from 2 to T
        self.assertEqual((times.shape, times.unique().tolist()), ((3, 20_000), [*range(2, 21)]))


def small_unet(**options):
    """Of the default's kind: (B, 1, H, W), H and W divisible by 2."""
    return Fourier(UNet(5, 1, 8, (1, 2), **options), (3, 5))


class TestMeta(Test):
    """The meta device stands in for a GPU: there a tensor that stays behind on the CPU raises, and
    so does any value that the CPU would have to wait for."""

    def test_ddpm(self):
        alphas, x = cauchy_alphas(10), torch.zeros(3, 1, 8, 8, device="meta")
        for predict in ("noise", "image"):
            ddpm = DDPM(small_unet(), alphas, predict).to("meta")
            for t in (5, torch.tensor([1, 5, 10])):
                for mean, variance in (ddpm.q_transition(x, t), ddpm.q_marginal(x, t),
                                       ddpm.q_posterior(x, x, t), ddpm.p_transition(x, t)):
                    Normal(mean, variance.sqrt(), validate_args=False).log_prob(x)
                for y in (ddpm.q_sample(x, t, x), ddpm.predict_x0(x, t), ddpm.predict_noise(x, t),
                          ddpm.noise_between(x, x, t), ddpm.score(x, t)):
                    self.assertEqual((y.shape, y.device.type), (x.shape, "meta"))
            with patch(torch.Tensor, "__bool__", lambda all_pixels: True):
                results = [ddpm.bits_per_dim(x, k) for k in (None, 2)]
            results += [ddpm.sample(x, steps) for steps in (None, 4)]
            self.assertEqual([y.shape for y in results], [(3,)] * 2 + [x.shape] * 2)
            self.assertFalse(any(y.requires_grad for y in results))  # no graph grows along a chain

    def test_the_loss_and_a_vae(self):
        x = torch.zeros(3, 1, 8, 8, device="meta")
        for model in (DDPM(small_unet(dropout=0.1), cauchy_alphas(10)), small_vae(),
                      small_vae(decoder_std="learned")):
            torch.autograd.grad(model.to("meta").loss(x), list(model.parameters()))
        with patch(torch.Tensor, "__bool__", lambda all_pixels: True):
            self.assertEqual(model.sample(model.encode(x)[0].detach()).shape, x.shape)
            self.assertEqual(model.bits_per_dim(x).shape, (3,))

    def test_the_loss_is_one_graph_for_torch_compile(self):
        # (torch.compile turns off the checks of torch.distributions.)
        self.addCleanup(torch.distributions.Distribution.set_default_validate_args, True)
        for model in (DDPM(small_unet(), cauchy_alphas(10)), small_vae()):
            for fullgraph in (False, True):
                count = mock.Mock(side_effect=lambda graph, inputs: graph.forward)
                torch._dynamo.reset()
                torch.compile(model, backend=count, fullgraph=fullgraph)(torch.rand(3, 1, 8, 8))
                self.assertEqual(count.call_count, 1)


def random_weights(unet):
    """Without the zeros at the end of every branch."""
    for parameter in unet.parameters():
        nn.init.normal_(parameter, std=0.2)
    return unet


def unet_by_hand(unet, x, t, multipliers, blocks, attention):
    """arXiv 2006.11239's network in float64, and its mean square's gradient in every weight."""
    of = {}  # the weight and the bias of every layer
    for name, value in unet.named_parameters():
        of.setdefault(name.rpartition(".")[0], []).append(value.detach().double().requires_grad_())

    def conv(name, h, stride=1):
        return F.conv2d(h, *of[name], stride, len(of[name][0][0, 0]) // 2)

    def norm(name, h):
        groups = max(g for g in (1, 2, 4, 8, 16, 32) if h.shape[1] % (4 * g) == 0)
        return F.group_norm(h, groups, *of[name])

    def attend(name, h):
        q, k, v = conv(f"{name}.qkv", norm(f"{name}.norm", h)).flatten(2).chunk(3, dim=1)
        p = (q.mT @ k / len(k[0])**0.5).softmax(-1)  # of every position, over all others
        return h + conv(f"{name}.out", (v @ p.mT).view(h.shape))

    def block(name, h, attends):
        shortcut = conv(f"{name}.shortcut", h) if f"{name}.shortcut" in of else h
        h = conv(f"{name}.conv1", F.silu(norm(f"{name}.norm1", h)))
        h = h + F.linear(F.silu(time), *of[f"{name}.shift"])[:, :, None, None]
        h = shortcut + conv(f"{name}.conv2", F.silu(norm(f"{name}.norm2", h)))
        return attend(f"{name}.attention", h) if attends else h

    half = len(of["stem"][0]) // 2
    angles = t.double()[:, None] / 10_000 ** (torch.arange(half).double() / (half - 1))
    time = F.linear(torch.cat([angles.sin(), angles.cos()], 1), *of["time.0"])
    time = F.linear(F.silu(time), *of["time.2"])
    skips, down, up = [conv("stem", x.double())], itertools.count(), itertools.count()
    for level in range(len(multipliers)):
        if level > 0:
            skips.append(conv(f"down.{next(down)}", skips[-1], stride=2))
        for _ in range(blocks):
            skips.append(block(f"down.{next(down)}", skips[-1], level in attention))
    h = block("middle.1", block("middle.0", skips[-1], True), False)
    for level in reversed(range(len(multipliers))):
        for _ in range(blocks + 1):
            h = block(f"up.{next(up)}", torch.cat([h, skips.pop()], 1), level in attention)
        if level > 0:  # nearest: every pixel becomes four
            h = conv(f"up.{next(up)}.1", h.repeat_interleave(2, 2).repeat_interleave(2, 3))
    output = conv("head.2", F.silu(norm("head.0", h)))
    return output, *torch.autograd.grad(output.square().mean(), [*itertools.chain(*of.values())])


class TestUNet(Test):
    def test_against_the_network_by_hand(self):
        x, t = torch.randn(3, 3, 8, 12), torch.tensor([1, 70, 1000])
        for channels, *shape in ((8, (1,), 1, ()), (16, (1, 2, 3), 1, ()), (8, (1, 2), 2, (0,)),
                                 (8, (2, 1, 1), 1, (1, 2)), (128, (1,), 1, ())):
            unet = random_weights(UNet(3, 5, channels, *shape, dropout=0.5)).eval()
            output = unet(x, t)
            gradients = torch.autograd.grad(output.square().mean(), list(unet.parameters()))
            for a, b in zip((output, *gradients), unet_by_hand(unet, x, t, *shape), strict=True):
                self.assertLess((a - b).norm(), 1e-3 * b.norm())
            self.assertClose(unet(x, t[1]), unet(x, t[1].repeat(3)))  # as others pass t

    def test_what_starts_at_zero_and_dropout_before_conv2_alone(self):
        # A zero anywhere else can keep a branch dead for ever.
        zero = r"(conv2|attention\.out|head\.2)\.(weight|bias)|(norm\d?|head\.0)\.bias"
        for name, parameter in UNet(attention=(0,)).named_parameters():
            self.assertEqual(not parameter.any(), bool(re.search(zero, name)), name)
        # A fresh block is its shortcut, in training, too: the branches with dropout end in zeros.
        for c_in, c_out in ((8, 8), (8, 16)):
            block, seen = network.ResidualBlock(c_in, c_out, 8, 0.5, attend=True), []
            block.conv2.register_forward_pre_hook(lambda _, inputs: seen.extend(inputs))
            x, time = torch.randn(2, c_in, 8, 8), torch.randn(2, 8)
            self.assertSame(block(x, time), block.shortcut(x))
            self.assertAlmostEqual((seen[0] == 0).double().mean().item(), 0.5, delta=0.1)

    def test_bad_arguments(self):
        for name, *values in (("channels", 6, 0, -4), ("blocks", 0), ("multipliers", (), (1, 0)),
                              ("attention", (3,), (-1,), (True, False, False), (0, True))):
            for value in values:
                self.assertRefuses(re.escape(str(value)), UNet, **{name: value})
        for expected, *shape in (("by 4, got 30 and 28", 1, 1, 30, 28), ("by 4", 1, 1, 28, 30),
                                 (r"\(B, 1, H, W\).*3, 28", 3, 28, 28), ("2, 28", 3, 2, 28, 28),
                                 (r"\(3, 1, 28\)", 3, 1, 28)):
            self.assertRefuses(expected, UNet(), torch.zeros(shape), torch.ones(1))

    def test_float64_and_a_time_embedding_in_float32(self):
        unet, x, t = random_weights(small_unet()), torch.randn(5, 1, 8, 8), torch.arange(1, 6)
        output, embedding = unet(x, t), network.time_embedding(t, 32)
        self.assertClose(unet.double()(x.double(), t), output, rtol=1e-4, atol=1e-4)
        self.addCleanup(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.bfloat16)
        self.assertSame(network.time_embedding(t, 32), embedding)

    def test_fourier_features(self):
        # The imaginary and the real part of e^(i 2ⁿ π x), of all channels.
        for shape in ((2, 3, 4), (2, 3, 4, 5)):
            x = torch.rand(shape) * 2 - 1
            waves = [torch.exp(1j * 2**n * math.pi * x.double()) for n in (3, 5)]
            expected = torch.cat([x, *[part for z in waves for part in (z.imag, z.real)]], dim=1)
            self.assertClose(Fourier(lambda h, t: h * t, (3, 5))(x, 2), 2 * expected, atol=1e-4)
            self.assertSame(Fourier(lambda h, t: h, ())(x, 2), x)

    def test_every_option_reaches_its_model(self):
        def kinds(model, kind):
            return [module for module in model.modules() if isinstance(module, kind)]

        for text, value, expected in (
                ("ddpm --timesteps 50", lambda m: m.T, 50),
                ("ddpm --schedule linear", lambda m: m.alpha[9], linear_alphas(1000)[8]),
                ("ddpm --schedule cosine", lambda m: m.alpha[9], cosine_alphas(1000)[8]),
                ("ddpm --predict image", lambda m: m.predict, "image"),
                ("ddpm --channels 8", lambda m: m.denoiser.network.stem.out_channels, 8),
                ("ddpm --multipliers 1 3", lambda m: m.denoiser.network.down[2].shift.out_features,
                 48),
                ("ddpm --blocks 3", lambda m: len(m.denoiser.network.down), 3 * 3 + 2),
                ("ddpm --attention 1", lambda m: len(kinds(m, network.Attention)), 1 + 1 + 2),
                ("ddpm --dropout 0.25", lambda m: {x.p for x in kinds(m, nn.Dropout)}, {0.25}),
                ("ddpm --fourier 2", lambda m: m.denoiser.exponents, [2]),
                ("vae --latent-dim 3", lambda m: m.decoder[0].in_features, 3),
                ("vae --channels 8", lambda m: m.encoder[0].out_channels, 8),
                ("vae --decoder-std 0.5", lambda m: m.decoder_std, 0.5),
                ("vae --decoder-std learned", lambda m: m.decoder_std.requires_grad, True)):
            config = train.configure(train.parse_args(["--model", *text.split()])[1], None, "cpu")
            model = sample.build_model({**config, "image_shape": [3, 32, 32]})
            self.assertEqual(value(model), expected, text)

    def test_what_auto_chooses(self):
        # On machines of all kinds, by what torch says of them; up to 2.10 it says nothing of a CPU.
        with patch(torch, "ones", lambda n, device: mock.Mock(device=device)), \
                patch(torch.cuda, "is_available", side_effect=[True, False]):
            self.assertEqual([sample.pick_device("auto") for _ in range(2)], ["cuda", "cpu"])
        for flag, cpu in (("", False), ("avx2", False), ("amx_bf16", True), ("avx512_bf16", True)):
            says = mock.Mock(get_capabilities=lambda: {flag: True}) if flag else mock.Mock(spec=[])
            cuda = mock.Mock(is_bf16_supported=lambda including_emulation: not cpu)
            with mock.patch.multiple(torch, cpu=says, cuda=cuda,
                                     autocast=lambda *kind, cache_enabled: kind):
                for bf16, device, precision in (
                        (cpu, "cpu", "auto"), (not cpu, "cuda", "auto"), (False, "mps", "auto"),
                        (False, "cpu", "fp32"), (True, "cpu", "bf16"), (False, "cuda", "fp32")):
                    context = sample.autocast(torch.device(device), precision)
                    self.assertEqual(context == (device, torch.bfloat16), bf16)
        with patch(torch, "ones", side_effect=RuntimeError("No. Driver, that is.\nNor GPU")):
            self.assertRefuses("--device x: No$", sample.pick_device, "x")


def decode_png(path):
    """(C, H, W), by a reader of its own."""
    file, chunks = io.BytesIO(Path(path).read_bytes()), {}
    assert file.read(8) == b"\x89PNG\r\n\x1a\n"
    while length := file.read(4):
        kind, data, crc = file.read(4), file.read(int.from_bytes(length, "big")), file.read(4)
        assert int.from_bytes(crc, "big") == zlib.crc32(kind + data)
        chunks[kind] = data
    assert list(chunks)[0] == b"IHDR" and list(chunks)[-1] == b"IEND"
    width, height, depth, color, *rest = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
    assert (depth, rest) == (8, [0, 0, 0])
    body = bytearray(zlib.decompress(chunks[b"IDAT"]))
    rows = torch.frombuffer(body, dtype=torch.uint8).view(height, -1)
    assert (rows[:, 0] == 0).all()  # filter type 0: the bytes themselves
    return rows[:, 1:].view(height, width, {0: 1, 2: 3}[color]).permute(2, 0, 1)


class FileTest(Test):
    def setUp(self):
        super().setUp()
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(self.folder)

    def assertPicture(self, path, x, columns=None):
        """The file shows these images, in [-1, 1], but for rounding."""
        expected = sample.grid(sample.to_uint8(x), columns).int()
        self.assertLessEqual((decode_png(path).int() - expected).abs().max(), 1)


def idx(tensor):
    """An IDX file of these bytes."""
    return (struct.pack(f">HBB{tensor.ndim}I", 0, 8, tensor.ndim, *tensor.shape)
            + bytes(tensor.flatten().tolist()))


class TestData(FileTest):
    def test_pictures(self):
        images = torch.arange(1, 6, dtype=torch.uint8).view(5, 1, 1, 1).expand(5, 3, 4, 6)
        picture = sample.grid(images)
        self.assertEqual(picture.shape, (3, 2 * 6 + 2, 3 * 8 + 2))
        for i in range(5):
            top, left = 2 + 6 * (i // 3), 2 + 8 * (i % 3)
            self.assertTrue((picture[:, top:top + 4, left:left + 6] == i + 1).all())
        self.assertEqual(picture.long().sum(), images.long().sum())
        for channels in (1, 3):
            picture = torch.randint(0, 256, (channels, 5, 7), dtype=torch.uint8)
            sample.write_png("x.png", picture)
            self.assertSame(decode_png("x.png"), picture)
        values, x = torch.arange(256, dtype=torch.uint8), torch.linspace(-1, 1, 256)
        self.assertClose(sample.to_float(values, CPU), x, atol=1e-6)
        self.assertSame(sample.to_uint8(x), values)
        self.assertEqual(sample.to_uint8(9 * x[[0, -1]]).tolist(), [0, 255])

    def test_idx_files_gzipped_or_not_and_a_pt_file(self):
        images = torch.randint(0, 256, (100, 3, 4, 5), dtype=torch.uint8)
        os.mkdir("t10k-images-idx3-ubyte")  # as Kaggle's archive has both
        for pack, other in ((gzip.compress, bytes), (bytes, gzip.compress)):
            Path("train-images-idx3-ubyte.gz").write_bytes(pack(idx(images[:, 0])))
            Path("t10k-images.idx3-ubyte").write_bytes(other(idx(images[:, 1])))
            self.assertSame(train.load_images(self.folder), (images[:, :1], images[:, 1:2]))
        Path("train-images-idx3-ubyte (1).gz").write_bytes(idx(images[:, 2]))  # a second download
        Path("train-images-idx3-ubyte").write_bytes(idx(images[:, 0]))  # beside its archive
        self.assertSame(train.read_idx(self.folder, "train"), images[:, :1])
        Path("train-images-idx3-ubyte").write_bytes(idx(images[:, 2]))
        self.assertRefuses("ubyte, .*ubyte.gz: .*differ", train.read_idx, self.folder, "train")
        torch.save(images, "x.pt")
        training = images[[i for i in range(100) if i % 32 > 0]]
        self.assertSame(train.load_images(Path("x.pt")), (training, images[::32]))


class TestCheckpoint(FileTest):
    def test_what_is_not_a_checkpoint(self):
        class RunsCode:  # its pickle makes a folder when it is read
            def __reduce__(self):
                return os.mkdir, ("made",)
        path = Path("x.pt")
        config = {**train.configure({"model": "vae"}, None, "cpu"), "image_shape": [1, 8, 8]}
        weights = dict(sample.build_model(config).state_dict())
        state = {"format": sample.FORMAT, "config": config, "ema": weights}
        sample.save(path, state)
        self.assertSame(sample.read_checkpoint(path)[0]["ema"], weights)
        whole = path.read_bytes()
        for content in (b"", b"text", whole[:-1], whole[:1000], whole[100:]):
            path.write_bytes(content)
            self.assertRefuses(r"^x\.pt: .*torch: ", sample.read_checkpoint, path)
        for expected, wrong in (
                ("not a checkpoint", torch.zeros(3)), ("torch: ", {"config": RunsCode()}),
                ("of format 7, .* reads format 6", {**state, "format": 7}),
                ("(?s:.*)encoder.0.bias", {**state, "ema": {"encoder.0.bias": torch.zeros(7)}}),
                ("image_shape", {**state, "config": {"model": "vae"}}),
                ("ema", {"format": sample.FORMAT, "config": config})):
            sample.save(path, wrong)
            self.assertRefuses(rf"^x\.pt: .*{expected}", sample.read_checkpoint, path)
        self.assertFalse(os.path.exists("made"))

    @mock.patch("time.sleep")
    def test_a_file_is_the_old_one_until_the_new_one_is_on_the_disk(self, sleep):
        path = self.folder / "x.pt"
        sample.save(path, 1)
        for last, error in (("os.fsync", OSError), ("os.replace", PermissionError)):
            with mock.patch(last, side_effect=error):
                self.assertRaises(error, sample.save, path, 2)
            self.assertEqual(sample.load(path), 1)
        # Windows refuses while somebody reads the old one.
        refusals = [PermissionError] * 6 + [mock.DEFAULT]
        with mock.patch("os.replace", wraps=os.replace, side_effect=refusals):
            sample.save(path, 3)
        self.assertEqual((sample.load(path), os.listdir(self.folder)), (3, ["x.pt"]))
        path.write_bytes(b"")  # claimed by another process, which has not replaced it yet
        with mock.patch("os.link", side_effect=PermissionError):
            self.assertRaises(FileExistsError, sample.save, path, 4, replace=False)
        self.assertTrue(path.exists())
        # Without links, too, what is new takes no other's name, and what failed leaves none.
        for link in (os.link, mock.Mock(side_effect=OSError(errno.ENOTSUP, "no links"))):
            with mock.patch("os.link", link):
                self.assertRaises(FileExistsError, sample.save, path, 4, replace=False)
                path.unlink()
                with mock.patch.multiple("os", replace=mock.Mock(side_effect=PermissionError),
                                         link=mock.Mock(side_effect=OSError)):
                    self.assertRaises(PermissionError, sample.save, path, 4, replace=False)
                self.assertEqual(os.listdir(self.folder), [])
                with mock.patch("os.fsync", side_effect=OSError(errno.EINVAL, "not here")):
                    sample.save(path, 5, replace=False)
                self.assertEqual((sample.load(path), os.listdir(self.folder)), (5, ["x.pt"]))
        with patch(torch.serialization, "location_tag", lambda storage: "cuda:0"):
            sample.save(path, torch.ones(3))  # from a GPU to a machine without one
        self.assertSame(sample.load(path), torch.ones(3))


class CommandTest(FileTest):
    """Runs the scripts on 256 training and 60 test images of MNIST. Options are written as in a
    terminal: self.train("vae", "--steps 2", out=…), self.draw("--seed 1")."""

    TINY = {"ddpm": "--channels 8 --multipliers 1 2 --attention 1 --timesteps 20",
            "vae": "--channels 8 --latent-dim 4"}

    def setUp(self):
        super().setUp()
        self.data, self.out = self.folder / "data", self.folder / "run"
        self.data.mkdir()
        for split, images in (("train", MNIST[0][:256, 0]), ("t10k", MNIST[1][:60, 0])):
            (self.data / f"{split}-images-idx3-ubyte").write_bytes(idx(images))

    @property
    def checkpoint(self):
        return self.out / "checkpoint.pt"

    def options(self, model, text="", data=None, out=None, device="cpu"):
        """Those of a small run, and then those of the text."""
        return ["--model", model, "--data", self.data if data is None else data,
                "--out", out or self.out, "--device", device, "--batch-size", 16,
                "--precision", "fp32", *self.TINY[model].split(), *text.split()]

    def call(self, main, options, status=0):
        """In this process, which saves the seconds of a start: the output. Sets self.errors."""
        code = 0
        with redirect_stdout(io.StringIO()) as output, redirect_stderr(io.StringIO()) as errors:
            try:
                main(list(map(str, options)))
            except SystemExit as stop:
                code = stop.code
        self.errors = errors.getvalue()
        self.assertEqual(code, status, self.errors)
        return output.getvalue()

    def train(self, model, text="", status=0, **where):
        return self.call(train.main, self.options(model, text, **where), status)

    def draw(self, text="", status=0):
        text = f"--device cpu --precision fp32 {text}".split()
        return self.call(sample.main, ["--checkpoint", self.checkpoint, *text], status)

    def assertMistake(self, expected, command, *arguments, **options):
        """train, draw or call ends with status 2, and one line on stderr says what is expected."""
        with self.subTest(expected):
            command(*arguments, status=2, **options)
            line = re.sub(r"\r[^\n]*\n", "", self.errors)  # without the progress bar's
            self.assertRegex(line, rf"\A(train|sample)\.py: error: .*{expected}.*\n\Z")
            self.assertLess(len(line), 700)

    def start(self, script, options, launcher=(), **more):
        """In a process of its own."""
        command = [sys.executable, *launcher, HERE / script, *map(str, options)]
        return subprocess.Popen(command, **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE,
                                            "text": True, "cwd": self.folder, **more})

    def finish(self, process, status=0):
        output, errors = process.communicate(timeout=120)
        self.assertEqual(process.returncode, status, errors)
        return output

    def metrics(self, *names, out=None):
        """These columns of metrics.csv. (Read at once: a running train.py may write its head.)"""
        text = ((out or self.out) / "metrics.csv").read_text()
        head, *rows = [line.split(",") for line in text.splitlines()] or [names]
        return [[row[head.index(name)] for row in rows] for name in names]

    def assertSameEnd(self, *outs):
        a, b = (sample.load(out / "checkpoint.pt") for out in outs)
        self.assertEqual(a["config"], b["config"])
        for part in ("step", "model", "ema", "optimizer"):
            self.assertSame(a[part], b[part])


class TestRun(CommandTest):
    """What the two commands leave behind: pictures, samples, the last line."""

    @patch(sample, "BATCH", 5)
    def test_samples_and_the_film_strip_of_a_ddpm(self):
        # In batches of 5 and 1, by the moving average of the weights, without dropout.
        output = self.train("ddpm", "--steps 20 --lr 0.01 --dropout 0.1")
        self.assertRegex(output, r"test ELBO .*\(60 images, 5 random t each\); training ELBO .*"
                                 r"\(256 images, 5 random t each\); to sample: python sample\.py")
        self.draw("-n 6 --out x.pt --steps 10 --strip strip.png")
        self.assertEqual(decode_png("strip.png").shape, (1, 8 * 30 + 2, 11 * 30 + 2))
        printed = self.draw("-n 6 --out x.PT --strip strip.png")
        self.assertRegex(printed, "^wrote x.PT, strip.png, from .*checkpoint.pt, step 20 of 20$")
        state, ddpm = sample.read_checkpoint(self.checkpoint)
        ddpm.load_state_dict(state["ema"])
        torch.manual_seed(0)
        chains = [[x_T, *(x_t for _, x_t in ddpm.reverse_chain(x_T))]
                  for x_T in torch.randn(6, 1, 28, 28).split(5)]
        drawn = torch.cat([chain[-1] for chain in chains])
        self.assertSame(sample.load("x.PT"), sample.to_uint8(drawn))
        # Of each of the first 4 a row of x_t, t = 20, 18, …, 0, and one of x̂_θ(x_t).
        x_t = torch.stack(chains[0], dim=1)[:4]
        hats = [ddpm.predict_x0(x_t[:, i], 20 - i) for i in range(20)] + [x_t[:, 20]]
        pairs = torch.stack([x_t, torch.stack(hats, dim=1)], dim=1)[:, :, ::2]
        self.assertPicture("strip.png", pairs.flatten(0, 2), columns=11)
        # The run's own pictures are without dropout, too.
        torch.manual_seed(0)
        drawn = torch.cat([ddpm.sample(x, 20) for x in torch.randn(64, 1, 28, 28).split(16)])
        self.assertPicture(self.out / "samples_000020.png", drawn)

    def test_a_seed_repeats_the_images_in_any_form(self):
        self.train("ddpm", "--steps 20 --lr 0.01")
        images = {}
        for text in ("", "--seed 1", "--steps 5", "--eta 0", "--precision bf16"):
            self.draw(f"-n 6 --out x.pt {text}")
            images[text] = sample.load("x.pt")
            self.assertEqual(bool((images[text] == images[""]).all()), text == "", text)
        self.draw("-n 6 --out x.png")
        self.assertSame(decode_png("x.png"), sample.grid(images[""]))
        self.assertMistake("only 20", self.draw, "--steps 21")
        self.assertMistake("a ddpm", self.draw, "--latent-grid x.png")

    def test_a_subclass_is_what_is_drawn_and_measured(self):
        class Grey(DDPM):
            def predict_x0(self, x_t, t):
                return torch.zeros_like(x_t)

        def build(config):
            return Grey(small_unet(), cauchy_alphas(20))

        with patch(train, "build_model", build), patch(sample, "build_model", build):
            output = self.train("ddpm", "--steps 2")
            self.draw("-n 2 --out x.pt")
        bits = build({}).bits_per_dim(sample.to_float(train.load_images(self.data)[1], CPU)).mean()
        self.assertClose(float(re.search(r"([\d.]+) ± ", output)[1]), bits, rtol=0.05)
        self.assertTrue((sample.load("x.pt") == 128).all())
        self.assertEqual(decode_png(self.out / "samples_000002.png").unique().tolist(), [0, 128])

    def test_the_pictures_of_a_ddpm(self):
        # From fixed noise, which they show here: 16 at a time, by at most 50 steps of DDIM.
        config = {**train.configure({"model": "ddpm", "seed": 3, "batch_size": 16}, None, "cpu"),
                  "image_shape": [1, 8, 8]}
        for T, steps in ((20, 20), (60, 50)):
            with patch(DDPM, "sample", side_effect=lambda x_T, steps: x_T) as draws:
                ddpm = DDPM(None, cosine_alphas(T))
                train.write_pictures(self.folder, 48, ddpm, torch.zeros(0), config)
            self.assertEqual([(len(x), n) for (x, n), _ in draws.call_args_list], [(16, steps)] * 4)
        torch.manual_seed(3)
        self.assertPicture("samples_000048.png", torch.randn(64, 1, 8, 8))

    def test_the_pictures_of_a_vae_and_the_latent_grid(self):
        # A run's are in its precision, from noise of its seed; the rest is in float32, from 0's.
        self.train("vae", "--epochs 1 --latent-dim 2 --seed 3 --precision bf16")
        vae, (_, test) = sample.read_checkpoint(self.checkpoint)[1], train.load_images(self.data)
        x = sample.to_float(test[[i * 59 // 31 for i in range(32)]], CPU)  # evenly spread
        torch.manual_seed(3)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            samples = torch.cat([vae.sample(z) for z in torch.randn(64, 2).split(16)])
            pairs = torch.stack([x, vae.decode(vae.encode(x)[0])], dim=1)
        self.assertPicture(self.out / "samples_000016.png", samples)
        self.assertPicture(self.out / "reconstructions_000016.png", pairs.flatten(0, 1))
        with patch(sample, "BATCH", 32):
            self.draw("-n 65 --latent-grid grid.png")
        torch.manual_seed(0)
        self.assertPicture(self.out / "samples.png", vae.sample(torch.randn(65, 2)))
        z = Normal(0.0, 1.0).icdf((torch.arange(11) + 0.5) / 11).tolist()
        z = [[z_1, z_2] for z_2 in reversed(z) for z_1 in z]  # z_2 upwards, z_1 to the right
        self.assertPicture("grid.png", vae.sample(torch.tensor(z)))

    @mock.patch.dict(train.EVALUATION, vae=(100, {}))
    def test_the_last_line(self):
        # Means over evenly spread test and training images, in float32, ± their standard error.
        output = self.train("vae", "--steps 20 --seed 3 --precision bf16")
        vae, data = sample.read_checkpoint(self.checkpoint)[1], train.load_images(self.data)
        elbo = []
        for images in data:
            n = min(100, len(images))
            spread = [images[round(i * (len(images) - 1) / (n - 1) - 0.5 + 1e-9)] for i in range(n)]
            batches = sample.to_float(torch.stack(spread), CPU).split(16)
            torch.manual_seed(3)
            bits = torch.cat([vae.bits_per_dim(x) for x in batches])
            kl = torch.cat([vae.elbo(x)["kl"] for x in batches]).mean()
            nats, error = -bits.mean() * 784 * math.log(2), bits.std(correction=0) / n**0.5
            elbo.append(f"{nats:.1f} nats, {bits.mean():.3f} ± {error:.3f} bits/dim, of which KL "
                        f"{kl:.1f} nats ({n} images)")
        line = f"step 20: test ELBO {elbo[1]}; training ELBO {elbo[0]}"
        self.assertIn(f"\n{line}; to sample: python sample.py", output)
        # A finished run that is resumed computes it again, and the file has one line.
        self.assertIn(line, self.train("vae", "--resume --precision bf16 --steps 20"))
        self.assertEqual((self.out / "result.txt").read_text(encoding="utf-8"), f"{line}\n")

    def test_colour(self):
        # Bright enough for no warning; in files whose suffix is in any case.
        torch.save(torch.randint(0, 129, (66, 3, 12, 16), dtype=torch.uint8), "x.Pt")
        for model, shape, text in (("ddpm", (2, 3, 12, 16), "--predict image"),
                                   ("vae", (2, 4), "--decoder-std learned")):
            self.out = Path(model)
            self.train(model, f"--epochs 1 {text}", data="x.Pt")
            self.assertNotIn("warning", self.errors)
            self.draw("-n 2 --out y.PnG")
            trained = sample.read_checkpoint(self.checkpoint)[1]
            torch.manual_seed(0)
            x = trained.sample(torch.randn(shape))
            self.assertPicture("y.PnG", x)
            self.assertFalse((x[:, 0] == x[:, 1]).all())

    def test_from_any_folder_with_the_mnist_beside_the_file_and_the_newest_run(self):
        # Also where the terminal lacks the letters of a name.
        env, self.out = {**os.environ, "PYTHONIOENCODING": "ascii"}, Path("runs", "модель", "a")
        options = "--model vae --steps 1 --device cpu".split()
        output = self.finish(self.start("train.py", [*options, "--out", self.out], env=env))
        self.assertRegex(output, r"vae: 853,748 parameters, 60,000 images of 1x28x28, on cpu\n"
                                 r"computing the test ELBO ...\n"
                                 r"step 1: .*'runs/\?{6}/a/checkpoint.pt'")
        self.assertIsNone(sample.load(self.checkpoint)["config"]["data"])
        self.call(train.main, [*options, "--data", self.data])
        os.utime(Path("runs", "vae", "checkpoint.pt"), (0, 0))
        output = self.finish(self.start("sample.py", ["--device", "cpu"], env=env))
        self.assertRegex(output, r"wrote .*a.samples.png, from runs.\?{6}.a.checkpoint.pt")
        self.assertTrue((self.out / "samples.png").exists())


class TestReadme(FileTest):
    def setUp(self):
        super().setUp()
        self.text = (HERE / "README.md").read_text(encoding="utf-8").replace("\u00a0", " ")

    def test_every_link_leads_to_its_name(self):
        modules = {"vae.py": section_1, "ddpm.py": section_2, "unet.py": network}
        links = re.findall(r"\[(`?)([^]`]+)`?\]\((\w+\.py)#L(\d+)\)", self.text)
        for code, name, file, line in links:
            if code:
                value = functools.reduce(getattr, name.split("."), modules[file])
                source = inspect.unwrap(getattr(value, "fget", value))
                self.assertEqual(inspect.getsourcelines(source)[1], int(line), name)
            else:  # the label of a row
                text = (HERE / file).read_text(encoding="utf-8").splitlines()[int(line) - 1]
                self.assertRegex(text, rf'yield .*"{re.escape(name)}  ')
        what = [what for section in (section_1, section_2) for what, *_ in rows(section)]
        labels = {text.split("  ")[0] for text in what} - {""}
        self.assertEqual({name for code, name, *_ in links if not code}, labels)
        named = re.findall(r"\| ((?:Ex\.|Thm|Training|\(\d)[^|\n]*) \|$", self.text, re.M)
        self.assertLessEqual(set(", ".join(named).split(", ")), labels)
        headings = {re.sub("[^a-z0-9 -]", "", title.lower()).replace(" ", "-")
                    for title in re.findall("^#+ (.*)$", self.text, re.M)}
        paths = re.findall(r"(?:\]\(|src=.)(#?[-\w/.]+)[)\"]", self.text)
        for path in paths:
            self.assertTrue(path[1:] in headings or (HERE / path).exists(), path)

    def test_every_equation_can_be_found(self):
        text = self.text + inspect.getsource(section_1) + inspect.getsource(section_2)
        for section, ranges in ((1, "1-4 6 10 12-20 22-26 29-35"),  # but for steps of proofs
                                (2, "1-17 20-21 23-26 31-32 34-38 41-44 47-60")):
            for first, last in (map(int, (x.split("-") * 2)[:2]) for x in ranges.split()):
                for number in range(first, last + 1):
                    self.assertIn(f"({section}.{number})", text)

    def test_every_command_parses_and_the_parameters_of_every_run(self):
        commands = re.findall(r"(?:python|torchrun) [^`#\n]*?(\w+)\.py([^`#&…\n]*)", self.text)
        self.assertGreater(len(commands), 12)
        for script, options in commands:
            self.assertTrue((HERE / f"{script}.py").exists(), script)
            if script == "sample":
                sample.parse_args(options.split())
            elif "--model" in options:
                train.parse_args(options.split())
        results = re.findall(r"^\| `(\w+)`(.*?)\| (.*?) \| ([\d,]+) \|", self.text, re.M)
        self.assertEqual([name for name, *_ in results],
                         ["plain", "cauchy", "ddpm", "x0", "ddpm", "vae", "learned"])
        for name, where, options, count in results:
            model = "vae" if name in ("vae", "learned") else "ddpm"
            given = re.sub("`|–.*", "", options).split()
            config = train.configure(train.parse_args(["--model", model, *given])[1], None,
                                     "cuda" if "CUDA" in where else "cpu")
            self.assertEqual(config.get("predict") == "image", name == "x0")
            model = sample.build_model({**config, "image_shape": [1, 28, 28]})
            self.assertEqual(f"{sum(p.numel() for p in model.parameters()):,}", count, name)
        on_cuda, = re.findall(r"for a large card: `([^`]*)`", self.text)
        given = train.parse_args(["--model", "ddpm", *on_cuda.split()])[1]
        self.assertEqual(train.configure(given, None, "cpu"),
                         train.configure({"model": "ddpm"}, None, "cuda"))
        cifar = UNet(3, 3, 128, (1, 2, 2, 2), blocks=2, attention=(1,))
        self.assertIn(f"{sum(p.numel() for p in cifar.parameters()):,}", UNet.__doc__)

    def test_numbers_are_those_of_the_code_and_of_each_other(self):
        text, (_, args) = " ".join(self.text.split()), sample.parse_args([])
        self.assertEqual(vars(args), {**dict.fromkeys(vars(args)), "n": 64, "seed": 0,
                                      "device": "auto", "precision": "auto"})
        images, options = train.EVALUATION["ddpm"]
        nats = {name: (float(a.replace(",", "")), float(b)) for name, a, b in re.findall(
            r"^\| `(\w+)` \|.* −([\d,]+) nats \| ([\d.]+)", self.text, re.M)}
        bits = {name: b for name, (_, b) in nats.items()}
        for pattern, *values in (
                (r"a row every (\d+) steps", train.ROW_EVERY),
                (r"at most (\d+) times", train.MAX_PICTURES), (r"every (\d+)nd image", 32),
                (r"(\d+) samples from fixed noise", 64), (r"DDPM: (\d+) steps of DDIM", 50),
                (r"([\d,]+) test images spread evenly over all, (\d+) random t", f"{images:,}",
                 options["k"]),
                (r"VAE: all ([\d,]*\d)", f"{train.EVALUATION['vae'][0]:,}"),
                (r"at most (\w+) minutes", {300: "five"}[train.SAVE_EVERY]),
                (r"H and W divisible by (\d+)", UNet().stride), (r"exit status (\d+)", 2),
                (r"for longer: --steps (\d+)", 2 * train.RECIPES["ddpm"]["steps"]),
                (r"diffusers counts t from 0: (\w+) 1", "subtract"),
                (r"schedule saves ([\d.]+) bits/dim, the Fourier features ([\d.]+)\.",
                 f"{bits['plain'] - bits['cauchy']:.2f}", f"{bits['cauchy'] - bits['ddpm']:.2f}"),
                (r"Only (`--\w+`).*?, (`--\w+`), (`--\w+`), (`--\w+`) and (`--\w+`) may change",
                 *(f"`--{name}`" for name in train.CHANGEABLE))):
            self.assertRegex(text, pattern)
            for match in re.finditer(pattern, text):
                self.assertEqual(match.groups(), tuple(map(str, values)))
        self.assertEqual(len(nats), 6)
        unit = 784 * math.log(2)  # nats in a bit for every pixel
        for name, (a, b) in nats.items():  # both are rounded
            self.assertClose(a, b * unit, rtol=0, atol=0.5 + 0.5e-3 * unit)

    def test_every_block_of_python_runs(self):
        # In a folder with what the blocks read, with few steps, and with a stand-in for Pillow.
        os.mkdir("cifar-10-batches-bin")
        record = bytes([7, *range(256)] + [9] * 2816)  # a label, then the red pixels, and so on
        Path("cifar-10-batches-bin", "data_batch_1.bin").write_bytes(record * 5)
        for path in ("photos/a.jpg", "photos/.hidden/a.jpg", "photos/@eaDir/a.jpg", "photos/b.txt"):
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).touch()
        pixels = torch.arange(32 * 32 * 3).remainder(251).byte()
        image = mock.Mock(mode="RGB", size=(32, 32), tobytes=lambda: bytes(pixels.tolist()))
        image.convert.return_value = image
        pillow = mock.Mock()
        pillow.Image.open.side_effect = lambda path: image if path.suffix == ".jpg" else 1 / 0
        pillow.ImageOps.exif_transpose.side_effect = lambda image: image
        pillow.Image.alpha_composite.return_value = pillow.ImageOps.fit.return_value = image
        blocks = re.findall("^```python\n(.*?)^```$", self.text, re.M | re.S)
        self.assertEqual(len(blocks), 6)
        names = {"__name__": "README"}
        sys.modules["PIL"] = pillow
        self.addCleanup(sys.modules.pop, "PIL")
        with redirect_stdout(io.StringIO()) as printed:
            for block in blocks:
                block = re.sub(r"(range\(|total_steps=|, steps=)(1000|50)", r"\g<1>4", block)
                block = block.replace('"data/mnist"', repr(str(HERE / "data" / "mnist")))
                exec(compile(block, "README.md", "exec"), names)
        numbers = [float(x) for x in re.findall(r"\d\.\d+", printed.getvalue())]
        self.assertClose(numbers[3:6], numbers[:3], rtol=0.1)  # what is learned, what is exact
        figure = "figure_2_7.png"
        differ = decode_png(figure) != decode_png(HERE / "assets" / figure)
        self.assertLess(differ.float().mean(), 0.05)  # other torch, other random x
        self.assertEqual(decode_png("digits.png").shape, (1, 8 * 30 + 2, 8 * 30 + 2))
        photos, cifar = (sample.load(Path(name)) for name in ("photos.pt", "cifar10.pt"))
        self.assertSame(photos[0].permute(1, 2, 0).flatten(), pixels)
        self.assertEqual((len(photos), "1 images in" in printed.getvalue()), (1, True))
        self.assertEqual((cifar.shape, cifar[0, 0].flatten().tolist()[:256]),
                         ((5, 3, 32, 32), [*range(256)]))
        # The flips keep each image and its mirror on one side of the split.
        flips, = re.findall(r"`(x = x\[.*?flip\(-1\)\]\))`", self.text)
        names["x"] = torch.arange(100 * 4).view(100, 1, 1, 4)
        exec(flips, names)
        held_out = names["x"][torch.arange(len(names["x"])) % 32 == 0]
        self.assertSame(held_out[3:], held_out[:3].flip(-1))

    def test_its_excerpts_are_lines_of_the_code_and_its_rows_are_computed(self):
        code = [line.strip() for line in inspect.getsource(section_2).splitlines()]
        block, = re.findall("^```py\n(.*?)^```$", self.text, re.M | re.S)
        for part in block.split("\n\n"):
            lines = [line.strip() for line in part.splitlines()]
            self.assertIn(lines, [code[i:i + len(lines)] for i in range(len(code))])
        with patch(section_2, "EXAMPLES", [lambda: rows(section_2)]), \
                redirect_stdout(io.StringIO()) as output:
            section_2.main()
        shown = re.findall(r"^ +-?\d+\.\d{5} .*$", self.text, re.M)
        self.assertGreater(len(shown), 2)
        self.assertLessEqual({*shown}, {*output.getvalue().splitlines()})

    def test_the_weights_in_assets_are_those_of_the_headline(self):
        state, model = sample.read_checkpoint(HERE / "assets" / "ddpm.pt")
        config = train.configure({"model": "ddpm"}, None, "cpu")
        self.assertEqual(state["config"], {**state["config"], **config})  # the default run's
        result = train.evaluate(model, MNIST[0][:1], MNIST[1], 6800, state["config"], CPU)
        computed = re.match(r"step 6,800: test ELBO \S+ nats, (\S+) ± (\S+) .*1,024", result)
        printed = re.search(r"\(the default\) .* nats \| ([\d.]+) ± ([\d.]+) \|", self.text)
        self.assertClose([*map(float, computed.groups())], [*map(float, printed.groups())], rtol=0,
                         atol=0.0015)


def train_by_hand(config, images):
    """A run of one process: the weights at the start and at the end, their moving average, and of
    every step the loss, the norm of the gradient and the learning rate."""
    seed, steps, B = config["seed"], config["steps"], config["batch_size"]
    torch.manual_seed(seed)
    model, log, flat = sample.build_model(config), [], nn.utils.parameters_to_vector
    weights = list(model.parameters())
    start = flat(weights).detach()
    ema, adam = start.clone(), torch.optim.Adam(weights, betas=(0.9, 0.99), fused=True)
    for step in range(steps):
        # A step's random numbers are a function of the seed, the epoch and its place.
        epoch, i = divmod(step, len(images) // B)
        order = torch.Generator().manual_seed(hash((seed, epoch)))
        batch = torch.randperm(len(images), generator=order).split(B)[i]
        torch.manual_seed(hash((seed, epoch, i)))
        with torch.autocast("cpu", torch.bfloat16, enabled=config["precision"] == "bf16"):
            loss = model.loss(images[batch] / 127.5 - 1)
        adam.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(weights, 1.0)
        warm_up, cosine = min(1, (step + 1) / (0.05 * steps)), math.cos(math.pi * step / steps)
        adam.param_groups[0]["lr"] = lr = config["lr"] * warm_up * (1 + cosine) / 2
        adam.step()
        ema.lerp_(flat(weights).detach(), 10 / (step + 11))
        log.append([loss.item(), norm.item(), lr])
    return start, flat(weights).detach(), ema, torch.tensor(log, dtype=torch.float64).T


class TestTraining(CommandTest):
    def test_a_run_by_hand(self):
        images, _ = train.load_images(self.data)
        for seed, (model, text) in enumerate((("ddpm", "--dropout 0.1"),
                                              ("ddpm", "--precision bf16"), ("vae", ""))):
            self.out = self.folder / f"{seed}"
            with mock.patch.dict(train.EVALUATION, ddpm=(1, {"k": 1})):
                self.train(model, f"--steps 25 --lr 0.02 --seed {seed} {text}")
            state = sample.load(self.checkpoint)
            start, *ends, (losses, norms, lrs) = train_by_hand(state["config"], images)
            self.assertTrue(norms.min() < 1 < norms.max())  # some are clipped
            for name, expected in zip(("model", "ema"), ends):
                actual = torch.cat([w.flatten() for w in state[name].values()])
                self.assertLess((actual - expected).norm(), 1e-3 * (expected - start).norm())
            *columns, loss, lr = self.metrics("step", "epoch", "loss", "lr")
            self.assertEqual(columns, [["10", "20", "25"], ["0.6250", "1.2500", "1.5625"]])
            means = [part.mean() for part in losses.split(10)]
            self.assertClose([*map(float, loss)], means, rtol=1e-3)
            self.assertClose([*map(float, lr)], lrs[[9, 19, 24]])

    def test_defaults(self):
        # (The README's table and its CUDA options say what they are.)
        for model, device in (("ddpm", "cpu"), ("ddpm", "mps"), ("ddpm", "cuda"), ("vae", "cuda")):
            new = train.configure({"model": model}, None, device)
            self.assertEqual(new["channels"], 64 if (model, device) == ("ddpm", "cuda") else 16)
            given = {"model": model, "lr": 0.5, "epochs": 3}
            self.assertEqual(train.configure(given, None, device), {**new, **given, "steps": None})
            for other in ("cpu", "cuda"):  # a run is resumed as it began
                self.assertEqual(train.configure({"model": model}, new, other), new)
            for name in new.keys() - {"model", *train.CHANGEABLE}:
                given = {"model": model, name: "other"}
                self.assertRefuses("began with", train.configure, given, new, device)
        self.assertEqual(train.ema_decay(10**6), 0.9999)
        text = " ".join(self.call(train.main, ["--help"]).split())
        for words in ("all devices (default: 40 for ddpm, 256 for ddpm on CUDA, 128 for vae)",
                      "random seed (default: 0)", "(default: none for ddpm)",
                      "(default: 8 for vae)", "(default: 1 1 4 for ddpm, 1 2 4 for ddpm on CUDA)"):
            self.assertIn(words, text)

    def test_pictures_at_most_20_times_and_outside_the_main_thread(self):
        # Where no signal can be caught. After each epoch of 20, and every other one of 21.
        for steps, expected in ((39, [*range(2, 39, 2), 39]), (42, [*range(4, 42, 4), 42])):
            text, out = f"--batch-size 128 --steps {steps}", self.folder / f"{steps}"
            with patch(train, "write_pictures") as pictures, ThreadPoolExecutor() as pool:
                pool.submit(self.train, "vae", text, out=out).result()
            self.assertEqual([call.args[1] for call in pictures.call_args_list], expected)


class TestPromises(CommandTest):
    # 1. A mistake costs one line and status 2, and no file changes.
    def test_mistakes_in_a_new_run(self):
        for expected, text in (
                ("--model", ""), ("--timesteps is not an option", "--model vae --timesteps 10"),
                ("--lr", "--model vae --lr nan"), ("No such file", "--model vae --resume"),
                ("--device gpu", "--model vae --device gpu"),
                ("--device meta", "--model vae --device meta"),
                ("must be", "--model vae --latent-dim 9999999999"),
                ("allocate", "--model vae --latent-dim 2000000000"),
                ("--batch-size 1000", "--model vae --batch-size 1000"),
                ("--epochs.*not allowed with", "--model vae --steps 1 --epochs 1"),
                ("channels", "--model ddpm --channels 6"),
                ("multiplier must", "--model ddpm --multipliers"),
                ("H and W must be .* by 8, got 28", "--model ddpm --multipliers 1 1 1 1")):
            options = ["--data", self.data, "--out", self.out, *text.split()]
            self.assertMistake(expected, self.call, train.main, options)
        self.assertMistake("must name", self.call, train.main, ["--model", "vae", "--out", ""])
        with patch(train, "RANKS", 3):
            self.assertMistake("16: .* divisible by 3", self.train, "vae")
        self.assertFalse(self.out.exists())

    def test_mistakes_with_a_run(self):
        self.train("vae", "--steps 2")
        before = {path: path.read_bytes() for path in self.out.iterdir()}
        for expected, model, text in (
                ("--resume.*--out", "vae", ""), ("0.5.*began with", "vae", "--resume --lr 0.5"),
                ("1 steps: .* has already taken 2", "vae", "--resume --steps 1"),
                ("--model ddpm.*began with", "ddpm", "--resume --timesteps 9")):
            self.assertMistake(expected, self.train, model, text)
        under_a_file = self.checkpoint / "run"
        self.assertMistake("Not a directory|File exists", self.train, "vae", out=under_a_file)
        sample.save(Path("a.pt"), sample.load(self.checkpoint))
        torch.save({**sample.load("a.pt"), "ema": {}}, "b.pt")  # torch says more than one line
        os.mkdir("folder.png")
        for expected, text in (
                ("a vae", "--eta 0.5"), ("a vae", "--strip x.png"), ("a vae", "--steps 5"),
                ("from 1", "-n 0"), ("overwrite", "--out folder.png"),
                ("z has 4 dim.*", "--latent-grid x.png"), ("must end in", "--out x.jpg"),
                ("must end in", "--strip x.pt"), ("an existing folder", "--out nowhere/x.png"),
                ("--device cuda:99: [^.]*$", "--device cuda:99"),
                ("file of its own", "--out x.png --latent-grid ./x.png"),
                ("overwrite", "--out checkpoint.pt"),  # of any run
                ("overwrite", "--out ./a.pt --checkpoint a.pt"),
                ("No such file", "--checkpoint nowhere.pt"), ("directory", "--checkpoint run"),
                ("metrics.csv: ", "--checkpoint run/metrics.csv"),
                ("b.pt: .*encoder.0.bias", "--checkpoint b.pt")):
            self.assertMistake(expected, self.draw, text)
        self.assertMistake("under runs/: train first", self.call, sample.main, [])
        self.assertEqual(before, {path: path.read_bytes() for path in self.out.iterdir()})

    def test_mistakes_with_data(self):
        def grey(*shape, value=9):
            return idx(torch.full(shape, value, dtype=torch.uint8))

        good, small, dark = grey(40, 28, 28), grey(40, 7, 7), grey(40, 28, 28, value=1)
        for expected, *files in (
                ("train-images.* not found", None, good), ("t10k-images.* not found", good, None),
                ("an IDX file of grey", grey(40, 784), good), ("at most 3", grey(3, 28, 28), good),
                ("an IDX file of grey", good[:-1], good), ("an IDX file of grey", b"", good),
                ("an IDX file of grey", b"\0\0\x0d" + good[3:], good),
                ("an IDX file of grey", b"text, and more of it", good),
                ("0 to 255", dark, good), ("at least 8", small, small), ("test im", good, small),
                ("damaged", gzip.compress(good)[:-20], good),
                ("damaged", gzip.compress(good, 0).replace(b"\x09" * 9, b"\x08" * 9, 1), good),
                ("damaged", gzip.compress(good)[:12] + b"\xff" * 9, good)):
            for split, content in zip(("train", "t10k"), files):
                path = self.data / f"{split}-images-idx3-ubyte"
                path.unlink() if content is None else path.write_bytes(content)
            self.assertMistake(expected, self.train, "vae")
        images = torch.full((40, 1, 28, 28), 9).byte()
        for expected, value in (
                (r"got torch.uint8 \(40, 28, 28\)", images[:, 0]), ("dict", {"images": images}),
                ("torch.float32", images.float()), ("C = 1 or 3", images.expand(-1, 2, -1, -1)),
                ("at least 2", images[:1]), ("at most 1 .training images", images[:2]),
                ("x.pt: .*Path", Path("x")), ("Sparse", images.to_sparse())):
            torch.save(value, "x.pt")
            self.assertMistake(expected, self.train, "vae", data="x.pt")
        for expected, data in (("train-images.*Your own images", "no"), ("No such file", "no.pt"),
                               ("train-images.* not found", "")):  # which is not the default
            self.assertMistake(expected, self.train, "vae", data=data)
        self.assertFalse(self.out.exists())

    def test_out_of_memory_and_ctrl_c_outside_a_run(self):
        for error in (torch.OutOfMemoryError, RuntimeError("can't allocate memory: you tried"),
                      MemoryError("no room")):
            with patch(train, "batches", side_effect=error):
                self.assertMistake("smaller --batch-size", self.train, "vae", out=str(error))
        with patch(sample, "draw", side_effect=torch.OutOfMemoryError):
            self.out = self.folder / "can't allocate memory: you tried"
            self.assertMistake("smaller -n", self.draw)
        stop = mock.Mock(side_effect=KeyboardInterrupt)
        with mock.patch.multiple(sys, stdout=io.StringIO(), stderr=io.StringIO()):
            self.assertRaisesRegex(SystemExit, "130", sample.run, stop)

    # 2. A run is never overwritten, at most five minutes are lost, and little ends it.
    def test_a_start_that_failed_can_be_made_again(self):
        with mock.patch("os.fsync", side_effect=OSError("the disk is full")):
            self.assertMistake("the disk is full", self.train, "vae", "--steps 1")
        both = [self.start("train.py", self.options("vae", "--steps 1")) for _ in range(2)]
        ends = [(*process.communicate(timeout=60), process.returncode) for process in both]
        (_, _, status), (_, refusal, refused) = sorted(ends, key=lambda end: end[2])
        self.assertEqual((status, refused, sample.load(self.checkpoint)["step"]), (0, 2, 1))
        self.assertRegex(refusal, r"train.py: error: .*(File exists|already holds a run)")

    def test_what_is_no_run_to_resume_is_one_to_keep(self):
        self.train("vae", "--steps 1")
        self.checkpoint.write_bytes((HERE / "assets" / "ddpm.pt").read_bytes())
        self.assertMistake("only weights", self.train, "vae", "--resume")
        self.checkpoint.unlink()
        self.assertMistake("holds a run", self.train, "vae")  # of which there are rows

    def test_a_run_is_resumed_from_its_first_step_and_on_its_device(self):
        with patch(train, "batches", side_effect=torch.OutOfMemoryError):
            self.assertMistake("smaller", self.train, "ddpm", "--steps 12 --dropout 0.1")
        self.assertEqual(sample.load(self.checkpoint)["step"], 0)
        printed = self.draw("-n 1")
        self.assertIn("step 0 of 12 (warning: hardly trained)", printed)
        with patch(train, "pick_device", wraps=train.pick_device) as device, \
                patch(train, "signal_of_any_rank", side_effect=[0, 0, signal.SIGTERM]):
            options = ["--model", "ddpm", "--out", self.out, "--resume"]
            printed = self.call(train.main, options, 128 + signal.SIGTERM)
        self.assertEqual(device.call_args.args, ("cpu",))  # not the default, "auto"
        self.assertIn("train.py --model ddpm --out", printed)
        self.train("ddpm", "--steps 12 --dropout 0.1 --resume")
        self.train("ddpm", "--steps 12 --dropout 0.1", out=self.folder / "straight")
        self.assertSameEnd(self.folder / "straight", self.out)

    def test_a_folder_that_moves_and_a_second_writer(self):
        def signals(do):
            def at_step_5(signals, calls=itertools.count(1)):
                return do() if next(calls) == 5 else 0
            return patch(train, "signal_of_any_rank", at_step_5)

        def move():
            self.out.rename(self.folder / "moved")
            return signal.SIGTERM

        def replace():
            sample.save(self.checkpoint, {"seconds": 7.0})

        with signals(move):
            self.train("vae", "--steps 9", status=128 + signal.SIGTERM)
        self.assertEqual(sample.load(self.checkpoint)["step"], 5)
        with signals(lambda: self.checkpoint.write_bytes(b"") or signal.SIGTERM):  # damaged
            self.train("vae", "--steps 20 --resume", status=128 + signal.SIGTERM)
        self.assertEqual(sample.load(self.checkpoint)["step"], 10)
        with signals(lambda: replace() or 0):
            self.assertMistake("run/checkpoint.pt: another process", self.train, "vae",
                               "--steps 20 --resume")
        self.assertEqual(sample.load(self.checkpoint), {"seconds": 7.0})

    def test_a_checkpoint_every_five_minutes(self):
        # By a clock on which 40 s pass between one look and the next.
        clock, saved = itertools.count(0, 40), []
        with patch(train.time, "perf_counter", lambda: next(clock)), \
                patch(train, "save", lambda path, state, replace: saved.append(state["seconds"])):
            self.train("vae", "--batch-size 4 --epochs 1")
        self.assertLess(max(b - a for a, b in zip(saved, saved[1:])), 300 + 5 * 40)
        self.assertIn(len(saved), range(6, 12))
        (*_, speed), (*_, seconds) = self.metrics("images_per_second", "seconds")
        self.assertEqual(speed, f"{256 / float(seconds):.1f}")

    @unittest.skipIf(os.name == "nt", "Windows has no such signal")
    def test_signals_that_come_again(self):
        # A machine repeats its own, even after the last save; under nohup SIGHUP is ignored. A
        # person's second Ctrl-C quits, and after the run Ctrl-C is what it was before.
        for ask, handler, count in ((signal.SIGTERM, signal.SIG_DFL, 3),
                                    (signal.SIGHUP, signal.SIG_DFL, 3),
                                    (signal.SIGHUP, signal.SIG_IGN, 0)):
            self.addCleanup(signal.signal, ask, signal.signal(ask, handler))
            with train.caught_signals() as signals:
                signal.raise_signal(ask)
                signal.raise_signal(ask)
            signal.raise_signal(ask)
            self.assertEqual(signals, [ask] * count)
        before = signal.getsignal(signal.SIGINT)
        with train.caught_signals() as signals:
            signal.raise_signal(signal.SIGINT)
            self.assertEqual(signal.getsignal(signal.SIGINT), signal.SIG_DFL)
        self.assertEqual((signals, signal.getsignal(signal.SIGINT)), ([signal.SIGINT], before))

    @unittest.skipIf(os.name == "nt", "its shell closes nothing")
    def test_nobody_watches(self):
        # From the first line on: into a pipe that nobody reads, or into what is closed.
        reader, writer = os.pipe()
        process = self.start("train.py", self.options("vae", "--steps 30"), stdout=writer,
                             stderr=writer)
        os.close(reader)
        os.close(writer)
        self.assertEqual(process.wait(timeout=60), 0)
        self.assertTrue((self.out / "result.txt").exists())
        new = self.options("vae", "--steps 1", out="new")
        for closed, file, script, options in (
                ("2>&-", "result.txt", "train.py", new),
                (">&- 2>&-", "samples.png", "sample.py", ["--checkpoint", "new/checkpoint.pt"])):
            command = shlex.join(map(str, [sys.executable, HERE / script, *options]))
            subprocess.run(f"{command} {closed}", shell=True, check=True, stdout=subprocess.DEVNULL)
            self.assertGreater(Path("new", file).stat().st_size, 50)

    def test_what_can_not_be_written_costs_a_line(self):
        # Two rows and their head, one picture and the result; and the data are dark.
        torch.save(torch.arange(112, 128).byte().expand(99, 1, 16, 16), "dark.pt")
        self.train("vae", "--steps 1", data="dark.pt")
        files = "metrics.csv", "samples_000020.png", "result.txt"
        for name in files:
            (self.out / name).unlink(missing_ok=True)
            (self.out / name).mkdir()
        self.train("vae", "--steps 20 --resume", data="dark.pt")
        first, *warnings = re.findall("^.*warning: (.*)$", self.errors, re.M)
        self.assertIn("the brightest pixel is 127 of 255", first)
        self.assertEqual([sum(name in line for line in warnings) for name in files], [3, 1, 1])
        self.assertEqual(sample.load(self.checkpoint)["step"], 20)

    # 3. A resumed run ends with the weights of an uninterrupted one.
    @unittest.skipIf(os.name == "nt", "Windows has other signals")
    def test_interrupted_and_resumed_equals_uninterrupted(self):
        self.addCleanup(signal.signal, signal.SIGHUP, signal.signal(signal.SIGHUP, signal.SIG_DFL))
        straight, columns = self.folder / "straight", ("step", "epoch", "lr", "loss")
        self.train("vae", "--steps 240", out=straight)
        for ask in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL):
            self.out = self.folder / f"stopped by ${ask}"
            options = self.options("vae", "--steps 240")
            process, until = self.start("train.py", options), time.monotonic() + 60
            while not (self.out / "metrics.csv").exists() or len(self.metrics("step")[0]) < 3:
                self.assertLess(time.monotonic(), until)
                time.sleep(0.01)
            for _ in range(1 if ask == signal.SIGINT else 2):  # a machine repeats its own
                process.send_signal(ask)
            output = self.finish(process, -9 if ask == signal.SIGKILL else 128 + ask)
            step, resume = sample.load(self.checkpoint)["step"], [*options, "--resume"]
            if ask == signal.SIGKILL:
                self.assertEqual(step % 16, 0)  # the last whole epoch
            else:
                self.assertIn(f"stopped at step {step} of 240", output)
                self.assertIn(f"--out {shlex.quote(str(self.out))} --resume", output)
                resume = shlex.split(output.split("train.py ")[1])
            self.finish(self.start("train.py", resume))
            self.assertSameEnd(straight, self.out)
            both = (zip(*self.metrics(*columns, out=out)) for out in (straight, self.out))
            for row, expected in zip(*both, strict=True):
                mixed = row[0] == f"{step // 10 * 10 + 10}"  # a mean loss from before and after
                self.assertEqual(row[:4 - mixed], expected[:4 - mixed])

    def test_what_may_change(self):
        self.train("vae", "--steps 16")
        with open(self.out / "metrics.csv", "ab") as file:
            file.write(b"17,of a step to be taken again\n\xff\xfe\n16,half a")
        moved = self.data.rename(self.folder / "moved")
        self.assertMistake("not found", self.train, "vae", "--resume --steps 17")
        # A finished run that is resumed: the learning rate rises again, and a line says so.
        output = self.train("vae", "--resume --steps 17", data=moved)
        self.assertRegex(output, r"resuming at step 16 of 17, learning rate 3\.\de-05")
        steps, seconds = self.metrics("step", "seconds")
        self.assertEqual(steps, ["10", "16", "17"])
        self.assertEqual(seconds, sorted(seconds, key=float))  # the clock goes on, too
        torch.save(torch.full((257, 1, 28, 28), 9, dtype=torch.uint8), "other.pt")
        self.assertMistake("248 images .* began with 256", self.train, "vae", "--resume --steps 17",
                           data="other.pt")
        torch.save(torch.full((265, 1, 28, 32), 9, dtype=torch.uint8), "other.pt")
        self.assertMistake("28, 32.* began with", self.train, "vae", "--resume", data="other.pt")
        self.train("vae", "--resume --epochs 2 --precision bf16", data=moved, device="auto")
        self.assertEqual(sample.load(self.checkpoint)["step"], 32)
        self.train("vae", "--epochs 2 --batch-size 100", data=moved, out=self.folder / "other")
        self.assertEqual(sample.load(self.folder / "other" / "checkpoint.pt")["step"], 4)

    # 4. No checkpoint holds a nan, and no file runs code (TestCheckpoint).
    def test_a_loss_or_a_weight_that_is_no_number_stops_the_run(self):
        loss, bad = VAE.loss, iter([1] * 19 + [math.nan] + [1] * 5 + [math.inf])
        with patch(VAE, "loss", lambda vae, x: next(bad, 1) * loss(vae, x)):
            expected = "step 20: .* nan or inf; a new run.*--lr"
            self.assertMistake(expected, self.train, "vae", "--steps 40")
            self.assertEqual(self.metrics("step"), [["10"]])
            self.assertMistake("step (20|30): .* nan", self.train, "vae", "--steps 40 --resume")
        # √0 adds nothing to the loss of step 16, and a nan to the gradient.
        calls, other = itertools.count(), self.folder / "other"  # 0 is the trial before the run
        with patch(VAE, "loss", lambda vae, x: loss(vae, x) + (
                (0 * next(vae.parameters()).sum()).sqrt() if next(calls) == 16 else 0)):
            self.assertMistake("step 16: .* a weight", self.train, "vae", "--steps 16", out=other)
        for out, step in ((self.out, 16), (other, 0)):
            self.assertEqual(sample.load(out / "checkpoint.pt")["step"], step)

    # 5. Several processes train the same model: here without chance, and with a signal to rank 1.
    RANKS_SCRIPT = """
import itertools, signal, sys, torch, train, vae
loss, last, calls = vae.VAE.loss, int(sys.argv.pop()), itertools.count(1)
def forward(model, x):
    print(f" seed {torch.initial_seed()} ", end="", flush=True)  # one write: ranks share the pipe
    if next(calls) == last and train.RANK == 1:
        signal.raise_signal(signal.SIGTERM)
    return loss(model, x)

vae.VAE.reparameterize = lambda model, mu, log_var: mu
vae.VAE.forward = forward
train.main()
"""

    def test_a_rank_takes_the_device_of_its_number_on_this_machine(self):
        devices = patch(train, "pick_device", side_effect=[mock.Mock(type="cuda"), "the second"])
        with mock.patch.multiple(train, RANKS=4, RANK=3), devices as pick, \
                mock.patch.dict(os.environ, LOCAL_RANK="1"), \
                patch(torch.cuda, "set_device", side_effect=OSError) as current:
            self.assertRaises(OSError, train.prepare, {"model": "vae", "device": "cuda"})
        pick.assert_called_with("cuda:1")
        current.assert_called_with("the second")

    def test_two_ranks_are_one_process(self):
        script, env = self.folder / "ranks.py", {**os.environ, "PYTHONPATH": str(HERE)}
        script.write_text(self.RANKS_SCRIPT)
        one, two = self.folder / "one", ["-m", "torch.distributed.run", "--nproc_per_node=2"]

        def ranks(launcher, text, last=0, status=0, out=None):
            options = [*self.options("vae", f"--batch-size 32 {text}", out=out), last]
            return self.finish(self.start(script, options, launcher, env=env), status)

        seeds = re.findall(r"seed (\S+)", ranks(two, "--steps 20"))
        self.assertEqual(len(set(seeds)), 1 + 2 * 20)  # that of the trial, and a step's on a rank
        ranks([], "--steps 20", out=one)
        columns = "step", "epoch", "lr", "loss"
        both = (self.metrics(*columns, out=out) for out in (self.out, one))
        for name, a, b in zip(columns, *both):
            self.assertClose([*map(float, a)], [*map(float, b)], rtol=1e-4 * (name == "loss"))
        a, b = (sample.load(out / "checkpoint.pt")["model"] for out in (self.out, one))
        torch.testing.assert_close(a, b, rtol=0, atol=2e-3)  # half a step; Adam magnifies rounding
        # More steps, by one process again, and then by two of which one gets a signal.
        ranks([], "--resume --steps 23")
        output = ranks(two, "--resume --steps 90", last=5, status=1)
        self.assertIn("stopped at step 27 of 90", output)
        self.assertIn("torchrun --nproc_per_node=2 train.py", output)
        self.assertEqual(sample.load(self.checkpoint)["step"], 27)


@unittest.skipUnless(torch.cuda.is_available(), "needs a CUDA device")
class TestCUDA(CommandTest):
    def test_the_same_numbers_as_on_the_cpu(self):
        x, noise = torch.rand(2, 4, 1, 28, 28)
        t = torch.tensor([1, 2, 10, 20])
        for predict in ("noise", "image"):
            ddpm, both = DDPM(random_weights(small_unet()), cauchy_alphas(20), predict), []
            for device in ("cpu", "cuda"):
                ddpm, x, t = ddpm.to(device), x.to(device), t.to(device)
                torch.manual_seed(0)  # the generator that draws the loss's t, on the CPU
                with torch.no_grad(), patch(torch, "randn_like", lambda x: noise.to(x.device)):
                    both.append([y.cpu() for y in (
                        ddpm.loss(x), ddpm.predict_x0(x, t), *ddpm.q_posterior(x, -x, t))])
            for here, there in zip(*both):
                self.assertClose(here, there, rtol=0.02, atol=0.02)

    def test_a_recorded_step_is_an_eager_one(self):
        # But for kernels that add in any order. A resumed run is recorded anew, and draws the same.
        for precision, rtol in (("fp32", 1e-3), ("bf16", 1e-2)):
            losses = []
            for graph in (torch.cuda.make_graphed_callables, lambda module, inputs: module):
                self.out = self.folder / f"{precision} {len(losses)}"
                signals = [0] * 11 + [signal.SIGTERM] + [0] * 8
                options = f"--dropout 0.1 --precision {precision} --steps 20"
                with patch(torch.cuda, "make_graphed_callables", wraps=graph) as calls, \
                        patch(train, "signal_of_any_rank", side_effect=signals), \
                        patch(train, "ROW_EVERY", 1):
                    self.train("ddpm", options, device="cuda", status=128 + signal.SIGTERM)
                    self.train("ddpm", f"{options} --resume", device="cuda")
                self.assertEqual(calls.call_count, 2 * bool(torch.version.cuda))
                losses.append([*map(float, *self.metrics("loss"))])
            self.assertClose(*losses, rtol=rtol)
            self.draw("--device cuda")


if __name__ == "__main__":
    unittest.main()
