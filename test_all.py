"""The tests: `python test_all.py`, or `pytest test_all.py`. No network and no GPU needed.

Every formula is compared with an independent source: a closed form, torch.distributions, numerical
integration, or a Monte-Carlo mean with a tolerance of 5 of its own standard errors.
"""
import contextlib
import csv
import gzip
import hashlib
import inspect
import io
import math
import operator
import os
import pickle
import random
import re
import shlex
import signal
import struct
import subprocess
import sys
import tempfile
import time
import tracemalloc
import types
import unittest
import warnings
import zlib
from pathlib import Path
from unittest import mock

try:
    import resource
except ImportError:  # Windows
    resource = None

import torch
from torch import nn
from torch.distributions import Categorical, MixtureSameFamily, Normal, kl_divergence

import ddpm as section_2
import sample
import train
import unet as network
import vae as section_1
from ddpm import DDPM, cosine_alphas, exact_ddpm, linear_alphas, log_pixel_mass
from unet import UNet
from vae import VAE, GaussianMixture

HERE = Path(__file__).resolve().parent
MNIST = HERE / "data" / "mnist"


class Test(unittest.TestCase):
    """Seeds every test, and knows when tensors are close."""

    def setUp(self):
        torch.manual_seed(0)

    def assertClose(self, actual, expected, rtol=1e-6, atol=1e-9):
        torch.testing.assert_close(torch.as_tensor(actual, dtype=torch.float64),
                                   torch.as_tensor(expected, dtype=torch.float64),
                                   rtol=rtol, atol=atol)

    def assertMean(self, draws, expected, errors=5):
        """The mean of independent draws is what it should be, to within 5 standard errors."""
        draws = draws.double()
        error = draws.std(0) / len(draws) ** 0.5
        worst = ((draws.mean(0) - expected).abs() / error).max().item()
        self.assertLess(worst, errors, f"{draws.mean(0)} should be {expected} ± {error}")

    def assertSame(self, a, b, where=""):
        """Bit for bit."""
        self.assertEqual(type(a), type(b), where)
        if isinstance(a, dict):
            self.assertEqual(a.keys(), b.keys(), where)
            for key in a:
                self.assertSame(a[key], b[key], f"{where}.{key}")
        elif isinstance(a, list):
            self.assertEqual(len(a), len(b), where)
            for i, (x, y) in enumerate(zip(a, b)):
                self.assertSame(x, y, f"{where}.{i}")
        elif isinstance(a, torch.Tensor):
            self.assertEqual(a.dtype, b.dtype, where)
            self.assertEqual((a.double() - b.double()).abs().sum().item(), 0, where)
        else:
            self.assertEqual(a, b, where)


class TestExamples(Test):
    """Every formula of a section's worked examples is what its file computes."""

    def check(self, rows):
        for what, formula, computed, tolerance in rows:
            with self.subTest(what):
                if tolerance is None:  # an error of the print
                    self.assertGreater(abs(formula - computed), 1e-2)
                else:
                    self.assertAlmostEqual(formula, computed, delta=tolerance)

    def test_section_1(self):
        self.check(section_1.examples())

    def test_section_2(self):
        self.check(section_2.examples())


# ------------------------------------------------------------------------------ section 1


class TestGaussianMixture(Test):
    def setUp(self):
        super().setUp()
        self.pi = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
        self.sigma = torch.tensor([0.5, 1.0, 0.3], dtype=torch.float64)
        self.means = {"numbers": torch.tensor([-2.0, 0.0, 1.5], dtype=torch.float64),
                      "vectors": torch.tensor([[-2.0, 0], [0, 1], [1.5, 3]], dtype=torch.float64)}

    def test_density_and_posterior_against_torch_distributions(self):
        for name, mu in self.means.items():
            with self.subTest(name):
                mixture = GaussianMixture(self.pi, mu, self.sigma)
                x = torch.randn(50, *mu.shape[1:]).double()
                vectors = mu.view(3, -1)
                parts = torch.distributions.Independent(Normal(vectors, self.sigma[:, None]), 1)
                oracle = MixtureSameFamily(Categorical(self.pi), parts)
                self.assertClose(mixture.log_prob(x), oracle.log_prob(x.view(50, -1)))
                # Bayes' rule, factor by factor
                joint = self.pi * parts.log_prob(x.view(50, 1, -1)).exp()
                self.assertClose(mixture.posterior(x), joint / joint.sum(1, keepdim=True))
                self.assertTrue((mixture.encode(x) == joint.argmax(1)).all())

    def test_the_decoder_draws(self):
        for name, mu in self.means.items():
            with self.subTest(name):
                x = GaussianMixture(self.pi, mu, self.sigma).decode(torch.full((50_000,), 2))
                self.assertMean(x, mu[2])
                self.assertMean((x - mu[2])**2, self.sigma[2]**2)

    def test_samples_have_the_moments_of_the_mixture(self):
        for name, mu in self.means.items():
            with self.subTest(name):
                x = GaussianMixture(self.pi, mu, self.sigma).sample(100_000)
                shape = (3,) + (1,) * (mu.ndim - 1)
                pi, variance = self.pi.view(shape), self.sigma.view(shape) ** 2
                self.assertMean(x, (pi * mu).sum(0))
                self.assertMean(x**2, (pi * (mu**2 + variance)).sum(0))

    def test_bad_arguments(self):
        for weights, means, stds in (([1, 1], [0.0], [1.0]), ([0.5, -0.5], [0.0, 1], [1.0, 1]),
                                     ([1], [0.0], [0.0]), ([math.nan], [0.0], [1.0])):
            with self.assertRaises(ValueError):
                GaussianMixture(weights, means, stds)

    def test_whole_numbers_are_numbers(self):
        mixture = GaussianMixture([1, 3], [-1, 1], [1, 1])
        self.assertEqual(mixture.sample(5).shape, (5,))
        self.assertClose(mixture.log_prob(torch.zeros(1)), Normal(0.0, 1.0).log_prob(torch.ones(1)))


class TestVAE(Test):
    def test_kl_against_torch_distributions(self):
        vae, x = VAE(), torch.rand(5, 1, 28, 28) * 2 - 1
        mu, log_var = vae.encode(x)
        q = Normal(mu, (0.5 * log_var).exp())
        expected = kl_divergence(q, Normal(0.0, 1.0)).sum(1)
        self.assertClose(vae.elbo(x)["kl"].detach(), expected.detach(), rtol=1e-4)

    def test_loss_is_minus_elbo_per_pixel(self):
        vae, x = VAE(), torch.rand(4, 1, 28, 28) * 2 - 1
        torch.manual_seed(1)
        loss = vae.loss(x)
        torch.manual_seed(1)
        terms = vae.elbo(x)
        elbo = (terms["reconstruction"] - terms["kl"]).mean().item()
        self.assertClose(loss.item(), -elbo / 784, rtol=1e-5)

    def test_bits_per_dim_of_a_coarse_density(self):
        # Where the density hardly varies over a bin, its ELBO + log(bin width) is that of the mass.
        vae, x = VAE(decoder_std=0.5), torch.rand(2, 1, 28, 28).mul(255).round() / 127.5 - 1
        z = torch.zeros(2, vae.latent_dim)
        mass = log_pixel_mass(x.clamp(-0.99, 0.99), vae.decode(z), torch.tensor(0.5)).sum((1, 2, 3))
        density = Normal(vae.decode(z), 0.5).log_prob(x.clamp(-0.99, 0.99)).sum((1, 2, 3))
        bits = vae.bits_per_dim(x, {"reconstruction": density, "kl": torch.zeros(2)})
        self.assertClose(bits.detach(), (-mass / (784 * math.log(2))).detach(), rtol=1e-3)

    def test_a_learned_decoder_std_is_the_root_of_the_mean_squared_error(self):
        # The maximum of −D e / 2σ² − D log σ over σ, for a mean squared error e, is at σ² = e.
        vae, x = VAE(decoder_std="learned"), torch.rand(32, 1, 28, 28) * 2 - 1
        optimizer = torch.optim.Adam([vae.log_decoder_std], 0.02)
        for _ in range(200):
            optimizer.zero_grad()
            vae.loss(x).backward()
            optimizer.step()
        with torch.no_grad():
            mu, log_var = vae.encode(x)
            error = (x - vae.decode(vae.reparameterize(mu, log_var))).square().mean()
        self.assertClose(vae.decoder_std.detach(), error.sqrt(), rtol=0.01)

    def test_every_size_from_8_up(self):
        for shape in ((1, 8, 8), (1, 28, 28), (3, 32, 32), (1, 33, 33), (3, 64, 64), (2, 9, 31)):
            vae = VAE(shape, latent_dim=4, channels=4)
            x = torch.rand(2, *shape) * 2 - 1
            vae.loss(x).backward()
            images = vae.sample(3)
            self.assertEqual(images.shape, (3, *shape))
            self.assertLessEqual(images.abs().max().item(), 1)

    def test_bad_arguments(self):
        for arguments in (dict(image_shape=(1, 7, 28)), dict(image_shape=(28, 28)),
                          dict(image_shape=(0, 28, 28)), dict(image_shape=(1, 28.5, 28)),
                          dict(latent_dim=0), dict(latent_dim=2.5), dict(channels=0),
                          dict(decoder_std=0), dict(decoder_std=math.nan),
                          dict(decoder_std="taught")):
            value = next(iter(arguments.values()))
            with self.assertRaisesRegex(ValueError, re.escape(str(value))):
                VAE(**arguments)
        for x in (torch.zeros(2, 1, 28, 29), torch.zeros(2, 1, 28, 28).byte(), torch.zeros(28, 28)):
            with self.assertRaises(ValueError):
                VAE().loss(x)
        for z in (torch.zeros(2, 9), torch.zeros(2, 8).long(), torch.zeros(8)):
            with self.assertRaises(ValueError):
                VAE().decode(z)


# ------------------------------------------------------------------------------ section 2


class TestSchedules(Test):
    def test_linear_is_the_published_one(self):
        beta = 1 - linear_alphas(1000)
        self.assertClose(beta[[0, -1]], [1e-4, 0.02])
        self.assertClose(beta.diff(), torch.full((999,), (0.02 - 1e-4) / 999))

    def test_cosine_is_the_published_one(self):
        T = 1000
        f = [math.cos((t / T + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(T)]
        self.assertClose(cosine_alphas(T).cumprod(0)[:-1], torch.tensor(f[1:]) / f[0], rtol=1e-5)
        self.assertClose(1 - cosine_alphas(T)[-1], 0.999)  # where f(T) = 0

    def test_white_noise_at_the_end_of_every_chain(self):
        for schedule in ("linear", "cosine"):
            for T in [*range(10, 200), 500, 1000, 4000]:
                ddpm = DDPM(None, (1, 1, 1), T, schedule)
                self.assertLess(ddpm.alpha_bar[T], 1e-3)
                self.assertEqual((len(ddpm.alpha), len(ddpm.alpha_bar)), (T + 1, T + 1))
                self.assertEqual((ddpm.alpha[0], ddpm.alpha_bar[0]), (1, 1))
                self.assertEqual(ddpm.alpha_bar.dtype, torch.float64)
                self.assertTrue((ddpm.alpha[1:] > 0).all() and (ddpm.alpha[1:] < 1).all())

    def test_a_schedule_of_one_s_own(self):
        alphas = torch.tensor([0.97, 0.5, 0.1], dtype=torch.float64)
        ddpm = DDPM(None, (1, 1, 1), 3, alphas)
        self.assertSame(ddpm.alpha, torch.cat([torch.ones(1).double(), alphas]))
        self.assertClose(ddpm.alpha_bar, [1, 0.97, 0.485, 0.0485])
        with self.assertRaisesRegex(ValueError, "or a tensor"):
            DDPM(None, (1, 1, 1), 3, alphas.tolist())
        for wrong in ([0.5, 0.5], [0.5, 0.5, 1.0], [0.5, 0.0, 0.5], [0.5, math.nan, 0.5]):
            with self.assertRaisesRegex(ValueError, "schedule must be T = 3 numbers"):
                DDPM(None, (1, 1, 1), 3, torch.tensor(wrong))


class TestForward(Test):
    def test_a_t_for_each_image(self):
        ddpm, x = DDPM(None, (1, 2, 2)), torch.randn(3, 1, 2, 2)
        t = torch.tensor([1, 500, 1000])
        for method in (ddpm.q_transition, ddpm.q_marginal, lambda x, t: ddpm.q_posterior(x, -x, t)):
            mean, variance = method(x, t)
            for i in range(3):
                self.assertClose(mean[i:i + 1], method(x[i:i + 1], int(t[i]))[0])
                self.assertClose(variance[i].item(), method(x[i:i + 1], int(t[i]))[1].item())

    def test_coefficients_are_right_to_the_last_float32_digit(self):
        ddpm = DDPM(None, (1, 1, 1), 1000, "linear")
        variance = ddpm.q_marginal(torch.zeros(1, 1, 1, 1), 1)[1]
        self.assertEqual(variance.item(), torch.tensor(1e-4).item())

    def test_q_sample_has_the_marginal_moments(self):
        ddpm, x_0 = DDPM(None, (1, 1, 1)), torch.full((50_000, 1, 1, 1), 0.8)
        x_t = ddpm.q_sample(x_0, 400, torch.randn_like(x_0))
        a = ddpm.alpha_bar[400].item()
        self.assertMean(x_t, 0.8 * a**0.5)
        self.assertMean((x_t - 0.8 * a**0.5) ** 2, 1 - a)

    def test_the_last_step_back_is_certain(self):
        ddpm, x_t = DDPM(None, (1, 1, 1), 50, "linear"), torch.randn(3, 1, 1, 1).double()
        mean, variance = ddpm.q_posterior(x_t, x_t / 2, 1)
        self.assertClose(mean, x_t / 2)
        self.assertEqual(variance.item(), 0)

    def test_a_network_in_bfloat16(self):
        # The chain keeps its own precision.
        for dtype in (torch.float32, torch.float64):
            x_t = torch.randn(3, 1, 2, 2, dtype=dtype)
            ddpm = DDPM(lambda x, t: x.bfloat16(), (1, 2, 2))
            for value in (ddpm.predict_noise(x_t, 500), ddpm.p_transition(x_t, 500)[0]):
                self.assertEqual(value.dtype, dtype)

    def test_bad_arguments(self):
        ddpm, x = DDPM(lambda x, t: x, (1, 2, 2), 10), torch.zeros(3, 1, 2, 2)
        for t in (0, 11, -1, torch.tensor([1, 2, 0]), torch.tensor([1, 2]), 1.5, math.nan):
            with self.assertRaises(ValueError, msg=f"t = {t}"):
                ddpm.q_marginal(x, t)
        for wrong in (x[0], x[..., :1], x.byte()):
            for method, *arguments in ((ddpm.loss, wrong), (ddpm.elbo, wrong),
                                       (ddpm.predict_x0, wrong, 1), (ddpm.q_sample, x, 1, wrong),
                                       (ddpm.q_posterior, x, wrong, 1)):
                with self.assertRaises(ValueError, msg=method):
                    method(*arguments)
        for dtype in (torch.uint8, torch.int32):  # an index of bytes would be a mask
            t = torch.tensor([1, 5, 10])
            self.assertClose(ddpm.q_marginal(x, t.to(dtype))[1], ddpm.q_marginal(x, t)[1])
        with self.assertRaisesRegex(ValueError, "denoiser returned"):
            DDPM(lambda x, t: x[:, :, :1], (1, 2, 2)).loss(x)
        for arguments in (dict(T=1), dict(T=10.5), dict(T=math.nan), dict(schedule="sine"),
                          dict(predict="x"), dict(t_sampling="x"), dict(image_shape=(2, 2)),
                          dict(image_shape=(1, 0, 2))):
            value = next(iter(arguments.values()))
            with self.assertRaisesRegex(ValueError, re.escape(str(value))):
                DDPM(None, **{"image_shape": (1, 2, 2), **arguments})
        for steps, eta in ((0, 0), (11, 0), (5, -0.1), (5, 1.1), (5, math.nan)):
            with self.assertRaises(ValueError):
                ddpm.sample(1, steps, eta)


def pixel_ddpm(T, predict="noise"):
    """With an exact denoiser, for pixels in [-1, 1], unlike those of Ex. 2.1."""
    return exact_ddpm(T, predict, "linear", mu=(-0.5, 0.4), sigma=(0.05, 0.1))


class TestLoss(Test):
    def rate(self, alpha):
        """p(t) of `draw_t` for t = 1, …, T, but for a factor, with its w(t) by way of (2.43): the
        weight of ‖x̂ − x_0‖² there times (x̂ − x_0)² / (v̂ − v)² = 1 − ᾱ_t."""
        T, alpha_bar = len(alpha), alpha.cumprod(0)
        prev = torch.cat([torch.ones(1), alpha_bar[:-1]])
        variance = (1 - alpha) * (1 - prev) / (1 - alpha_bar)  # 0 at t = 1, where w is infinite
        weight = (1 - alpha) ** 2 * prev / (2 * variance * (1 - alpha_bar) ** 2)
        odds = (1 - alpha_bar) / alpha_bar
        likelihood = T / 200 * (weight * (1 - alpha_bar)).clamp(max=0.6)
        return torch.minimum(odds**2, 30 / odds + 0.1).clamp(max=1) + likelihood

    def test_how_often_each_t_is_drawn(self):
        for schedule, t_sampling, rate in (
                ("cosine", "uniform", torch.ones(20)),
                ("cosine", "snr", self.rate(cosine_alphas(20))),
                ("linear", "snr", self.rate(linear_alphas(50)))):
            seen, T = [], len(rate)
            ddpm = DDPM(lambda x, t: seen.append(t) or x, (1, 1, 1), T, schedule,
                        t_sampling=t_sampling)
            for n in (1, 3, 20_000):
                ddpm.loss(torch.zeros(n, 1, 1, 1))
                counts = torch.bincount(seen.pop(), minlength=T + 1)
                self.assertEqual(counts[0], 0)
                self.assertLess((counts[1:] - n * rate / rate.sum()).abs().max(), 2)  # not √n
            for _ in range(2000):
                ddpm.loss(torch.zeros(2, 1, 1, 1))
            expected = 2000 * rate / rate.sum()
            for t in torch.stack(seen, dim=1):  # each image meets all of them
                counts = torch.bincount(t, minlength=T + 1)[1:]
                self.assertTrue(((counts - expected).abs() < 5 * expected.sqrt()).all(), counts)

    def test_the_least_random_number_draws_t_1(self):
        with mock.patch.object(torch, "rand", torch.zeros):
            self.assertEqual(DDPM(None, (1, 1, 1), 8).draw_t(8).tolist(), list(range(1, 9)))

    def test_value_for_a_known_denoiser(self):
        # A network that says 0 is wrong by ‖ε‖²/D = 1 on average, or by ‖x_0‖²/D.
        x_0 = torch.full((20_000, 1, 2, 2), 0.5)
        image, noise = (DDPM(lambda x, t: torch.zeros_like(x), (1, 2, 2), predict=predict)
                        for predict in ("image", "noise"))
        self.assertClose(image.loss(x_0), 0.25)
        self.assertAlmostEqual(noise.loss(x_0).item(), 1, delta=5 * (2 / 80_000) ** 0.5)

    def test_a_velocity_is_an_image_and_a_noise(self):
        # Any network, as a velocity: what it says of x_0 and of ε leads to its x_t, and its loss is
        # the error of either, over 1 − ᾱ_t and over ᾱ_t.
        seen = []
        ddpm = DDPM(lambda x, t: seen.append((x, t)) or x.sin(), (1, 2, 2), predict="velocity")
        x_0 = torch.rand(500, 1, 2, 2, dtype=torch.float64) * 2 - 1
        loss, (x_t, t) = ddpm.loss(x_0), seen[0]
        a_bar = ddpm.alpha_bar[t].view(-1, 1, 1, 1)
        x0_hat, noise_hat = ddpm.predict_x0(x_t, t), ddpm.predict_noise(x_t, t)
        self.assertGreater(x0_hat.max(), 1)
        self.assertClose(ddpm.predict_x0(x_t, t, clip=True), x0_hat.clamp(-1, 1))
        self.assertClose(a_bar.sqrt() * x0_hat + (1 - a_bar).sqrt() * noise_hat, x_t)
        self.assertClose(((x0_hat - x_0) ** 2 / (1 - a_bar)).mean(), loss)
        noise = (x_t - a_bar.sqrt() * x_0) / (1 - a_bar).sqrt()
        self.assertClose(((noise_hat - noise) ** 2 / a_bar).mean(), loss)

    def test_the_exact_denoiser_minimises_it(self):
        # The least mean squared error is E Var[x_0 | x_t]; any other estimate adds its square.
        ddpm = pixel_ddpm(50)
        x_0 = ddpm.denoiser.p(ddpm.alpha_bar[0]).sample((50_000,)).view(-1, 1, 1, 1)
        x_t = ddpm.q_sample(x_0, 25, torch.randn_like(x_0))
        error = (ddpm.predict_x0(x_t, 25) - x_0).flatten()
        self.assertMean(error, 0)
        for function in (torch.sin, torch.square):  # orthogonal to every function of x_t
            self.assertMean(error * function(x_t).flatten(), 0)


class TestMixture(Test):
    """With the exact denoiser of a mixture the whole of section 2 has known answers."""

    def test_score_is_the_gradient_of_log_p_t(self):
        for predict in ("image", "noise", "velocity"):
            ddpm = pixel_ddpm(100, predict)
            for t in (1, 20, 100):
                x = torch.linspace(-1, 1, 21, dtype=torch.float64).requires_grad_()
                p_t = ddpm.denoiser.p(ddpm.alpha_bar[t])
                gradient, = torch.autograd.grad(p_t.log_prob(x).sum(), x)
                score = ddpm.score(x.detach().view(-1, 1, 1, 1), t)
                self.assertClose(score.flatten(), gradient, rtol=1e-5)

    def test_the_reverse_chain_draws_from_the_mixture(self):
        for predict, sampler in (("image", {}), ("noise", {"steps": 500, "eta": 0.0}),
                                 ("velocity", {"steps": 500, "eta": 0.0})):
            ddpm = pixel_ddpm(4000, predict)
            x = ddpm.sample(20_000, generator=torch.Generator().manual_seed(1), **sampler).flatten()
            left = x < 0  # 0 is 5 σ from one mean and 4 σ from the other
            data = ddpm.denoiser.p(ddpm.alpha_bar[0])
            self.assertMean(left, data.cdf(torch.zeros(1).double()).item())
            for k, part in ((0, x[left]), (1, x[~left])):
                self.assertMean(part, ddpm.denoiser.mu[k].item())
                # σ_q² is the least variance that a reverse step can have; the chain comes out
                # narrower by about Σ [1 − α_t − σ_q²(t)], which falls like 1/T.
                self.assertClose(part.std(), ddpm.denoiser.sigma[k], rtol=0.03)

    def test_unclipped_steps_are_the_paper_s_formula_in_epsilon(self):
        # (2.52): μ_θ(x_t) = [x_t − (1 − α_t)/√(1 − ᾱ_t) ε̂_θ(x_t)] / √α_t
        ddpm, x_t = pixel_ddpm(50), torch.randn(10, 1, 1, 1).double()
        for t in range(1, 51):
            a, a_bar = ddpm.alpha[t], ddpm.alpha_bar[t]
            noise = ddpm.denoiser(x_t, torch.tensor([t]))
            mean, _ = ddpm.p_transition(x_t, t, clip=False)
            self.assertClose(mean, (x_t - (1 - a) / (1 - a_bar).sqrt() * noise) / a.sqrt())

    def test_the_variance_of_a_long_stride(self):
        # A network that knows x_0 leaves of x_s nothing random, given x_t, but σ_t z.
        ddpm = DDPM(lambda x, t: torch.full_like(x, 0.35), (1, 1, 1), 200, predict="image")
        for eta in (0.5, 1.0):
            (t, x_t), (s, x_s) = list(ddpm.ddim_chain(100_000, 5, eta))[2:4]
            a_t, a_s = ddpm.alpha_bar[t], ddpm.alpha_bar[s]
            variance = eta**2 * (1 - a_s) / (1 - a_t) * (1 - a_t / a_s)
            noise = (x_t - a_t.sqrt() * 0.35) / (1 - a_t).sqrt()
            rest = x_s - a_s.sqrt() * 0.35 - (1 - a_s - variance).sqrt() * noise
            self.assertMean(rest, 0)
            self.assertMean(rest * noise, 0)
            self.assertMean(rest**2, variance.item())

    def test_noise_is_drawn_only_where_there_is_a_variance(self):
        ddpm = pixel_ddpm(10)
        for draws, chain, options in ((10, ddpm.reverse_chain, {}),
                                      (7, ddpm.ddim_chain, {"steps": 7}),
                                      (1, ddpm.ddim_chain, {"steps": 7, "eta": 0.0})):
            drawn, expected = (torch.Generator().manual_seed(1) for _ in range(2))
            list(chain(5, generator=drawn, **options))
            for _ in range(draws):  # x_T, and z in every step but the last
                torch.randn(5, 1, 1, 1, generator=expected, dtype=torch.float64)
            self.assertTrue((drawn.get_state() == expected.get_state()).all())

    def test_no_graph_grows_along_a_chain(self):
        ddpm = DDPM(UNet(1, 8, (1,), attention=()), (1, 8, 8), 5)
        values = [x for chain in (ddpm.reverse_chain(1), ddpm.ddim_chain(1, 3)) for _, x in chain]
        for x in (*values, *ddpm.elbo(values[-1]).values()):
            self.assertFalse(x.requires_grad)

    def test_clipped_unless_told_otherwise(self):
        ddpm, x_0 = DDPM(lambda x, t: -3 * x, (1, 1, 1), 10), torch.rand(50, 1, 1, 1)
        self.assertLessEqual(ddpm.sample(50).abs().max(), 1)
        self.assertLessEqual(ddpm.sample(50, steps=5).abs().max(), 1)
        self.assertGreater(dict(ddpm.reverse_chain(50, clip=False))[0].abs().max(), 1)
        self.assertGreater(dict(ddpm.ddim_chain(50, 5, clip=False))[0].abs().max(), 1)
        default, clipped, unclipped = (
            ddpm.elbo(x_0, generator=torch.Generator().manual_seed(1), **options)["consistency"]
            for options in ({}, {"clip": True}, {"clip": False}))
        self.assertTrue((default == clipped).all())
        self.assertGreater((default - unclipped).abs().max(), 1)

    def test_a_schedule_whose_alpha_bar_is_0_at_last(self):
        ddpm = DDPM(lambda x, t: 0 * x, (1, 1, 1), 1100, torch.full((1100,), 0.5), "velocity")
        self.assertEqual(ddpm.alpha_bar[-2:].tolist(), [0, 0])
        x, y = (ddpm.sample(5, steps, generator=torch.Generator().manual_seed(1))
                for steps in (None, 1100))
        self.assertClose(x, y)

    def test_ddim_visits_both_ends_and_is_deterministic(self):
        ddpm = pixel_ddpm(100)
        for steps in (1, 2, 7, 50, 99, 100):
            chains = [list(ddpm.ddim_chain(5, steps, generator=torch.Generator().manual_seed(1)))
                      for _ in range(2)]
            times = [t for t, _ in chains[0]]
            self.assertEqual(times, sorted(set(times), reverse=True))
            self.assertEqual((len(times), times[0], times[-1]), (steps + 1, 100, 0))
            if steps > 1:
                self.assertEqual(times[-2], 1)
            for (_, x), (_, y) in zip(*chains):
                self.assertTrue((x == y).all())


class TestElbo(Test):
    def test_pixel_masses(self):
        pixels = (torch.arange(256).double() / 127.5 - 1)[:, None]
        for std in (1e-3, 0.02, 1.0):
            mean = torch.tensor([-1.2, -1, 0.123, 0.99, 5]).double()
            std = torch.tensor(std).double()
            log_mass = log_pixel_mass(pixels, mean, std)
            self.assertClose(log_mass.exp().sum(0), torch.ones(5))
            edges = (torch.arange(1, 256).double() - 0.5)[:, None] / 127.5 - 1
            cdf = Normal(mean, std).cdf(edges)
            mass = torch.cat([torch.zeros_like(cdf[:1]), cdf, torch.ones_like(cdf[:1])]).diff(dim=0)
            self.assertClose(log_mass.exp(), mass, rtol=1e-5, atol=1e-12)
            far = log_pixel_mass(pixels.float(), mean.float(), std.float())
            self.assertTrue(far.isfinite().all())
            self.assertClose(far, log_mass, rtol=1e-3, atol=1e-3)

    def test_a_device_without_log_ndtr(self):
        # Apple's mps has no kernel for it.
        ddpm, x_0 = DDPM(lambda x, t: x, (1, 2, 2), 10), torch.zeros(2, 1, 2, 2)
        expected = ddpm.elbo(x_0, generator=torch.Generator().manual_seed(1))
        log_ndtr, calls = torch.special.log_ndtr, []

        def every_other_call(x):
            calls.append(x)
            if len(calls) % 2:
                raise NotImplementedError
            return log_ndtr(x)

        with mock.patch.object(torch.special, "log_ndtr", every_other_call):
            self.assertSame(ddpm.elbo(x_0, generator=torch.Generator().manual_seed(1)), expected)

    def test_terms_against_torch_distributions(self):
        ddpm = DDPM(lambda x, t: 0.3 * x + 0.1, (1, 4, 4), 20, torch.full((20,), 0.9))
        x_0 = torch.rand(3, 1, 4, 4).double() * 2 - 1
        for clip in (True, False):
            terms = ddpm.elbo(x_0, clip=clip, generator=torch.Generator().manual_seed(1))
            noise = torch.Generator().manual_seed(1)
            consistency = 0
            for t in range(1, 21):  # elbo draws its x_t in this order
                epsilon = torch.randn(x_0.shape, generator=noise, dtype=x_0.dtype)
                x_t = ddpm.q_sample(x_0, t, epsilon)
                if t > 1:
                    q, p = (Normal(mean, variance.sqrt()) for mean, variance in (
                        ddpm.q_posterior(x_t, x_0, t), ddpm.p_transition(x_t, t, clip)))
                    consistency += kl_divergence(q, p).sum((1, 2, 3))
                else:
                    std = (0.1 * 0.1 / 0.19) ** 0.5  # σ_q(2)
                    reconstruction = log_pixel_mass(
                        x_0, ddpm.predict_x0(x_t, 1, clip), torch.tensor(std)).sum((1, 2, 3))
            self.assertClose(terms["reconstruction"], reconstruction)
            self.assertClose(terms["consistency"], consistency)
            mean, variance = ddpm.q_marginal(x_0, 20)
            prior = kl_divergence(Normal(mean, variance.sqrt()), Normal(0.0, 1.0)).sum((1, 2, 3))
            self.assertClose(terms["prior_matching"], prior)

    def test_estimate_from_k_times_is_unbiased(self):
        # With x̂_θ = 0 the sum is ½ ‖x_0‖² [snr(1) − snr(T)], and each t has a share ∝ 1/t:
        # an estimate that draws t in that proportion from 2..T has no variance at all.
        snr = torch.tensor([14.0, 8, 4, 1])
        alphas = torch.cat([torch.ones(1), snr / (1 + snr)])
        ddpm = DDPM(lambda x, t: 0 * x, (1, 2, 2), 4, alphas[1:] / alphas[:-1], "image")
        x_0 = torch.rand(20_000, 1, 2, 2) * 2 - 1
        exact = 0.5 * x_0.square().sum((1, 2, 3)) * (14 - 1)
        self.assertClose(ddpm.elbo(x_0)["consistency"], exact, rtol=1e-5)
        self.assertClose(ddpm.elbo(x_0, k=3)["consistency"], exact, rtol=1e-5)
        seen = []  # and they are drawn that often
        ddpm.denoiser = lambda x, t: seen.append(t) or 0 * x
        ddpm.elbo(x_0, k=1)
        counts = torch.bincount(seen[-1], minlength=5)[2:].double()
        p = torch.tensor([6.0, 4, 3]) / 13
        error = (counts - 20_000 * p) / (20_000 * p * (1 - p)).sqrt()
        self.assertLess(error.abs().max().item(), 5)
        with mock.patch.object(torch, "rand", lambda *size, **_: torch.zeros(size)):
            ddpm.elbo(x_0[:1], k=1)  # the least random number draws t = 2
        self.assertEqual(seen[-1].tolist(), [2])
        ddpm.denoiser = lambda x, t: x
        self.assertSame(*(ddpm.elbo(x_0, k=1, generator=torch.Generator().manual_seed(1))
                          for _ in range(2)))
        self.assertEqual(ddpm.elbo(x_0[:0], k=3)["consistency"].shape, (0,))

    def test_the_terms_go_by_their_names(self):
        for model in (DDPM(lambda x, t: x, (1, 8, 8), 10), VAE((1, 8, 8))):
            x = torch.rand(2, 1, 8, 8) * 2 - 1
            terms = model.elbo(x)
            backwards = dict(reversed(terms.items()))
            self.assertSame(model.bits_per_dim(x, terms), model.bits_per_dim(x, backwards))

    def test_bits_per_dim(self):
        ddpm, x_0 = DDPM(lambda x, t: x, (1, 2, 2), 10), torch.zeros(2, 1, 2, 2).double()
        terms = {"reconstruction": torch.tensor([-4.0, 0]),
                 "prior_matching": torch.tensor([1.0, 0]), "consistency": torch.tensor([3.0, 4])}
        self.assertClose(ddpm.bits_per_dim(x_0, terms), torch.tensor([8.0, 4]) / (4 * math.log(2)))
        self.assertEqual(ddpm.bits_per_dim(x_0).shape, (2,))


class TestMeta(Test):
    """The meta device stands in for a GPU: there a tensor that stays behind on the CPU raises, and
    so does any value that the host would have to wait for."""

    def test_ddpm(self):
        for predict in ("noise", "image", "velocity"):
            ddpm = DDPM(UNet(1, 8, (1, 2), attention=()), (1, 8, 8), 10, predict=predict).to("meta")
            x = torch.zeros(3, 1, 8, 8, device="meta")
            for t in (5, torch.tensor([1, 5, 10])):
                for mean, variance in (ddpm.q_transition(x, t), ddpm.q_marginal(x, t),
                                       ddpm.q_posterior(x, x, t), ddpm.p_transition(x, t)):
                    Normal(mean, variance.sqrt(), validate_args=False).log_prob(x)
                for y in (ddpm.q_sample(x, t, x), ddpm.predict_x0(x, t), ddpm.predict_noise(x, t),
                          ddpm.noise_between(x, x, t), ddpm.score(x, t)):
                    self.assertEqual((y.shape, y.device.type), (x.shape, "meta"))
            ddpm.loss(x).backward()
            with torch.device("meta"):  # a default device of the user's
                for terms in (ddpm.elbo(x), ddpm.elbo(x, k=2)):
                    self.assertEqual(ddpm.bits_per_dim(x, terms).shape, (3,))
            for steps in (None, 4):
                self.assertEqual(ddpm.sample(3, steps).shape, x.shape)

    def test_a_training_step(self):
        # Up to the first row, where the host has to wait.
        adam = torch.optim.Adam  # whose fused kernel the meta device lacks

        def unfused(parameters, lr, fused, **options):
            return adam(parameters, lr, **options)

        for model in (DDPM(UNet(1, 8, (1, 2), attention=()), (1, 8, 8), 10), VAE((1, 8, 8))):
            model.to("meta")
            images = torch.zeros(64, 1, 8, 8, dtype=torch.uint8, device="meta")
            config = {"images": 64, "batch_size": 4, "steps": 20, "lr": 0.1, "seed": 0,
                      "precision": "fp32", "compile": False, "tensorboard": False}
            state = {"model": model.state_dict(), "ema": model.state_dict(), "step": 0,
                     "optimizer": adam(model.parameters()).state_dict(), "seconds": 0.0,
                     "losses": []}
            device = torch.device("meta")
            with mock.patch.object(train.torch.optim, "Adam", unfused), \
                    mock.patch.object(train.Log, "checkpoint"), \
                    contextlib.redirect_stderr(io.StringIO()):
                log = train.Log(config, state, None, None, device)
                with self.assertRaisesRegex(RuntimeError, "item.* meta"):
                    train.train(config, state, model, images, images, device, log)
            self.assertEqual(len(log.losses), train.ROW)

    def test_vae(self):
        for decoder_std in (0.6, "learned"):
            vae = VAE((1, 8, 8), decoder_std=decoder_std).to("meta")
            x = torch.zeros(3, 1, 8, 8, device="meta")
            vae.loss(x).backward()
            self.assertEqual(vae.bits_per_dim(x).shape, (3,))
            self.assertEqual(vae.sample(3).shape, x.shape)


# ------------------------------------------------------------------------------ the network


class TestUNet(Test):
    def test_time_embedding(self):
        # Wavelengths from 2π to 10,000 · 2π in equal ratios: for 8 numbers, of 10,000^(1/3).
        t = torch.tensor([1.0, 7, 1000])
        angles = t.double()[:, None] / torch.tensor([1, 10_000**(1 / 3), 10_000**(2 / 3), 10_000])
        self.assertClose(network.time_embedding(t, 8), torch.cat([angles.sin(), angles.cos()], 1),
                         atol=1e-4)

    def test_fourier_features(self):
        # The imaginary and the real part of e^(i 2ⁿ π x), of all channels.
        x = torch.rand(2, 3, 4, 5) * 2 - 1
        waves = [torch.exp(1j * 2**n * math.pi * x.double()) for n in (3, 5)]
        expected = torch.cat([x, *[part for z in waves for part in (z.imag, z.real)]], dim=1)
        self.assertClose(network.fourier_features(x, (3, 5)), expected, atol=1e-4)
        self.assertSame(network.fourier_features(x, ()), x)
        unet, seen = UNet(3, 8, (1,), fourier=(3, 5), attention=()), []
        unet.stem.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        self.assertEqual(unet(x, torch.ones(2)).shape, x.shape)
        self.assertSame(seen[0], network.fourier_features(x, (3, 5)))

    def test_fourier_features_pass_bfloat16(self):
        # There −0.9961 and −0.9951 are the same number, −1 + 2⁻⁸: not to the waves.
        x = torch.full((1, 1, 8, 8), -0.9961)
        for fourier, differ in ((), False), ((5,), True):
            unet = self.random(UNet(1, 8, (1,), attention=(), fourier=fourier))
            with torch.autocast("cpu", torch.bfloat16):
                a, b = (unet(y, torch.ones(1)) for y in (x, x + 0.001))
            self.assertEqual(bool((a - b).abs().max() > 0), differ)

    def test_the_published_parameter_count(self):
        unet = UNet(3, channels=128, multipliers=(1, 2, 2, 2), blocks=2, attention=(1,),
                    dropout=0.1)
        self.assertEqual(sum(p.numel() for p in unet.parameters()), 35_746_307)

    def test_starts_at_zero_and_every_parameter_learns(self):
        unet = UNet(1, channels=8, multipliers=(1, 2), blocks=1, attention=(0,))
        x, t = torch.randn(4, 1, 8, 8), torch.tensor([1, 2, 3, 4])
        self.assertTrue((unet(x, t) == 0).all())
        optimizer = torch.optim.SGD(unet.parameters(), 0.1)
        for _ in range(4):  # the zeros of the last layers hide the others for a few steps
            optimizer.zero_grad()
            (unet(x, t) - x).square().mean().backward()
            optimizer.step()
        for name, parameter in unet.named_parameters():
            if name.endswith("qkv.bias"):
                # The softmax ignores what a bias of k adds to every position.
                q, k, v = parameter.grad.chunk(3)
                self.assertTrue(q.abs().sum() > 0 and v.abs().sum() > 0)
            else:
                self.assertGreater(parameter.grad.abs().sum().item(), 0, name)

    def test_t_matters(self):
        unet = self.random(UNet(1, channels=8, multipliers=(1, 2), attention=()))
        x = torch.randn(1, 1, 8, 8).expand(1000, -1, -1, -1)
        with torch.no_grad():
            outputs = unet(x, torch.arange(1, 1001)).flatten(1)
        self.assertGreater(torch.pdist(outputs).min().item(), 0)  # no two of 1000 t are confused

    def test_images_of_a_batch_do_not_mix(self):
        unet = self.random(UNet(2, channels=8, multipliers=(1, 2), attention=(1,))).double()
        x, t = torch.randn(3, 2, 8, 12).double(), torch.tensor([5, 70, 900])
        for i in range(3):
            self.assertClose(unet(x, t)[i:i + 1].detach(), unet(x[i:i + 1], t[i:i + 1]).detach())

    def test_attention_sees_the_whole_image(self):
        for attention, reach in ((), False), ((0,), True):
            unet = self.random(UNet(1, channels=8, multipliers=(1,), blocks=1, attention=attention))
            unet.middle = nn.ModuleList()  # whose attention would always see everything
            x, t = torch.randn(1, 1, 64, 8), torch.tensor([1])
            y = x.clone()
            y[0, 0, 0] += 1
            for norm in (m for m in unet.modules() if isinstance(m, nn.GroupNorm)):
                norm.forward = lambda h: h  # group statistics would see everything, too
            changed = (unet(x, t) - unet(y, t)).abs()[0, 0, -1].max().item() > 0
            self.assertEqual(changed, reach)

    def random(self, unet):
        """Without the zeros at the end of every branch."""
        for parameter in unet.parameters():
            nn.init.normal_(parameter, std=0.2)
        return unet

    def test_bad_arguments(self):
        for arguments in (dict(image_channels=0), dict(image_channels=1.5), dict(channels=6),
                          dict(channels=0), dict(channels=32.5), dict(blocks=0), dict(blocks=1.5),
                          dict(multipliers=()), dict(multipliers=(1, 0)),
                          dict(multipliers=(1, 2.5)), dict(attention=(3,)), dict(attention=(-1,)),
                          dict(dropout=1.0), dict(dropout=math.nan),
                          dict(fourier=(9,)), dict(fourier=(-1,)), dict(fourier=(0.5,))):
            value = next(iter(arguments.values()))
            with self.assertRaisesRegex(ValueError, re.escape(str(value))):
                UNet(**arguments)
        with self.assertRaisesRegex(ValueError, "30×28.*divisible by 4"):
            UNet()(torch.zeros(1, 1, 30, 28), torch.ones(1))
        x, t = torch.zeros(2, 1, 28, 28), torch.ones(2)
        for arguments in ((x.expand(2, 3, 28, 28), t), (x.byte(), t), (x, t[:1]), (x, t[0])):
            with self.assertRaises(ValueError):
                UNet()(*arguments)


# ------------------------------------------------------------------------------ files


def decode_png(path):
    """The frames of a PNG or APNG, and their delays in seconds, by a reader of its own."""
    data, chunks, at = path.read_bytes(), [], 8
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    while at < len(data):
        length, kind = struct.unpack(">I4s", data[at:at + 8])
        body, crc = data[at + 8:at + 8 + length], data[at + 8 + length:at + 12 + length]
        assert struct.unpack(">I", crc)[0] == zlib.crc32(kind + body)
        chunks.append((kind, body))
        at += 12 + length
    assert (chunks[0][0], chunks[-1]) == (b"IHDR", (b"IEND", b""))
    width, height, depth, color, *rest = struct.unpack(">IIBBBBB", chunks[0][1])
    assert (depth, rest) == (8, [0, 0, 0])
    channels = {0: 1, 2: 3}[color]
    frames, delays, sequence, announced = [], [], [], 1
    for kind, body in chunks:
        if kind == b"acTL":
            announced = struct.unpack(">II", body)[0]
        elif kind == b"fcTL":
            fields = struct.unpack(">IIIIIHHBB", body)
            assert fields[1:5] == (width, height, 0, 0)
            sequence.append(fields[0])
            delays.append(fields[5] / fields[6])
        elif kind in (b"IDAT", b"fdAT"):
            if kind == b"fdAT":
                sequence.append(struct.unpack(">I", body[:4])[0])
                body = body[4:]
            rows = torch.tensor(list(zlib.decompress(body)), dtype=torch.uint8).view(height, -1)
            assert (rows[:, 0] == 0).all()  # filter type 0: the bytes themselves
            frames.append(rows[:, 1:].reshape(height, width, channels).permute(2, 0, 1))
    assert sequence == list(range(len(sequence))) and announced == len(frames)
    return frames, delays


class FileTest(Test):
    """With a folder of its own."""

    def setUp(self):
        super().setUp()
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)

    def assertMistake(self, script, arguments, expected):
        """It ends with status 2 and one line that says what is expected. In this process, to save
        the seconds of a start; two mistakes are also made the long way."""
        errors, main = io.StringIO(), {"train.py": train.main, "sample.py": sample.main}[script]
        with self.subTest(expected), contextlib.redirect_stderr(errors), \
                contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)  # the process ends with its lock
            with self.assertRaises(SystemExit) as stop:
                main(list(map(str, arguments)))
            self.assertEqual(stop.exception.code, 2)
            line = re.sub(r"\r[^\n]*\n", "", errors.getvalue())  # without the progress bar's
            self.assertRegex(line, rf"\A{script}: error: .*{expected}.*\n\Z")

    def pretend(self, name, module):
        """Until the end of the test this is the module of that name; None: there is none."""
        modules = {**sys.modules}
        self.addCleanup(lambda: sys.modules.update({name: modules[name]}) if name in modules else
                        sys.modules.pop(name))
        sys.modules[name] = module


class TestPNG(FileTest):
    def test_pixels_come_back(self):
        for channels in (1, 3):
            frames = list(torch.randint(0, 256, (4, channels, 5, 7), dtype=torch.uint8))
            sample.write_png(self.folder / "x.png", frames[:1])
            decoded, delays = decode_png(self.folder / "x.png")
            self.assertTrue(len(decoded) == 1 and (decoded[0] == frames[0]).all() and not delays)
            sample.write_png(self.folder / "x.png", frames, seconds=0.1, last=1.5)
            decoded, delays = decode_png(self.folder / "x.png")
            self.assertTrue((torch.stack(decoded) == torch.stack(frames)).all())
            self.assertEqual(delays, [0.1, 0.1, 0.1, 1.5])

    def test_grid(self):
        images = torch.arange(1, 6, dtype=torch.uint8).view(5, 1, 1, 1).expand(5, 3, 4, 6)
        picture = sample.grid(images)
        self.assertEqual(picture.shape, (3, 2 * 6 + 2, 3 * 8 + 2))
        for i in range(5):
            top, left = 2 + 6 * (i // 3), 2 + 8 * (i % 3)
            self.assertTrue((picture[:, top:top + 4, left:left + 6] == i + 1).all())
        self.assertEqual(picture.long().sum(), images.long().sum())

    def test_to_uint8_and_back(self):
        values = torch.arange(256, dtype=torch.uint8)
        back = sample.to_uint8(train.to_float(values, torch.device("cpu")))
        self.assertTrue((back == values).all())
        self.assertEqual(sample.to_uint8(torch.tensor([-9.0, 9])).tolist(), [0, 255])


def write_idx(path, tensor, opener=open):
    with opener(path, "wb") as file:
        file.write(struct.pack(f">HBB{tensor.ndim}I", 0, 8, tensor.ndim, *tensor.shape)
                   + bytes(tensor.flatten().tolist()))


def mutants(original, n):
    """n damaged versions of these bytes: flipped bits, other bytes, holes, cuts and repetitions."""
    rng = random.Random(0)
    for _ in range(n):
        mutant = bytearray(original)
        for _ in range(rng.choice((1, 1, 1, 3, 10))):
            at, length = rng.randrange(len(mutant) + 1), rng.choice((1, 4, 64))
            piece = mutant[at:at + length]
            mutant[at:at + length] = rng.choice((
                bytes(b ^ 1 << rng.randrange(8) for b in piece), rng.randbytes(len(piece)),
                bytes(len(piece)), b"\xff" * len(piece), b"", piece + piece))
        if rng.random() < 0.1:
            del mutant[rng.randrange(len(mutant) + 1):]
        yield bytes(mutant)


class TestData(FileTest):
    def test_mnist_is_mnist(self):
        published = {
            "train-images-idx3": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
            "train-labels-idx1": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
            "t10k-images-idx3": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
            "t10k-labels-idx1": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2"}
        for name, expected in published.items():
            content = gzip.decompress((MNIST / f"{name}-ubyte.gz").read_bytes())
            self.assertEqual(hashlib.sha256(content).hexdigest(), expected)
        images, test = train.load_images(MNIST)
        self.assertEqual((images.shape, images.dtype), ((60_000, 1, 28, 28), torch.uint8))
        self.assertEqual((test.shape, test.dtype), ((10_000, 1, 28, 28), torch.uint8))

    def test_gzipped_or_not(self):
        images = torch.randint(0, 256, (3, 4, 5), dtype=torch.uint8)
        write_idx(self.folder / "train-images-idx3-ubyte.gz", images, gzip.open)
        write_idx(self.folder / "t10k-images-idx3-ubyte", images)
        for split in train.load_images(self.folder):
            self.assertTrue((split[:, 0] == images).all())

    def test_a_pt_file(self):
        images = torch.randint(0, 256, (100, 3, 4, 5), dtype=torch.uint8)
        torch.save(images, self.folder / "x.pt")
        training, test = train.load_images(self.folder / "x.pt")
        self.assertTrue((test == images[[0, 32, 64, 96]]).all())
        self.assertEqual(len(training), 96)
        self.assertTrue((training[31:62] == images[33:64]).all())

    def test_damaged_files(self):
        whole = gzip.decompress((MNIST / "t10k-labels-idx1-ubyte.gz").read_bytes())
        path, packed = self.folder / "x", self.folder / "x.gz"
        for content in (b"", b"\0\0\x08", whole[:7], whole[:-1], whole + b"\0",
                        b"\0\0\x0d" + whole[3:], b"text"):
            path.write_bytes(content)
            packed.write_bytes(gzip.compress(content))
            for file in (path, packed):
                with self.assertRaisesRegex(ValueError, re.escape(str(file))):
                    train.read_idx(file)
        for content in (whole, gzip.compress(whole)[:-20], b""):
            packed.write_bytes(content)
            with self.assertRaisesRegex(ValueError, re.escape(str(packed))):
                train.read_idx(packed)

    def test_a_header_that_promises_too_much_costs_no_memory(self):
        content = struct.pack(">HBB3I", 0, 8, 3, 2**20, 2**10, 2**10) + bytes(1000)
        tracemalloc.start()
        self.addCleanup(tracemalloc.stop)
        for path, content in ((self.folder / "x", content),
                              (self.folder / "x.gz", gzip.compress(content))):
            path.write_bytes(content)
            with self.assertRaisesRegex(ValueError, "but 1000 follow"):
                train.read_idx(path)
        self.assertLess(tracemalloc.get_traced_memory()[1], 2**23)

    def test_any_mutation_of_an_idx_file_is_read_or_refused(self):
        content = struct.pack(">HBB3I", 0, 8, 3, 5, 4, 4) + bytes(range(80))
        for name, original in (("x", content), ("x.gz", gzip.compress(content))):
            path = self.folder / name
            for mutant in mutants(original, 200):
                path.write_bytes(mutant)
                try:
                    self.assertEqual(train.read_idx(path).dtype, torch.uint8)
                except ValueError as error:
                    self.assertIn(str(path), str(error))


class RunsCode:
    """Its pickle makes a folder when it is read."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


class TestCheckpoint(FileTest):
    def setUp(self):
        super().setUp()
        self.path = self.folder / "x.pt"
        config = {"model": "vae", "image_shape": [1, 8, 8], "latent_dim": 2, "channels": 1,
                  "decoder_std": 0.5}
        weights = dict(sample.build_model(config).state_dict())
        self.state = {"format": sample.FORMAT, "config": config, "model": weights, "ema": weights}

    def assertRefused(self, expected):
        with self.assertRaisesRegex(ValueError, f"^{re.escape(str(self.path))}: .*{expected}"):
            sample.read_checkpoint(self.path)

    def test_what_is_not_a_checkpoint(self):
        sample.save(self.path, self.state)
        self.assertSame(sample.read_checkpoint(self.path), self.state)
        whole = self.path.read_bytes()
        for content in (b"", b"text", whole[:-1], whole[:1000], whole[100:]):
            self.path.write_bytes(content)
            self.assertRefused("damaged")
        bias = "encoder.0.bias"
        for expected, state in (
                ("not a checkpoint", torch.zeros(3)),
                ("not a checkpoint", {"weights": 1}),
                ("another version", {**self.state, "format": 1}),
                (bias, {**self.state, "ema": {**self.state["ema"], bias: torch.zeros(7)}}),
                (bias, {**self.state, "model": {k: v for k, v in self.state["model"].items()
                                                if k != bias}}),
                ("spare", {**self.state, "ema": {**self.state["ema"], "spare": torch.zeros(1)}}),
                ("another shape", {**self.state, "config": {**self.state["config"],
                                                            "channels": 10**5}}),
                ("decoder_std", {**self.state, "config": {k: v for k, v in
                                                          self.state["config"].items()
                                                          if k != "decoder_std"}}),
                ("latent_dim", {**self.state, "config": {**self.state["config"],
                                                         "latent_dim": 0}}),
                ("ema", {k: v for k, v in self.state.items() if k != "ema"})):
            sample.save(self.path, state)
            self.assertRefused(expected)

    def test_no_code_runs(self):
        made = self.folder / "made"
        with open(self.path, "wb") as file:
            pickle.dump(RunsCode(made), file)
        self.assertRefused("damaged")
        torch.save({**self.state, "config": RunsCode(made)}, self.path)
        self.assertRefused("damaged")
        self.assertFalse(made.exists())
        torch.load(self.path, weights_only=False)
        self.assertTrue(made.exists())  # it would have

    def test_what_sampling_can_do_without(self):
        sample.save(self.path.with_name("checkpoint.pt"), self.state)
        self.assertSame(sample.read_checkpoint(self.path.with_name("checkpoint.pt")), self.state)
        self.assertMistake("train.py", ["--model", "vae", "--out", self.folder, "--resume"],
                           "needs losses, optimizer, seconds, step")

    def test_two_processes_write_one_file(self):
        # Each its own bytes, over and over: what stands there is always the whole of one.
        code = ("import sys; from sample import write_file\n"
                "for i in range(300): write_file(sys.argv[1], sys.argv[2].encode() * 500_000)")
        writers = [subprocess.Popen([sys.executable, "-c", code, self.path, letter], cwd=HERE,
                                    stderr=subprocess.PIPE) for letter in "ab"]
        found = set()
        while any(writer.poll() is None for writer in writers):
            if self.path.exists():
                content = self.path.read_bytes()
                found.add((len(content), len(set(content))))
        self.assertEqual([writer.communicate()[1] for writer in writers], [b"", b""])
        self.assertEqual(found, {(500_000, 1)})

    def test_any_mutation_is_read_as_it_was_or_refused(self):
        sample.save(self.path, self.state)
        read = 0
        for mutant in mutants(self.path.read_bytes(), 300):
            self.path.write_bytes(mutant)
            try:
                state = sample.read_checkpoint(self.path)
            except ValueError as error:
                self.assertIn(str(self.path), str(error))
                self.assertNotIn("\n", str(error))
            else:
                read += 1  # only what the archive does not need was hit
                self.assertSame(state, self.state)
        self.assertLess(read, 60)


# ------------------------------------------------------------------------------ command lines

TINY = {"ddpm": "--channels 8 --multipliers 1 2 --attention 1 --timesteps 20".split(),
        "vae": "--channels 8 --latent-dim 4".split()}


class CommandTest(FileTest):
    """Runs the scripts as a user does, on 256 training and 64 test images of MNIST."""

    def setUp(self):
        super().setUp()
        self.data, self.run_folder = self.folder / "data", self.folder / "run"
        self.checkpoint = self.run_folder / "checkpoint.pt"
        self.data.mkdir()
        for split, count in (("train", 256), ("t10k", 64)):
            images = train.read_idx(MNIST / f"{split}-images-idx3-ubyte.gz")[:count]
            write_idx(self.data / f"{split}-images-idx3-ubyte", images)

    def command(self, script, *arguments, status=0, launcher=(), **options):
        """Its standard output, or of a mistake, status 2, its standard error."""
        done = subprocess.run([sys.executable, *launcher, HERE / script, *map(str, arguments)],
                              cwd=self.folder, capture_output=True, text=True, timeout=120,
                              **options)
        self.assertEqual(done.returncode, status, done.stderr)
        return done.stderr if status == 2 else done.stdout

    def in_process(self, *arguments):
        """The standard output of train.main, and the status it ends with."""
        status, output = 0, io.StringIO()
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(output):
            try:
                train.main(list(map(str, arguments)))
            except SystemExit as stop:
                status = stop.code
        return output.getvalue(), status

    def trained(self, checkpoint, weights="ema"):
        """The model of a checkpoint, with these of its weights."""
        state = sample.read_checkpoint(checkpoint)
        model = sample.build_model(state["config"])
        model.load_state_dict(state[weights])
        return model.eval()

    def train(self, model, *arguments, out=None):
        return ["--model", model, "--data", self.data, "--out", out or self.run_folder,
                "--batch-size", 16, "--precision", "fp32", *TINY[model], *arguments]

    def metrics(self, folder=None):
        # At once: between two reads a running train.py may have written the head.
        text = ((folder or self.run_folder) / "metrics.csv").read_text()
        return list(csv.DictReader(text.splitlines()))

    def wait_for_rows(self, folder):
        """Until the run that has just been started there has written three."""
        until = time.monotonic() + 60
        while not (folder / "metrics.csv").exists() or len(self.metrics(folder)) < 3:
            self.assertLess(time.monotonic(), until)
            time.sleep(0.01)


class TestEndToEnd(CommandTest):
    def losses_fall(self):
        rows = self.metrics()
        self.assertEqual([int(row["step"]) for row in rows], [10, 20, 30, 40, 48])
        self.assertEqual(float(rows[-1]["epoch"]), 3)
        losses = [float(row["loss"]) for row in rows]
        self.assertLess(losses[-1], 0.9 * losses[0])

    def test_ddpm(self):
        text = self.command("train.py", *self.train("ddpm", "--epochs", 3, "--lr", 0.01,
                                                    "--dropout", 0.1))
        self.assertRegex(text, r"test ELBO -[\d.]+ nats, [\d.]+ bits/dim .*images/s.* sample\.py")
        self.losses_fall()
        for step in (16, 32, 48):
            (picture,), _ = decode_png(self.run_folder / f"samples_{step:06d}.png")
            self.assertEqual(picture.shape, (1, 8 * 30 + 2, 8 * 30 + 2))

        tensor, film, strip = (self.folder / name for name in ("x.pt", "film.png", "strip.png"))
        options = ["--checkpoint", self.checkpoint, "-n", 5]
        self.command("sample.py", *options, "--out", tensor, "--chain", film, "--strip", strip)
        images = torch.load(tensor, weights_only=True)
        self.assertEqual((images.shape, images.dtype), ((5, 1, 28, 28), torch.uint8))
        frames, delays = decode_png(film)
        self.assertEqual(len(frames), 21)  # x_20, …, x_0
        self.assertTrue((frames[-1] == sample.grid(images)).all())
        (still,), _ = decode_png(strip)
        self.assertEqual(still.shape, (1, 5 * 30 + 2, 11 * 30 + 2))

        # They are drawn with the moving average of the weights.
        drawn = []
        for weights in ("ema", "model"):
            model = self.trained(self.checkpoint, weights)
            with sample.autocast(torch.device("cpu")):
                x = model.sample(5, generator=torch.Generator().manual_seed(0))
            drawn.append(sample.to_uint8(x))
        self.assertTrue((images == drawn[0]).all())
        self.assertFalse((images == drawn[1]).all())

        # The same seed gives the same images, in any form; another seed or sampler does not.
        self.command("sample.py", *options, "--out", self.folder / "x.png")
        (picture,), _ = decode_png(self.folder / "x.png")
        self.assertTrue((picture == sample.grid(images)).all())
        for other in (["--seed", 1], ["--steps", 5], ["--steps", 20, "--eta", 0.5]):
            self.command("sample.py", *options, "--out", tensor, *other)
            self.assertFalse((torch.load(tensor, weights_only=True) == images).all())

    def test_vae(self):
        text = self.command("train.py", *self.train("vae", "--epochs", 3))
        self.assertRegex(text, r"test ELBO -?[\d.]+ nats, [\d.]+ bits/dim \(64 images\)")
        self.losses_fall()
        (picture,), _ = decode_png(self.run_folder / "reconstructions_000048.png")
        _, originals = train.load_images(self.data)
        self.assertTrue((picture[:, 2:30, 2:30] == originals[0]).all())
        vae = self.trained(self.checkpoint)
        with torch.no_grad():
            mu, _ = vae.encode(train.to_float(originals[:1], torch.device("cpu")))
            digit = sample.to_uint8(vae.decode(mu))[0]
        self.assertLessEqual((picture[:, 2:30, 32:60].int() - digit.int()).abs().max(), 1)
        self.command("sample.py", "--checkpoint", self.checkpoint)
        (picture,), _ = decode_png(self.run_folder / "samples.png")
        self.assertEqual(picture.shape, (1, 8 * 30 + 2, 8 * 30 + 2))

    def test_a_learned_decoder_std(self):
        self.command("train.py", *self.train("vae", "--steps", 32, "--decoder-std", "learned"))
        state = sample.read_checkpoint(self.checkpoint)
        for weights in (state["model"], state["ema"]):
            self.assertLess(weights["log_decoder_std"].item(), -0.02)
        self.command("sample.py", "--checkpoint", self.checkpoint)
        self.command("train.py", *self.train("vae", "--steps", 48, "--resume"))

    def test_latent_grid(self):
        flat, file = self.folder / "flat", self.folder / "grid.png"
        self.command("train.py", *self.train("vae", "--steps", 1, "--latent-dim", 2, out=flat))
        self.command("sample.py", "--checkpoint", flat / "checkpoint.pt", "--latent-grid", file)
        (picture,), _ = decode_png(file)
        vae = self.trained(flat / "checkpoint.pt")
        z = Normal(0.0, 1.0).icdf((torch.arange(20) + 0.5) / 20)
        for row, column in ((0, 0), (0, 19), (12, 5)):  # z_1 to the right, z_2 upwards
            with torch.no_grad():
                digit = sample.to_uint8(vae.decode(torch.stack([z[column], z[19 - row]])[None]))[0]
            drawn = picture[:, 2 + 30 * row:30 + 30 * row, 2 + 30 * column:30 + 30 * column]
            self.assertLessEqual((drawn.int() - digit.int()).abs().max(), 3)  # bfloat16

    def test_tensorboard(self):
        board = mock.MagicMock()
        package = mock.MagicMock(SummaryWriter=mock.Mock(return_value=board))
        arguments = self.train("vae", "--epochs", 1, "--tensorboard")
        self.pretend("torch.utils.tensorboard", None)
        self.assertMistake("train.py", arguments, "--tensorboard: pip install tensorboard")
        self.pretend("torch.utils.tensorboard", package)
        self.assertEqual(self.in_process(*arguments)[1], 0)
        drawn = [call.args for call in board.add_scalar.call_args_list if call.args[0] == "loss"]
        self.assertEqual(drawn, [("loss", float(row["loss"]), int(row["step"]))
                                 for row in self.metrics()])
        (_, picture, _), _ = (call.args for call in board.add_image.call_args_list)
        self.assertEqual(picture.shape, (1, 8 * 30 + 2, 8 * 30 + 2))
        board.close.assert_called_once()
        # A run that began with it can go on without.
        self.pretend("torch.utils.tensorboard", None)
        options = [*arguments[:-1], "--epochs", 2, "--resume"]
        self.assertMistake("train.py", options, "--no-tensorboard")
        self.assertEqual(self.in_process(*options, "--no-tensorboard")[1], 0)

    def test_colour(self):
        data = self.folder / "x.pt"
        torch.save(torch.randint(0, 256, (66, 3, 12, 16), dtype=torch.uint8), data)
        for model, extra in (("ddpm", ["--chain", self.folder / "film.png"]), ("vae", [])):
            out = self.folder / model
            self.command("train.py", *self.train(model, "--data", data, "--epochs", 1, out=out))
            self.command("sample.py", "--checkpoint", out / "checkpoint.pt", "-n", 2, *extra)
            (picture,), _ = decode_png(out / "samples.png")
            self.assertEqual(picture.shape, (3, 14 + 2, 2 * 18 + 2))
            self.assertFalse((picture[0] == picture[1]).all())
        frames, _ = decode_png(self.folder / "film.png")
        self.assertEqual((len(frames), frames[0].shape), (21, picture.shape))

    def test_help_shows_every_default(self):
        text = " ".join(self.command("train.py", "--help").split())
        for model, options in train.DEFAULTS.items():
            for name, value in options.items():
                self.assertIn("--" + name.replace("_", "-"), text)
                value = " ".join(map(str, value)) if isinstance(value, list) else value
                self.assertIn(f"{value} for {model}", text)
        self.assertIn("(default: none for ddpm)", text)
        self.assertIn("(default: data/mnist)", text)
        self.assertEqual(text.count("(default: auto)"), 2)


class TestReadme(FileTest):
    """What README.md says is so."""

    def setUp(self):
        super().setUp()
        self.text = (HERE / "README.md").read_text(encoding="utf-8")
        self.blocks = re.findall(r"^```(\w*)\n(.*?)^```$", self.text, re.M | re.S)

    def resolve(self, name):
        names = {**vars(section_1), **vars(section_2), **vars(network), **globals(),
                 "vae": section_1, "ddpm": section_2}
        return operator.attrgetter(name)(types.SimpleNamespace(**names))

    def test_every_name_is_one_and_every_link_leads_to_it(self):
        names = re.findall(r"`((?:VAE|DDPM|UNet|GaussianMixture|Test\w+)(?:\.\w+)*)`", self.text)
        self.assertGreater(len(names), 30)
        for name in names:
            self.resolve(name)
        links = re.findall(r"\[`([\w.]+)`\]\((\w+\.py)#L(\d+)\)", self.text)
        self.assertGreater(len(links), 30)
        for name, file, line in links:
            source = inspect.unwrap(getattr(self.resolve(name), "fget", self.resolve(name)))
            self.assertEqual((Path(inspect.getsourcefile(source)).name,
                              inspect.getsourcelines(source)[1]), (file, int(line)), name)
        rows = [what for file in (section_1, section_2) for what, *_ in file.examples()]
        maps = re.findall(r"^\|(?:[^|\n]+\|){4} ([^|[\n]+) \|$", self.text, re.M)
        self.assertGreater(len(maps), 40)
        for name in set(maps) - {"row of the table", "–"}:
            self.assertTrue(any(what.startswith(f"{name} ") for what in rows), name)
        for path in re.findall(r"\]\(([\w/.]+)\)", self.text):
            self.assertTrue((HERE / path).exists(), path)

    def test_every_command_parses(self):
        inline = re.findall(r"`((?:python|torchrun) [^`]*)`", self.text)
        blocks = [line.partition(" #")[0] for kind, block in self.blocks if not kind
                  for line in block.splitlines()]
        commands = [command.split() for line in inline + blocks for command in line.split(" && ")
                    if re.match(r"(python|torchrun) ", command)]
        self.assertGreater(len(commands), 20)
        parsers = {"train.py": train.parse_args, "sample.py": sample.parse_args}
        for command in commands:
            script = next(word for word in command if word.endswith(".py"))
            self.assertTrue((HERE / script).exists(), command)
            options = command[command.index(script) + 1:]
            with self.subTest(" ".join(command)):
                if "--help" not in options and (options or script in parsers):
                    _, parsed = parsers[script](options)
                    if script == "train.py":
                        train.configure({name: value for name, value in parsed.items()
                                         if name not in ("out", "resume")}, None)

    def test_every_block_of_python_runs(self):
        # In a folder with what the blocks read, and without the one package that they ask for.
        (self.folder / "data").symlink_to(HERE / "data")
        for name in ("photos", "cifar-10-batches-bin"):
            (self.folder / name).mkdir()
        (self.folder / "photos" / "cat.jpg").touch()
        (self.folder / "cifar-10-batches-bin" / "data_batch_1.bin").write_bytes(bytes(5 * 3073))
        torch.save(torch.randint(0, 256, (100, 1, 28, 28), dtype=torch.uint8),
                   self.folder / "samples.pt")
        pillow = mock.MagicMock()
        photo = pillow.Image.open.return_value.convert.return_value.resize.return_value
        photo.tobytes.return_value = bytes(32 * 32 * 3)
        blocks = [block for kind, block in self.blocks if kind == "python"]
        self.assertGreater(len(blocks), 5)
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(self.folder)
        self.pretend("PIL", pillow)
        with contextlib.redirect_stdout(io.StringIO()) as output:
            for block in blocks:
                with self.subTest(block):
                    exec(block.replace("60_000", "1_000"), {})
        for name in ("figure_2_7.png", "figure_2_10.png", "figure_2_11.png"):
            (drawn,), (asset,) = (decode_png(path)[0] for path in (
                self.folder / name, HERE / "assets" / name))
            self.assertEqual(drawn.shape, asset.shape)
            self.assertLess((drawn != asset).float().mean(), 0.05)  # other torch, other random x
        self.assertRegex(output.getvalue(), r"samples [\d.]+\ntraining images [\d.]+\n")
        for file, shape in (("photos.pt", (1, 3, 32, 32)), ("cifar10.pt", (5, 3, 32, 32))):
            self.assertEqual(sample.load(self.folder / file).shape, shape)


class TestRuns(CommandTest):
    @unittest.skipIf(os.name == "nt", "Windows has other signals")
    def test_interrupted_and_resumed_equals_uninterrupted(self):
        for model, options, ask, status in (
                ("ddpm", ["--steps", 48, "--dropout", 0.1], signal.SIGINT, 130),
                ("vae", ["--steps", 240], signal.SIGTERM, 143),
                ("vae", ["--steps", 240], signal.SIGHUP, 129),
                ("vae", ["--steps", 240], signal.SIGKILL, -9)):
            straight, stopped = self.folder / f"{model}-straight", self.folder / f"{model}-{ask}"
            if not straight.exists():
                self.command("train.py", *self.train(model, *options, out=straight))
            arguments = list(map(str, self.train(model, *options, out=stopped)))
            process = subprocess.Popen(
                [sys.executable, HERE / "train.py", *arguments], cwd=self.folder,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                # A shell's background job ignores SIGINT, and nohup's ignores SIGHUP.
                preexec_fn=lambda: [signal.signal(signum, signal.SIG_DFL)
                                    for signum in (signal.SIGINT, signal.SIGHUP)])
            self.wait_for_rows(stopped)
            process.send_signal(ask)
            output, errors = process.communicate(timeout=60)
            self.assertEqual(process.returncode, status, errors)
            self.assertNotIn("Traceback", errors)
            step = torch.load(stopped / "checkpoint.pt", weights_only=True)["step"]
            if ask == signal.SIGKILL:
                self.assertEqual(step % 16, 0)  # the last whole epoch
                self.command("train.py", *arguments, "--resume")
            else:
                self.assertIn(f"stopped at step {step} of {options[1]}", output)
                self.assertIn("--resume", output)
                self.command("train.py", *shlex.split(output.split("train.py ")[1]))

            for x, y in zip(self.metrics(straight), self.metrics(stopped), strict=True):
                for column in ("step", "epoch", "loss", "lr"):
                    self.assertEqual(x[column], y[column], f"{model} stopped at {step}: {x}, {y}")
            a, b = (torch.load(folder / "checkpoint.pt", weights_only=True)
                    for folder in (straight, stopped))
            for key in ("config", "step", "losses", "model", "ema", "optimizer"):
                self.assertSame(a[key], b[key], f"{model} stopped at {step}: {key}")

    def handle(self, signum, handler):
        """Until the end of the test."""
        self.addCleanup(signal.signal, signum, signal.signal(signum, handler))

    def test_a_caught_signal_gets_its_default_back(self):
        def handler(signum, frame):
            raise AssertionError

        for signum in (signal.SIGINT, signal.SIGTERM):
            self.handle(signum, handler)
        with train.caught_signals() as signals:
            for signum in (signal.SIGINT, signal.SIGTERM):
                signal.raise_signal(signum)
                self.assertEqual(signals[-1], signum)
                self.assertEqual(signal.getsignal(signum), signal.SIG_DFL)
        self.assertEqual(signal.getsignal(signal.SIGTERM), handler)

    @unittest.skipUnless(hasattr(signal, "SIGHUP"), "Windows has no SIGHUP")
    def test_an_ignored_signal_stays_ignored(self):
        self.handle(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
        with train.caught_signals() as signals:
            signal.raise_signal(signal.SIGHUP)
        self.assertEqual(signals, [])

    def test_a_signal_during_the_last_checkpoint(self):
        def save(path, state):
            sample.save(path, state)
            if state["step"] == 16:
                signal.raise_signal(signal.SIGTERM)

        options = self.train("vae", "--steps", 16)
        with mock.patch.object(train, "save", save):
            output, status = self.in_process(*options)
        self.assertEqual(status, 143)
        self.assertIn("stopped at step 16 of 16", output)
        self.assertNotIn("ELBO", output)
        output, status = self.in_process(*options, "--resume")
        self.assertEqual(status, 0)
        self.assertRegex(output, "already at step 16 of 16: nothing left to train\ntest ELBO")

    def test_a_loss_that_is_no_number_stops_the_run(self):
        loss, bad = VAE.loss, iter([1] * 19 + [math.nan] + [1] * 5 + [math.inf])
        options = self.train("vae", "--steps", 40)
        with mock.patch.object(VAE, "forward", lambda vae, x: next(bad, 1) * loss(vae, x)):
            self.assertMistake("train.py", options, "step 20: since the last row the mean loss is "
                               "nan; .*--lr.*--resume")
            self.assertEqual(sample.read_checkpoint(self.checkpoint)["step"], 16)
            self.assertEqual([row["step"] for row in self.metrics()], ["10"])
            self.assertMistake("train.py", [*options, "--resume"], "step 30: .* is nan")
        self.assertEqual(sample.read_checkpoint(self.checkpoint)["step"], 16)

    def test_no_checkpoint_holds_weights_that_are_no_numbers(self):
        # √0 adds nothing to the loss, and a nan to the gradient.
        root = [0] * 15 + [1]
        loss = VAE.loss
        with mock.patch.object(VAE, "forward", lambda vae, x: loss(vae, x) + (
                (0 * next(vae.parameters()).sum()).sqrt() if root.pop(0) else 0)):
            self.assertMistake("train.py", self.train("vae", "--steps", 16), "step 16: weights")
        self.assertEqual(sample.read_checkpoint(self.checkpoint)["step"], 0)

    def on_a_clock(self, step=1.0, writing=1000.0):
        """A clock on which a step of the VAE takes so many seconds, and a picture or checkpoint so
        many; and a list of the steps that checkpoints are written of."""
        now, saved, loss, draw = [0.0], [], VAE.loss, train.draw_pictures

        def forward(vae, x):
            now[0] += step
            return loss(vae, x)

        def save(path, state):
            now[0] += writing
            saved.append(state["step"])
            sample.save(path, state)

        def draw_pictures(*arguments):
            now[0] += writing
            return draw(*arguments)

        for where, name, new in ((VAE, "forward", forward), (train, "save", save),
                                 (train, "draw_pictures", draw_pictures),
                                 (train.time, "perf_counter", lambda: now[0])):
            patch = mock.patch.object(where, name, new)
            patch.start()
            self.addCleanup(patch.stop)
        return saved

    def test_seconds_are_those_of_the_steps(self):
        self.on_a_clock()
        output, _ = self.in_process(*self.train("vae", "--batch-size", 64, "--epochs", 8))
        for row in self.metrics():
            self.assertEqual((float(row["seconds"]), float(row["images_per_second"])),
                             (float(row["step"]), 64), row)
        self.assertIn("; 64 images/s;", output)
        self.in_process(*self.train("vae", "--batch-size", 64, "--epochs", 9, "--resume"))
        self.assertEqual(float(self.metrics()[-1]["seconds"]), 36)

    def test_pictures_at_most_20_times(self):
        saved = self.on_a_clock()
        self.in_process(*self.train("vae", "--batch-size", 256, "--epochs", 61))
        expected = [*range(4, 61, 4), 61]
        self.assertEqual(saved, [0, *expected])
        self.assertEqual(sorted(path.name for path in self.run_folder.glob("samples_*")),
                         [f"samples_{step:06d}.png" for step in expected])

    def test_a_checkpoint_every_five_minutes(self):
        saved = self.on_a_clock(step=40)  # 300 s are over after 8 of them
        self.in_process(*self.train("vae", "--batch-size", 8, "--epochs", 1))
        self.assertEqual(saved, [0, 8, 16, 24, 32])

    def test_one_process_a_folder(self):
        options = self.train("vae", "--steps", 100_000)
        with open(self.folder / "log", "w") as log:
            process = subprocess.Popen([sys.executable, HERE / "train.py", *map(str, options)],
                                       cwd=self.folder, stdout=log, stderr=log)
        self.addCleanup(process.wait)
        self.addCleanup(process.kill)
        self.wait_for_rows(self.run_folder)
        rows = (self.run_folder / "metrics.csv").read_bytes()
        self.assertMistake("train.py", [*options, "--resume", "--steps", 40],
                           "another process is writing")
        self.assertTrue((self.run_folder / "metrics.csv").read_bytes().startswith(rows))
        self.assertIsNone(process.poll())
        process.kill()
        process.wait()
        step = sample.read_checkpoint(self.checkpoint)["step"]
        self.assertEqual(self.in_process(*options, "--resume", "--steps", step + 1)[1], 0)

    def test_what_may_change(self):
        self.command("train.py", *self.train("vae", "--steps", 16))
        moved = self.folder / "moved"
        self.data.rename(moved)
        options = self.train("vae", "--resume", "--steps", 17)
        self.assertMistake("train.py", options, "no such folder")
        for data in (moved, moved.parent / "." / "moved" / ".." / "moved"):
            self.assertEqual(self.in_process(*options, "--data", data)[1], 0)
        torch.save(torch.zeros(257, 1, 28, 28, dtype=torch.uint8), self.folder / "other.pt")
        self.assertMistake("train.py", [*options, "--data", self.folder / "other.pt"],
                           "248 images .* began with 256")

    def test_rows_that_someone_wrote(self):
        self.in_process(*self.train("vae", "--steps", 32))
        path, torn = self.run_folder / "metrics.csv", self.run_folder / "checkpoint.pt.1.tmp"
        torn.write_text("half of a checkpoint, that a crash left")
        rows = path.read_text().splitlines()
        for spoiled in ("\n", "x,y\n", "\n33,1", "40,1,1\n50,1,1\n"):
            path.write_text("\n".join(rows) + "\n" + spoiled)
            self.assertEqual(self.in_process(*self.train("vae", "--steps", 32, "--resume"))[1], 0)
            self.assertEqual(path.read_text().splitlines()[:len(rows)], rows)
            self.assertNotRegex(path.read_text(), "(?m)^(33|40|50),")
        self.assertFalse(torn.exists())

    def test_out_of_memory_is_one_line(self):
        told = "[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory: you"
        options = self.train("vae", "--steps", 1)
        self.command("train.py", *options)
        options += ["--resume", "--steps", 2]
        for where, name in ((VAE, "forward"), (train, "evaluate")):
            for error in (torch.OutOfMemoryError(), RuntimeError(told), MemoryError()):
                with mock.patch.object(where, name, side_effect=error):
                    self.assertMistake("train.py", options, "out of memory: a smaller --batch-size")
        with mock.patch.object(train, "evaluate", side_effect=RuntimeError("a bug")):
            with self.assertRaisesRegex(RuntimeError, "a bug"):
                self.in_process(*options)

    def test_pictures_are_always_from_the_same_noise(self):
        x = torch.zeros(2, 1, 8, 8)
        for model in (VAE((1, 8, 8)), DDPM(lambda x, t: 0.1 * x, (1, 8, 8), 10)):
            self.assertSame(*(train.draw_pictures(model, x, seed=3) for _ in range(2)))

    def test_precision(self):
        cpu, x = torch.device("cpu"), torch.zeros(8, 8)
        for precision, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
            with sample.autocast(cpu, precision):
                self.assertEqual((x @ x).dtype, dtype)

    def test_the_last_line_is_a_mean_over_the_images(self):
        images = torch.randint(0, 256, (10, 1, 2, 2), dtype=torch.uint8)  # in batches of 4, 4, 2
        x = (images.double() / 127.5 - 1).sum((1, 2, 3))
        model = types.SimpleNamespace(
            elbo=lambda x, k: {"cost": k * x.sum((1, 2, 3)), "reconstruction": x.sum((1, 2, 3))**2,
                               "other": torch.ones(len(x))},
            bits_per_dim=lambda x, terms: terms["reconstruction"])
        elbo, bits = train.evaluate(model, images, 4, torch.device("cpu"), {"k": 3})
        self.assertClose(elbo, (x**2 - 3 * x - 1).mean(), rtol=1e-5)
        self.assertClose(bits, (x**2).mean(), rtol=1e-5)

    def test_the_evaluation_is_of_the_average_in_batches_as_in_training(self):
        elbo, seen = VAE.elbo, []
        with mock.patch.object(VAE, "elbo",
                               lambda vae, x: seen.append((vae, len(x))) or elbo(vae, x)):
            self.in_process(*self.train("vae", "--steps", 2))
        sizes, vae, saved = [n for _, n in seen], seen[-1][0], sample.load(self.checkpoint)
        self.assertEqual((max(sizes), sum(sizes)), (16, 2 * 16 + 64))
        self.assertFalse(vae.training)
        bias = vae.state_dict()["encoder.0.bias"]
        self.assertSame(bias, saved["ema"]["encoder.0.bias"])
        self.assertFalse((bias == saved["model"]["encoder.0.bias"]).all())

    @unittest.skipIf(os.name == "nt", "needs a Unix shell")
    def test_a_terminal_that_is_not_there(self):
        quoted = self.folder / "my run"
        options = self.train("vae", "--steps", 1, out=quoted)
        shell = " ".join(shlex.quote(str(word)) for word in (
            sys.executable, HERE / "train.py", *options))
        for end in ("2>&-", ">&-", "| true", "| head -1", "2>&1 | true"):
            with self.subTest(end):
                for path in quoted.glob("*"):
                    path.unlink()
                done = subprocess.run(["bash", "-c", f"set -o pipefail; {shell} {end}"],
                                      capture_output=True, text=True, timeout=60)
                said = done.stdout + done.stderr
                self.assertEqual(done.returncode, 0, said)
                self.assertNotRegex(said.replace(str(self.folder), ""), "Traceback|Error|error")
                self.assertEqual("test ELBO" in said, end not in (">&-", "2>&1 | true"))
                self.assertEqual(sample.read_checkpoint(quoted / "checkpoint.pt")["step"], 1)
                if end == "2>&-":
                    self.assertEqual(shlex.split(said)[-1], str(quoted / "checkpoint.pt"))
        narrow = {**os.environ, "PYTHONIOENCODING": "ascii"}
        said = self.command("train.py", *self.train("vae", "--steps", 1), env=narrow)
        self.assertIn("256 images of 1?28?28", said)

    def test_a_run_that_ended_while_this_one_started(self):
        load, options = train.load_images, self.train("vae", "--steps", 1)

        def slow(data):
            if not self.checkpoint.exists():
                with mock.patch.object(train, "load_images", load):
                    self.in_process(*options)
            return load(data)

        with mock.patch.object(train, "load_images", slow):
            self.assertMistake("train.py", options, "another process has just written it")
        self.assertEqual(len(self.metrics()), 1)

    def test_longer_even_if_killed_at_once(self):
        options = self.train("vae", "--steps", 16)
        self.in_process(*options)
        with mock.patch.object(VAE, "forward", side_effect=OSError("killed")):
            self.assertMistake("train.py", [*options, "--resume", "--steps", 32], "killed")
        self.assertNotIn("nothing left", self.in_process(*options[:-2], "--resume")[0])
        self.assertEqual(self.metrics()[-1]["step"], "32")

    def test_ranks_without_torchrun(self):
        errors = self.command("train.py", *self.train("vae"), status=2,
                              env={**os.environ, "WORLD_SIZE": "2"})
        self.assertRegex(errors, r"\Atrain.py: error: .*RANK.*\n\Z")
        self.assertFalse(self.run_folder.exists())

    def test_every_rank_takes_another_share(self):
        config, images = {"seed": 0, "batch_size": 8}, torch.arange(20, dtype=torch.uint8)
        cpu = torch.device("cpu")
        whole = [train.next_batch(images, config, step, cpu) for step in range(4)]
        self.assertEqual(len(torch.cat(whole[:2]).unique()), 16)  # no image twice in an epoch
        self.assertFalse((torch.cat(whole[:2]) == torch.cat(whole[2:])).all())
        seeds = set()
        for step in range(4):
            shares = []
            for rank in (0, 1):
                with mock.patch.multiple(train, RANK=rank, RANKS=2):
                    shares.append(train.next_batch(images, config, step, cpu))
                seeds.add(torch.initial_seed())
            self.assertSame(torch.cat(shares), whole[step])
        self.assertEqual(len(seeds), 8)  # other random numbers in every step, on every rank

    def test_gradients_are_clipped(self):
        # Steps of plain gradient descent are as long as the learning rate times the clipped norm.
        before, moves, loss = [], [], VAE.loss

        def forward(vae, x):
            weights = nn.utils.parameters_to_vector(vae.parameters()).detach().clone()
            moves.extend((weights - old).norm().item() for old in before)
            before[:] = [weights]
            return 1000 * loss(vae, x)

        def descent(parameters, lr, **options):
            return torch.optim.SGD(parameters, lr)

        with mock.patch.object(VAE, "forward", forward), \
                mock.patch.object(train.torch.optim, "Adam", descent):
            self.in_process(*self.train("vae", "--steps", 16, "--lr", 0.01))
        rates = [0.01 * train.lr_share(step, 16) for step in range(15)]
        self.assertClose(moves, rates, rtol=1e-3)

    @unittest.skipUnless(resource, "Windows has no limits")
    def test_no_room_on_the_disk(self):
        self.command("train.py", *self.train("vae", "--steps", 16))
        before = {path: path.read_bytes() for path in self.run_folder.iterdir()}

        def no_room():
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

        errors = self.command("train.py", *self.train("vae", "--steps", 32, "--resume"), status=2,
                              preexec_fn=no_room)
        self.assertRegex(errors.splitlines()[-1], r"^train.py: error: .*File too large.*--resume")
        self.assertNotIn("Traceback", errors)
        after = {path: path.read_bytes() for path in self.run_folder.iterdir()}
        rows = self.run_folder / "metrics.csv"
        self.assertTrue(after.pop(rows).startswith(before.pop(rows)))
        self.assertEqual(before, after)
        output = self.folder / "large.pt"
        errors = self.command("sample.py", "--checkpoint", self.checkpoint, "-n", 500, "--out",
                              output, status=2, preexec_fn=no_room)
        self.assertRegex(errors.splitlines()[-1], r"^sample.py: error: .*File too large")
        self.assertFalse(output.exists())

    # What torchrun starts: train.py without chance in the VAE, and with a signal to rank 1 alone.
    RANKS = """
import signal, sys, train, vae

loss, steps = vae.VAE.loss, int(sys.argv.pop())

def forward(model, x):
    global steps
    steps -= 1
    if steps == 0 and train.RANK == 1:
        signal.raise_signal(signal.SIGTERM)
    return loss(model, x)

vae.VAE.reparameterize = lambda model, mu, log_var: mu
vae.VAE.forward = forward
train.main()
"""

    def test_two_ranks_are_one_process(self):
        script, together = self.folder / "ranks.py", ["-m", "torch.distributed.run",
                                                      "--nproc_per_node=2"]
        script.write_text(self.RANKS)
        env = {**os.environ, "PYTHONPATH": str(HERE)}
        options = ["--batch-size", 32, "--steps", 20]
        both, one = self.run_folder, self.folder / "one"
        self.command(script, *self.train("vae", *options), 0, launcher=together, env=env)
        self.command(script, *self.train("vae", *options, out=one), 0, env=env)
        for x, y in zip(self.metrics(both), self.metrics(one), strict=True):
            self.assertEqual((x["step"], x["epoch"], x["lr"]), (y["step"], y["epoch"], y["lr"]))
            self.assertClose(float(x["loss"]), float(y["loss"]), rtol=1e-4)
        a, b = (sample.load(folder / "checkpoint.pt")["model"] for folder in (both, one))
        for name in a:
            self.assertClose(a[name], b[name], atol=2e-3)  # half a step; Adam magnifies rounding
        # More steps, by one process again, and then by two of which one gets a signal.
        resume = ["--batch-size", 32, "--resume", "--steps"]
        self.command("train.py", *self.train("vae", *resume, 23))
        output = self.command(script, *self.train("vae", *resume, 90), 4, status=1,
                              launcher=together, env=env)
        self.assertIn("stopped at step 27 of 90", output)
        self.assertIn("torchrun --nproc_per_node=2 train.py", output)
        self.assertEqual(sample.load(both / "checkpoint.pt")["step"], 27)

    def test_lr_share(self):
        for step, share in ((0, 0.2), (4, 0.996), (50, 0.5), (75, 0.1464), (99, 0.0002467)):
            self.assertClose(train.lr_share(step, 100), share, rtol=1e-3)

    def test_ema(self):
        # After step 1 it is the weights; then ema ← d ema + (1 − d) weights, d = step/(step + 10).
        options = self.train("vae", "--batch-size", 256)
        self.command("train.py", *options, "--epochs", 1)
        first = torch.load(self.checkpoint, weights_only=True)
        self.assertSame(first["ema"], first["model"])
        self.command("train.py", *options, "--epochs", 2, "--resume")
        second = torch.load(self.checkpoint, weights_only=True)
        for name, average in second["ema"].items():
            self.assertClose(average, 2 / 12 * first["ema"][name] + 10 / 12 * second["model"][name],
                             rtol=1e-4, atol=1e-7)

    def test_mistakes_with_options(self):
        self.command("train.py", *self.train("vae", "--steps", 1))
        before = {path: path.read_bytes() for path in self.run_folder.iterdir()}
        other, folder = self.folder / "other.pt", self.folder / "folder.png"
        other.write_bytes(self.checkpoint.read_bytes())
        folder.mkdir()
        new, ddpm, vae = self.folder / "new", ["--model", "ddpm"], ["--model", "vae"]
        for option, model, *wrong in (
                ("--epochs", vae, 0, -1, "nan", 1.5, 10**30),
                ("--steps", vae, 0, -1, "nan", 1.5, 10**30),
                ("--batch-size", vae, 0, -1, "nan", 10**9, 10**30),
                ("--lr", vae, 0, -1, "nan", "inf", 1e30), ("--seed", vae, -1, "nan", 10**30),
                ("--timesteps", ddpm, 0, 1, -1, "nan", 10**30),
                ("--channels", ddpm, 0, -1, 10, "nan", 10**30),
                ("--channels", vae, 0, -1, "nan", 10**30),
                ("--multipliers", ddpm, 0, -1, "nan", 10**30),
                ("--blocks", ddpm, 0, -1, "nan", 10**30),
                ("--attention", ddpm, 5, -1, "nan", 10**30),
                ("--dropout", ddpm, 1, -1, "nan", 1e30),
                ("--latent-dim", vae, 0, -1, "nan", 10**30),
                ("--decoder-std", vae, 0, -1, "nan", "inf", 1e30, "taught"),
                ("--schedule", ddpm, "sine"), ("--predict", ddpm, "x"),
                ("--precision", vae, "fp16"),
                ("--device", vae, "cuda:99", "gpu", "cuda:-1", ""), ("--timesteps", vae, 10)):
            for value in wrong:
                arguments = [*model, "--data", self.data, "--out", new, option, value]
                self.assertMistake("train.py", arguments, option[2:].replace("-", ".*"))
                self.assertFalse(new.exists())
        for expected, arguments in (
                ("parameters do not fit", [*ddpm, "--channels", 10**5 - 4 * 8]),
                ("parameters do not fit", [*ddpm, "--channels", 10**5, "--multipliers", 100,
                                           "--attention", 0, "--blocks", 500]),
                ("divisible by 8", [*ddpm, "--multipliers", 1, 1, 1, 1]),
                ("--no-compile", [*ddpm, "--compile", "--device", "cpu"]),
                ("--steps: not allowed with .*--epochs", [*vae, "--epochs", 1, "--steps", 1]),
                ("--model", []), ("--model", ["--model", "gan"])):
            arguments += ["--data", self.data, "--out", new]
            self.assertMistake("train.py", arguments, expected)
            self.assertFalse(new.exists())

        for expected, arguments in (
                ("--resume.*--out", self.train("vae")),
                ("--lr 0.5.*began with", self.train("vae", "--resume", "--lr", 0.5)),
                ("--latent-dim 5.*began with 4", self.train("vae", "--resume", "--latent-dim", 5)),
                ("--model ddpm.*began with vae", ["--timesteps", 5,
                                                  *self.train("ddpm", "--resume")]),
                ("no such file", self.train("vae", "--resume", out=new)),
                ("Not a directory|File exists", self.train("vae", out=self.data / "t10k-images-idx3"
                                                           "-ubyte" / "run"))):
            self.assertMistake("train.py", arguments, expected)

        for expected, arguments in (
                ("No such file", ["--checkpoint", "nowhere.pt"]),
                ("directory", ["--checkpoint", self.run_folder]),
                ("damaged", ["--checkpoint", self.run_folder / "metrics.csv"]),
                ("is a vae", ["--checkpoint", self.checkpoint, "--steps", 5]),
                ("is a vae", ["--checkpoint", self.checkpoint, "--chain", "x.png"]),
                ("z .* 4 numbers", ["--checkpoint", self.checkpoint, "--latent-grid", "x.png"]),
                *(("-n", ["-n", n]) for n in (0, -1, "nan", 10**30)),
                *(("--steps", ["--steps", n]) for n in (0, -1, "nan")),
                *(("--eta", ["--steps", 5, "--eta", n]) for n in (-1, 1.1, "nan")),
                ("--eta", ["--checkpoint", self.checkpoint, "--eta", 0.5]),
                ("--seed", ["--seed", -1]),
                ("--device", ["--checkpoint", self.checkpoint, "--device", "cuda:99"]),
                ("must end in", ["--checkpoint", self.checkpoint, "--out", "x.jpg"]),
                ("must end in", ["--checkpoint", self.checkpoint, "--chain", "x.gif"]),
                ("--out nowhere.*: No such", ["--checkpoint", self.checkpoint, "--out",
                                              "nowhere/x.png"]),
                ("--out .*: a folder", ["--checkpoint", self.checkpoint, "--out", folder]),
                ("checkpoint's", ["--checkpoint", self.checkpoint, "--out", self.checkpoint]),
                ("file of its own", ["--checkpoint", other, "--out", other]),
                ("--out, --latent-grid: each", ["--checkpoint", self.checkpoint, "--out", "x.png",
                                                "--latent-grid", "./x.png"])):
            self.assertMistake("sample.py", arguments, expected)
        with mock.patch.object(VAE, "sample", side_effect=RuntimeError("can't allocate memory")):
            self.assertMistake("sample.py", ["--checkpoint", self.checkpoint, "--out", "x.png"],
                               "out of memory: a smaller -n")
        for script, arguments in (("sample.py", []), ("train.py", self.train("vae"))):
            errors = self.command(script, *arguments, status=2)
            self.assertRegex(errors, rf"^{script}: error: .*runs?/.*\n$")
        self.assertEqual(before, {path: path.read_bytes() for path in self.run_folder.iterdir()})

    def test_mistakes_with_data(self):
        wrong, new = self.folder / "wrong", self.folder / "new"
        wrong.mkdir()
        images = torch.zeros(40, 28, 28, dtype=torch.uint8)
        training, testing = (wrong / f"{name}-images-idx3-ubyte" for name in ("train", "t10k"))

        def check(expected, data=wrong, model="vae"):
            self.assertMistake("train.py", ["--model", model, "--data", data, "--out", new,
                                            "--batch-size", 16], expected)
            self.assertFalse(new.exists())

        check("no such folder", self.folder / "nowhere")
        check("no such folder", self.data / training.name)
        check("No such file", self.folder / "nowhere.pt")
        check("no IDX file train", wrong)
        write_idx(training, images)
        check("no IDX file t10k", wrong)
        for model, expected, shape in (
                ("vae", "expected images", (40, 784)), ("vae", "nothing in it", (0, 28, 28)),
                ("vae", "nothing in it", (40, 0, 28)), ("vae", "test images", (40, 28, 27)),
                ("vae", "only 3 images", (3, 28, 28)), ("vae", "at least 8", (40, 7, 7)),
                ("ddpm", "1×1.*divisible by 4", (40, 1, 1)),
                ("ddpm", "30×30.*divisible by 4", (40, 30, 30))):
            write_idx(training, torch.zeros(shape, dtype=torch.uint8))
            if expected != "test images":
                write_idx(testing, torch.zeros(shape, dtype=torch.uint8))
            else:
                write_idx(testing, images)
            check(expected, model=model)
        write_idx(training, images)
        whole = training.read_bytes()
        for content, expected in ((whole[:-1], "header says"), (whole + b"x", "more follow"),
                                  (whole[:9], "damaged"), (b"", "damaged"),
                                  (b"\0\0\x0d" + whole[3:], "not an IDX file of bytes"),
                                  (b"text, and more of it", "not an IDX file")):
            training.write_bytes(content)
            check(expected)
        training.unlink()
        training.with_suffix(".gz").write_bytes(gzip.compress(whole)[:-20])
        check("damaged")
        path = self.folder / "x.pt"
        for value, expected in (
                (images, r"got torch.uint8 \(40, 28, 28\)"), ({"images": images}, "got dict"),
                (torch.zeros(40, 1, 28, 28), "torch.float32"), (images[:, None][:1], "at least 2"),
                (torch.zeros(40, 2, 28, 28, dtype=torch.uint8), "C = 1 or 3"),
                (torch.zeros(0, 1, 28, 28, dtype=torch.uint8), "at least 2")):
            torch.save(value, path)
            check(expected, path)
        path.write_text("text")
        check("damaged", path)


@unittest.skipUnless(torch.cuda.is_available(), "needs a CUDA device")
class TestCUDA(CommandTest):
    def test_the_same_numbers_as_on_the_cpu(self):
        ddpm, x = DDPM(UNet(channels=8), (1, 28, 28), T=20), torch.rand(4, 1, 28, 28) * 2 - 1
        t = torch.tensor([1, 2, 10, 20])
        for parameter in ddpm.parameters():
            nn.init.normal_(parameter, std=0.1)
        with torch.no_grad():
            there = ddpm.predict_x0(x, t), *ddpm.q_posterior(x, -x, t)
            ddpm.cuda()
            here = ddpm.predict_x0(x.cuda(), t.cuda()), *ddpm.q_posterior(x.cuda(), -x.cuda(), t)
        for a, b in zip(here, there):
            self.assertEqual(a.device.type, "cuda")
            self.assertClose(a.cpu(), b, rtol=0.02, atol=0.02)

    def test_both_models_end_to_end(self):
        for model in ("vae", "ddpm"):
            out = self.folder / model
            self.command("train.py", *self.train(model, "--epochs", 2, "--device", "cuda",
                                                 "--precision", "auto", out=out))
            self.command("sample.py", "--checkpoint", out / "checkpoint.pt", "--device", "cuda")


if __name__ == "__main__":
    unittest.main()
