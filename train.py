"""Train a model of the tutorial (arXiv 2403.18103) on images.

    python train.py --model vae       section 1
    python train.py --model ddpm      section 2
    torchrun --nproc_per_node=4 train.py --model ddpm      on four devices

Output in runs/<model>/: checkpoint.pt, metrics.csv, and pictures of samples on the way. One loop
serves both models: batch → loss → backward → clip → optimiser → EMA. The paper gives the loss
(§1.3, Thm 1.4; §2.4, "Training Algorithm for DDPM"; §2.5, "Training DDPM using ε̂_θ"; version 3,
January 2025). The rest is what most code of the field does to train a network. Three defaults are
not the paper's: what the U-Net predicts (`DDPM.predict_x0`), how t is drawn (`snr_rate`) and the
U-Net's Fourier features. `--predict noise --t-sampling uniform --fourier` does without them.
"""
import argparse
import contextlib
import functools
import gzip
import math
import os
import shlex
import signal
import struct
import sys
import time
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

# Two warnings of torch that mean nothing here: there is no NumPy, and strides may differ.
warnings.filterwarnings("ignore", "Failed to initialize NumPy")
warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from ddpm import SCHEDULES
from sample import (FORMAT, Parser, autocast, build_model, claim, grid, load, number, one_line,
                    pick_device, plan_model, read_checkpoint, save, say, set_up_process, to_uint8,
                    write_png)
from vae import VAE

# The options that --model brings with it, and their defaults.
DEFAULTS = {
    "ddpm": dict(steps=5600, batch_size=40, lr=3e-3, seed=0, timesteps=1000, schedule="cosine",
                 predict="velocity", t_sampling="snr", channels=16, multipliers=[1, 2, 4],
                 blocks=1, attention=[], dropout=0.0, fourier=[3, 5]),
    "vae": dict(epochs=10, batch_size=128, lr=4e-3, seed=0, latent_dim=8, decoder_std=0.6,
                channels=16),
}
# The other options of both models, and their defaults: only these may change at --resume.
CHANGEABLE = dict(data="data/mnist", epochs=None, steps=None, device="auto", precision="auto",
                  compile=False, tensorboard=False)
# The test ELBO at the end: the number of images, and the options of the model's `elbo`.
EVALUATION = {"ddpm": (256, {"k": 20}), "vae": (10_000, {})}
COLUMNS = ("step", "epoch", "loss", "lr", "images_per_second", "seconds")
ROW = 10  # steps between two rows of metrics.csv
PICTURES = 20  # times in a run that samples are drawn, at most
UNSAVED = 300  # seconds of training that a crash may cost
WARM_UP = 0.05  # of the run
EMA_DECAY = 0.9999
CLIP = 1.0  # norm of the gradient
REMEDY = "a new run with a lower --lr, or --precision fp32, may help"
# torchrun starts one process, a rank, for each device, and tells it this. The ranks share every
# batch, only rank 0 writes, and DistributedDataParallel keeps their weights equal.
RANKS = max(1, int(os.environ.get("WORLD_SIZE") or 1))
RANK = int(os.environ.get("RANK") or 0) if RANKS > 1 else 0


# ------------------------------------------------------------------------------ training


def train(config: dict, state: dict | None, model: nn.Module, images: Tensor, test: Tensor,
          device: torch.device, log: "Log") -> tuple[nn.Module, int]:
    """Train the model as configured, from the start or from a checkpoint's state: returns its EMA,
    and the number of the signal that stopped it, or 0.

    images, test: uint8 (N, C, H, W). Raises OSError if a file can't be written, and
    FloatingPointError before a row or a checkpoint would hold a nan or inf.
    """
    # 0.99: the second moment is a mean over 100 steps, not 1,000, of a few thousand in all.
    optimizer = torch.optim.Adam(model.parameters(), config["lr"], betas=(0.9, 0.99), fused=True)
    ema = AveragedModel(model).eval()
    step = 0
    if state:
        model.load_state_dict(state["model"])
        ema.module.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
        ema.n_averaged.fill_(step)  # at 0 the next update would copy the weights
    schedule = LambdaLR(optimizer, lambda step: lr_share(step, log.total), last_epoch=step - 1)
    cast = autocast(device, config["precision"])
    if config["compile"]:
        compile_networks(model, next_batch(images, config, step, device), cast)
    # Here the ranks wait for one another: no row, no checkpoint before all have read their data.
    network = DistributedDataParallel(model) if RANKS > 1 else model

    stop = 0  # or the number of a signal
    with log, caught_signals() as signals:
        # From here on there is a checkpoint to go on from, with the options of now.
        log.checkpoint(step, model, ema, optimizer)
        while step < log.total and not stop:
            x = next_batch(images, config, step, device)
            with cast:
                loss = network(x)  # DDPM.loss or VAE.loss
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            lr, = schedule.get_last_lr()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            step += 1
            ema.multi_avg_fn = get_ema_multi_avg_fn(ema_decay(step))
            ema.update_parameters(model)

            stop = signal_of_any_rank(signals)
            log.add(loss.detach())
            if step % ROW == 0 or step == log.total:
                log.row(step, lr)
            draw = step % log.interval == 0 or step == log.total
            if draw or stop or log.seconds() - log.saved > UNSAVED:
                log.checkpoint(step, model, ema, optimizer)
            if draw:
                with cast:
                    log.pictures(step, ema.module, to_float(test[:32], device))
    return ema.module, stop or max(signals, default=0)  # one may have come with the last pictures


# ------------------------------------------------------------------------------ for the loop


def lr_share(step: int, total: int) -> float:
    """The share of --lr at this step: half a cosine from 1 down to 0, times a linear warm-up."""
    return min(1, (step + 1) / (WARM_UP * total)) * 0.5 * (1 + math.cos(math.pi * step / total))


def ema_decay(step: int) -> float:
    """The decay of the EMA, the moving average of the weights, which jitter around it from step to
    step: samples are drawn with the average (as in arXiv 2006.11239). Up to step 100,000 it reaches
    back over a tenth of the run so far, and so soon forgets the random start."""
    return min(EMA_DECAY, step / (step + 10))


def next_batch(images: Tensor, config: dict, step: int, device: torch.device) -> Tensor:
    """This rank's share of the step's batch, in [-1, 1], on the device. Also seeds the step.

    Every random number is a function of the seed and of where in the run it is drawn: a resumed
    run draws what the uninterrupted one would have drawn.
    """
    seed, batch_size = config["seed"], config["batch_size"]
    epoch, i = divmod(step, len(images) // batch_size)
    torch.manual_seed(hash((seed, epoch, i * RANKS + RANK)))  # of integers: always the same
    order = shuffled(len(images), hash((seed, epoch)), images.device)
    share = order[i * batch_size:(i + 1) * batch_size].chunk(RANKS)[RANK]
    return to_float(images[share], device)


@functools.lru_cache(maxsize=1)  # one epoch's
def shuffled(n: int, seed: int, device: torch.device) -> Tensor:
    """0, …, n − 1 in a random order."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed)).to(device)


def to_float(images: Tensor, device: torch.device) -> Tensor:
    """0..255 to [-1, 1], on the device."""
    return images.to(device, non_blocking=True).float() / 127.5 - 1


@contextlib.contextmanager
def caught_signals() -> Iterator[list[int]]:
    """A list that SIGINT, SIGTERM and SIGHUP (a closed terminal) are added to, unless they are
    ignored anyway (nohup). The same signal once more stops at once."""
    signals, names = [], ("SIGINT", "SIGTERM", "SIGHUP")  # Windows lacks the last

    def on_signal(signum, frame):
        signals.append(signum)
        signal.signal(signum, signal.SIG_DFL)

    before = {signum: signal.signal(signum, on_signal) for signum in signal.Signals
              if signum.name in names and signal.getsignal(signum) != signal.SIG_IGN}
    try:
        yield signals
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def signal_of_any_rank(signals: list[int]) -> int:
    """One signal stops all ranks, after the same step."""
    signum = torch.tensor(max(signals, default=0), device="cpu")
    if RANKS > 1:
        distributed.all_reduce(signum, distributed.ReduceOp.MAX)
    return signum.item()


def compile_networks(model: nn.Module, x: Tensor, cast: contextlib.AbstractContextManager):
    """torch.compile the networks. The work is done when they first run: in a step on x, whose
    gradient is thrown away."""
    then = time.perf_counter()
    for child in model.children():
        child.compile()
    with cast:
        loss = model(x)
    loss.backward()
    model.zero_grad()
    if RANK == 0:
        say(f"compiled in {time.perf_counter() - then:.0f} s")


@torch.no_grad()
def draw_pictures(model: nn.Module, x: Tensor, seed: int) -> dict[str, Tensor]:
    """By name: 64 samples, from the same noise every time (of a DDPM in 50 steps of DDIM), and for
    a VAE reconstructions beside the originals x."""
    generator = torch.Generator(x.device).manual_seed(seed)
    if not isinstance(model, VAE):
        return {"samples": model.sample(64, steps=min(50, model.T), generator=generator)}
    mu, _ = model.encode(x)
    pairs = torch.stack([x, model.decode(mu)], dim=1)
    return {"samples": model.sample(64, generator), "reconstructions": pairs.flatten(0, 1)}


@torch.no_grad()
def evaluate(model: nn.Module, images: Tensor, batch_size: int, device: torch.device,
             options: dict) -> tuple[float, float]:
    """The ELBO in nats per image and in bits/dim: means over the images. In float32.

    The ELBO of either model is its reconstruction, less every other term.
    """
    elbo = bits = 0.0
    for batch in images.split(batch_size):
        x = to_float(batch, device)
        terms = model.elbo(x, **options)
        costs = sum(term for name, term in terms.items() if name != "reconstruction")
        elbo += (terms["reconstruction"] - costs).sum().item() / len(images)
        bits += model.bits_per_dim(x, terms).sum().item() / len(images)
    return elbo, bits


# ------------------------------------------------------------------------------ what a run leaves


class Log:
    """What a run shows and leaves: the progress bar, metrics.csv, checkpoints, pictures and, on
    request, rows and pictures for TensorBoard. Its clock stands still while it saves or draws.

    metrics: metrics.csv, open and locked: two runs in one folder would mix their rows and replace
    each other's checkpoints. Only rank 0 has it, and so only rank 0 writes.
    """

    def __init__(self, config: dict, state: dict | None, out: Path, metrics: BinaryIO | None,
                 device: torch.device):
        self.config, self.out, self.metrics, self.board = config, out, metrics, None
        self.batch_size = config["batch_size"]
        self.steps_per_epoch = config["images"] // self.batch_size
        self.total = config["steps"] or config["epochs"] * self.steps_per_epoch
        # Pictures are drawn every so many steps: after an epoch, or after several.
        self.interval = self.steps_per_epoch * math.ceil(
            self.total / self.steps_per_epoch / PICTURES)
        state = state or {"step": 0, "seconds": 0.0, "losses": []}
        self.step, self.saved = state["step"], state["seconds"]  # of the last checkpoint
        self.row_step, self.row_seconds = self.step, self.saved  # of the last row, or of resuming
        self.losses = list(torch.tensor(state["losses"], device=device))  # since the last row

    def __enter__(self):
        if self.metrics:
            trim(self.metrics, self.step)
            for half_written in self.out.glob("checkpoint.pt.*.tmp"):  # as a crash leaves it
                half_written.unlink()
            if self.config["tensorboard"]:
                from torch.utils.tensorboard import SummaryWriter
                self.board = SummaryWriter(self.out, purge_step=self.step + 1)
        self.start = time.perf_counter() - self.saved
        self.bar = tqdm(total=self.total * self.batch_size, initial=self.step * self.batch_size,
                        unit=" images", unit_scale=True, disable=RANK > 0)

    def __exit__(self, *exception):
        self.bar.close()
        for file in (self.metrics, self.board):
            if file:
                file.close()

    def seconds(self) -> float:
        """Of training, so far."""
        return time.perf_counter() - self.start

    def add(self, loss: Tensor):
        """A step's loss, averaged over the ranks: each has that of its share."""
        if RANKS > 1:
            distributed.all_reduce(loss.div_(RANKS))
        self.losses.append(loss)
        self.bar.update(self.batch_size)

    def row(self, step: int, lr: float):
        """The mean loss since the last row. Here the host waits for the device."""
        mean = torch.stack(self.losses).mean().item()
        if not math.isfinite(mean):
            raise FloatingPointError(f"step {step:,}: since the last row the mean loss is {mean}; "
                                     f"{REMEDY}")
        self.losses.clear()
        seconds = self.seconds()
        rate = (step - self.row_step) * self.batch_size / (seconds - self.row_seconds)
        self.row_step, self.row_seconds = step, seconds
        self.bar.set_postfix(loss=f"{mean:.4f}")
        if self.metrics:  # row by row: it can be watched
            self.metrics.write(f"{step},{step / self.steps_per_epoch:.4f},{mean},{lr},{rate:.1f},"
                               f"{seconds:.3f}\n".encode())
        if self.board:
            for name, value in (("loss", mean), ("lr", lr), ("images_per_second", rate)):
                self.board.add_scalar(name, value, step)

    def checkpoint(self, step: int, model: nn.Module, ema: AveragedModel,
                   optimizer: torch.optim.Optimizer):
        """What --resume and sample.py need. The loss may still be finite where its gradient, and
        with it the weights, no longer are: they must not replace good ones."""
        finite = [x.isfinite().all() for x in (*model.parameters(), *self.losses)]
        if not torch.stack(finite).all():  # waits for the device: the step is over
            raise FloatingPointError(f"step {step:,}: weights or losses are nan or inf; {REMEDY}")
        self.step, self.saved = step, self.seconds()
        if self.metrics:
            save(self.out / "checkpoint.pt", {
                "format": FORMAT, "config": self.config, "step": step, "seconds": self.saved,
                "losses": [loss.item() for loss in self.losses], "model": model.state_dict(),
                "ema": ema.module.state_dict(), "optimizer": optimizer.state_dict()})
        self.start = time.perf_counter() - self.saved  # the clock stood still

    def pictures(self, step: int, model: nn.Module, x: Tensor):
        """A PNG for each of `draw_pictures`."""
        seconds = self.seconds()
        drawn = draw_pictures(model, x, self.config["seed"]) if self.metrics else {}
        for name, images in drawn.items():
            picture = grid(to_uint8(images))
            write_png(self.out / f"{name}_{step:06d}.png", [picture])
            if self.board:
                self.board.add_image(name, picture, step)
        self.start = time.perf_counter() - seconds  # the clock stood still


def trim(file: BinaryIO, step: int):
    """Leave metrics.csv with its head and the rows up to this step. Rows after the last checkpoint
    are cut off: those steps will be taken again."""
    size = 0
    file.seek(0)
    for row in file.read().splitlines(keepends=True):
        first = row.partition(b",")[0]
        if not row.endswith(b"\n") or (first.isdigit() and int(first) > step):
            break
        size += len(row)
    file.truncate(size)
    if not size:
        file.write((",".join(COLUMNS) + "\n").encode())


# ------------------------------------------------------------------------------ data


def read_idx(path: Path) -> Tensor:
    """An IDX file of bytes, gzipped or not, as a uint8 tensor. OSError or ValueError otherwise."""
    data = bytearray()
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            # Two zero bytes, 8 for uint8, the number of dimensions; then each dimension's size.
            magic, ndim = struct.unpack(">3sB", file.read(4))
            shape = struct.unpack(f">{ndim}I", file.read(4 * ndim))
            size = math.prod(shape)
            while len(data) <= size and (chunk := file.read(2**20)):  # a header may lie
                data += chunk
    except (EOFError, gzip.BadGzipFile, zlib.error, struct.error) as error:
        raise ValueError(f"{path}: not an IDX file, or a damaged one ({error})") from error
    if magic != b"\0\0\x08":
        raise ValueError(f"{path}: not an IDX file of bytes")
    if not size:
        raise ValueError(f"{path}: nothing in it, the header says {shape}")
    if len(data) != size:
        raise ValueError(f"{path}: the header says {shape}, that is {size} bytes, but "
                         f"{'more' if len(data) > size else len(data)} follow")
    return torch.frombuffer(data, dtype=torch.uint8).view(shape)


def load_idx_images(folder: Path, name: str) -> Tensor:
    """The images of folder/name or folder/name.gz: uint8 (N, 1, H, W)."""
    for path in (folder / name, folder / f"{name}.gz"):
        if path.exists():
            images = read_idx(path)
            if images.ndim != 3:
                raise ValueError(f"{path}: expected images (N, H, W), got {tuple(images.shape)}")
            return images[:, None]
    raise ValueError(f"{folder}: no IDX file {name} or {name}.gz")


def load_images(data: Path) -> tuple[Tensor, Tensor]:
    """Training and test images, uint8 (N, C, H, W) with C = 1 or 3, from a folder like MNIST's or
    from a .pt file with one such tensor, of which every 32nd image is held out for testing."""
    if data.suffix == ".pt":
        images = load(data)
        shape = tuple(getattr(images, "shape", ()))
        kind = getattr(images, "dtype", type(images).__name__)
        if (kind != torch.uint8 or len(shape) != 4 or 0 in shape or shape[0] < 2
                or shape[1] not in (1, 3)):
            raise ValueError(f"{data}: expected a uint8 tensor (N, C, H, W) with C = 1 or 3 and N "
                             f"at least 2, got {kind} {shape}")
        held_out = torch.arange(len(images)) % 32 == 0
        return images[~held_out], images[held_out]
    if not data.is_dir():
        raise ValueError(f"{data}: no such folder; --data takes a folder of IDX files, like "
                         "data/mnist, or a .pt file")
    images = load_idx_images(data, "train-images-idx3-ubyte")
    test = load_idx_images(data, "t10k-images-idx3-ubyte")
    if images.shape[1:] != test.shape[1:]:
        raise ValueError(f"{data}: training images {tuple(images.shape)}, but test images "
                         f"{tuple(test.shape)}")
    return images, test


# ------------------------------------------------------------------------------ options


def parse_args(argv: list[str] | None) -> tuple[Parser, dict]:
    """The parser, and the options that were given, by name."""
    parser = Parser(prog="train.py", description="Train a model of the tutorial on images.",
                    argument_default=argparse.SUPPRESS)

    def add(name: str, help: str, group=parser, **kwargs):
        key = name[2:].replace("-", "_")
        defaults = {model: options[key] for model, options in DEFAULTS.items() if key in options}
        if defaults:
            texts = {model: " ".join(map(str, value)) if isinstance(value, list) else str(value)
                     for model, value in defaults.items()}
            help += " (default: " + ", ".join(
                f"{text or 'none'} for {model}" for model, text in texts.items()) + ")"
        elif CHANGEABLE.get(key):
            help += f" (default: {CHANGEABLE[key]})"
        group.add_argument(name, help=help, **kwargs)

    def std(text: str) -> float | str:
        return text if text == "learned" else number(float, 1e-6, 1e6)(text)

    count, width = number(int, 1, 10**9), number(int, 1, 10**5)
    add("--model", "what to train", choices=list(DEFAULTS), required=True)
    add("--data", "folder of IDX files, named and gzipped (or not) as MNIST's, or a .pt file of a "
        "uint8 tensor (N, C, H, W)")
    add("--out", "folder for the results (default: runs/<model>)", type=Path)
    length = parser.add_mutually_exclusive_group()
    add("--epochs", "passes over the data", length, type=count)
    add("--steps", "optimiser steps, instead of --epochs", length, type=count)
    add("--batch-size", "images in a step, of all devices together", type=count)
    add("--lr", "peak learning rate", type=number(float, 1e-9, 1))
    add("--seed", "of every random number", type=number(int, 0, 2**63 - 1))
    add("--device", "auto, cpu, cuda, cuda:N or mps")
    add("--precision", "auto is bf16 autocast on hardware that has bf16",
        choices=["auto", "fp32", "bf16"])
    add("--compile", "torch.compile the networks, in a minute or two: for long runs on a GPU",
        action=argparse.BooleanOptionalAction)
    add("--tensorboard", "also write metrics and pictures for TensorBoard, where its package is "
        "installed", action=argparse.BooleanOptionalAction)
    add("--resume", "go on with the run in --out", action="store_true")
    add("--timesteps", "length T of the chain", type=number(int, 2, 10**6))
    add("--schedule", "of alpha_t", choices=list(SCHEDULES))
    add("--predict", "what the U-Net predicts: noise and image are the paper's",
        choices=["noise", "image", "velocity"])
    add("--t-sampling", "how training draws t: uniform is the paper's", choices=["uniform", "snr"])
    add("--channels", "width of the network's first layer", type=width)
    add("--multipliers", "width of each level over --channels", type=number(int, 1, 100),
        nargs="+", metavar="M")
    add("--blocks", "residual blocks a level", type=number(int, 1, 1000))
    add("--attention", "levels with attention; 0 is full resolution. The middle always has it",
        nargs="*", metavar="LEVEL", type=number(int, 0, 10**9))
    add("--dropout", "in the residual blocks", type=number(float, 0, 0.999))
    add("--fourier", "the network also sees sin and cos of 2^n pi x for each n", nargs="*",
        metavar="n", type=number(int, 0, 8))
    add("--latent-dim", "length of z", type=width)
    add("--decoder-std", "sigma of p(x|z), for pixels in [-1, 1], or the word learned",
        type=std)
    return parser, vars(parser.parse_args(argv))


def configure(options: dict, saved: dict | None) -> dict:
    """What defines a run and is kept in its checkpoint: these options over the model's defaults, or
    over those of the saved run, of which only some may change. Raises ValueError."""
    options = {"model": options["model"], **options}  # first: the others depend on it
    defaults = {"model": options["model"], **CHANGEABLE, **DEFAULTS[options["model"]]}
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        if name not in defaults:
            raise ValueError(f"{flag} is not an option of --model {options['model']}")
        if saved and name not in CHANGEABLE and value != saved[name]:
            raise ValueError(f"{flag} {value}: this run began with {saved[name]}, and only "
                             f"--{', --'.join(CHANGEABLE)} may change")
    if "epochs" in options or "steps" in options:  # one replaces the other
        options = {"epochs": None, "steps": None, **options}
    return {**(saved or defaults), **options}


# ------------------------------------------------------------------------------ command line


def prepare(options: dict) -> tuple:
    """The arguments of `train`. All that can be refused is refused here, by ValueError or OSError,
    before a file changes; at most there is a new, empty metrics.csv."""
    out, resume = options.pop("out", Path("runs", options["model"])), options.pop("resume", False)
    checkpoint, metrics, state = out / "checkpoint.pt", None, None
    if checkpoint.exists() and not resume:
        raise ValueError(f"{checkpoint} exists: --resume goes on with that run, and --out with "
                         "another folder starts a new one")
    if resume:
        if not checkpoint.exists():
            raise ValueError(f"{checkpoint}: no such file to --resume from")
        if RANK == 0:  # locked before it is read: so it stays the newest checkpoint
            metrics = claim(out / "metrics.csv")
        state = read_checkpoint(checkpoint)
        if missing := {"step", "seconds", "losses", "optimizer"} - state.keys():
            raise ValueError(f"{checkpoint}: enough to sample from, but --resume needs "
                             f"{', '.join(sorted(missing))}, too")
    config = configure(options, state and state["config"])
    device = pick_device(config["device"])
    if config["compile"] and device.type == "cpu":
        raise ValueError("--compile is for a GPU: on the CPU gradients in bfloat16 came out as "
                         "0; --no-compile does without")
    if RANKS > 1 and device.type == "cuda":
        device = pick_device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}")
        torch.cuda.set_device(device)
    images, test = load_images(Path(config["data"]))
    if config["batch_size"] > len(images):
        raise ValueError(f"--batch-size {config['batch_size']}: {config['data']} has only "
                         f"{len(images)} images")
    if config["batch_size"] % RANKS:
        raise ValueError(f"--batch-size {config['batch_size']}: not divisible among {RANKS} "
                         "processes")
    shape = {"images": len(images), "image_shape": list(images.shape[1:])}
    if state and not shape.items() <= config.items():
        raise ValueError(f"--data {config['data']}: {len(images)} images {shape['image_shape']}, "
                         f"but this run began with {config['images']} of {config['image_shape']}")
    config.update(shape)
    size = sum(parameter.numel() for parameter in plan_model(config).parameters())
    torch.manual_seed(config["seed"])
    try:
        torch.empty(5 * size, device=device)  # weights, gradient, Adam's two moments, EMA
        model = build_model(config).to(device)
    except (RuntimeError, TypeError):  # TypeError: more bytes than a number can count
        raise ValueError(f"{size:,} parameters do not fit into {device}'s memory") from None
    if device.type == "cuda" and images.numel() < torch.cuda.mem_get_info(device)[0] / 2:
        images = images.to(device)  # a batch then never crosses the bus
    if config["tensorboard"]:
        try:
            from torch.utils.tensorboard import SummaryWriter  # noqa: F401
        except ImportError:
            raise ValueError("--tensorboard: pip install tensorboard first; --no-tensorboard does "
                             "without") from None
    if RANKS > 1:
        # DistributedDataParallel imports this, too, but later. Its functions take the process group
        # of the moment for a default argument; if that is ours, it outlives its destruction, and
        # gloo's threads can abort the exit.
        from torch.distributed.nn import functional  # noqa: F401
        distributed.init_process_group()  # nccl for CUDA tensors, gloo for the CPU's
    if RANK == 0:
        out.mkdir(parents=True, exist_ok=True)
        metrics = metrics or claim(out / "metrics.csv")
        if checkpoint.exists() and not resume:
            raise ValueError(f"{checkpoint}: another process has just written it")
        say(f"{config['model']}: {size:,} parameters, {len(images):,} images of "
            f"{'×'.join(map(str, config['image_shape']))}, on {device}"
            + (f" and {RANKS - 1} more" if RANKS > 1 else ""))
    log = Log(config, state, out, metrics, device)
    if RANK == 0 and state and state["step"] >= log.total:
        say(f"already at step {state['step']:,} of {log.total:,}: nothing left to train")
    return config, state, model, images, test, device, log


def main(argv: list[str] | None = None):
    set_up_process()
    parser, options = parse_args(argv)
    memory = "a smaller --batch-size takes less"
    with one_line(parser, (ValueError, OSError), memory):
        config, state, model, images, test, device, log = prepare(options)
    try:
        with one_line(parser, (FloatingPointError, OSError), memory,
                      "; --resume goes on from the last checkpoint"):
            ema, stop = train(config, state, model, images, test, device, log)
    finally:
        if RANKS > 1:
            distributed.destroy_process_group()
    if RANK == 0 and stop:
        launcher = ("python" if RANKS == 1 else
                    f"torchrun --nproc_per_node={os.environ.get('LOCAL_WORLD_SIZE', RANKS)}")
        say(f"stopped at step {log.step:,} of {log.total:,}; to go on: {launcher} train.py "
            f"--model {config['model']} --out {shlex.quote(str(log.out))} --resume")
    elif RANK == 0:
        n, elbo_options = EVALUATION[config["model"]]
        torch.manual_seed(config["seed"])
        with one_line(parser, (), memory):
            elbo, bits = evaluate(ema, test[:n], config["batch_size"] // RANKS, device,
                                  elbo_options)
        say(f"test ELBO {elbo:.1f} nats, {bits:.3f} bits/dim ({len(test[:n]):,} images"
            + "".join(f", {name} = {value}" for name, value in elbo_options.items())
            + f"); {log.row_step * log.batch_size / log.row_seconds:.0f} images/s; to sample: "
            f"python sample.py --checkpoint {shlex.quote(str(log.out / 'checkpoint.pt'))}")
    if stop:
        sys.exit(128 + stop)


if __name__ == "__main__":
    main()
