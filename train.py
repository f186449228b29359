"""Train a model of the tutorial (arXiv 2403.18103) on images.

    python train.py --model vae       section 1
    python train.py --model ddpm      section 2
    torchrun --nproc_per_node=4 train.py --model ddpm      on four devices

Output in runs/<model>/: checkpoint.pt, metrics.csv, result.txt, and sample pictures on the way.
The file in order: the default options; `gradient_steps`, the training loop; `train`, which adds
logging, pictures and checkpoints; their helpers; a run's files; the data; the command line.

The paper gives the loss (§1.3, Thm 1.4; §2.4, "Training Algorithm for DDPM"; §2.5, "Training DDPM
using ε̂_θ"; version 3, January 2025). The rest is common practice.
"""
import argparse
import contextlib
import copy
import functools
import gzip
import math
import os
import re
import shlex
import signal
import struct
import sys
import time
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

warnings.filterwarnings("ignore", "Failed to initialize NumPy")  # torch works without it

import torch
from torch import Tensor, distributed, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from tqdm import tqdm

from ddpm import DDPM
from sample import (FORMAT, SCHEDULES, Parser, autocast, build_model, draw_noise, grid, load,
                    number, pick_device, read_checkpoint, run, save, to_float, to_uint8, write_png)


# ---------------------------------------------------------------- default options

# The defaults of the options: of every run, and of each recipe.
COMMON = {"data": None, "epochs": None, "device": "auto", "precision": "auto", "seed": 0}
RECIPES = {
    # Two CPU cores take about 11 minutes.
    "ddpm": {"steps": 6800, "batch_size": 40, "lr": 4e-3,
             "timesteps": 1000, "schedule": "cauchy", "predict": "noise",  # the chain
             "channels": 16, "multipliers": [1, 1, 4], "blocks": 1,        # its network
             "attention": [], "dropout": 0.0, "fourier": [3, 5]},
    # Under two minutes on a large GPU. Everything else as above.
    "ddpm on CUDA": {"steps": 4000, "batch_size": 256, "lr": 1e-3,
                     "channels": 64, "multipliers": [1, 2, 4]},
    "vae": {"steps": 4680, "batch_size": 128, "lr": 4e-3,  # two minutes on two CPU cores
            "latent_dim": 8, "decoder_std": 0.6, "channels": 16},
}
COUNT = number(int, 1, 2**31)
OPTIONS = [  # name, values, meaning
    ("data", str, "folder of IDX files like data/mnist (default), or .pt of uint8 (N, C, H, W)"),
    ("steps", COUNT, "gradient steps"),
    ("epochs", COUNT, "passes over the data, instead of --steps"),
    ("device", str, "cpu, cuda, cuda:N, mps, or auto (default): CUDA if available, else CPU"),
    ("precision", ["auto", "fp32", "bf16"],
     "auto (default): bf16 if a GPU or an x86 CPU has it (CPU: torch 2.11+)"),
    ("seed", number(int, 0, 2**63 - 1), "random seed (default: 0)"),
    ("batch_size", COUNT, "images per step, summed over all devices"),
    ("lr", number(float, 1e-9, 1), "learning rate before warm-up and cosine"),
    ("timesteps", number(int, 2, 10**6), "length T of the chain"),
    ("schedule", list(SCHEDULES), "noise schedule (the alpha_t)"),
    ("predict", ["noise", "image"], "what the network predicts (sections 2.5 and 2.4)"),
    ("channels", COUNT, "width of the network's first layer (ddpm: a multiple of 4)"),
    ("multipliers", COUNT, "width of each level, in multiples of --channels"),
    ("blocks", COUNT, "residual blocks per level"),
    ("attention", number(int, 0), "levels with attention (0: full resolution), besides the middle"),
    ("dropout", number(float, 0, 0.999), "in the residual blocks"),
    ("fourier", number(int, 0, 8), "values of n: the network also gets sin and cos of 2^n pi x"),
    ("latent_dim", COUNT, "length of z"),
    ("decoder_std", number(float, 1e-6, 1e6, "learned"), "sigma of p(x|z): a number or 'learned'"),
]
CHANGEABLE = ["data", "epochs", "steps", "device", "precision"]  # only these, with --resume
# The test ELBO at the end: the number of images, and the options of the model's `bits_per_dim`.
EVALUATION = {"ddpm": (1024, {"k": 5}), "vae": (10_000, {})}
WARM_UP = 0.05  # fraction of the run
MAX_GRADIENT_NORM = 1.0
EMA_DECAY = 0.9999
ROW_EVERY = 10  # steps
MAX_PICTURES = 20  # rounds of sample pictures in a run
SAVE_EVERY = 300  # seconds
# torchrun starts one process (rank) per device and sets these variables. The ranks share every
# batch; their weights start and stay equal, since all apply the same gradient.
RANKS, RANK = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))


# ---------------------------------------------------------------- training


def gradient_steps(model: nn.Module, ema: nn.Module, optimizer: torch.optim.Optimizer,
                   data: Iterable[tuple[int, Tensor]],
                   config: dict) -> Iterator[tuple[int, Tensor, float]]:
    """For each (step number, x_0 in [-1, 1]) of data, takes a gradient step, updates ema (the
    moving average of the weights), then yields (step number, loss, learning rate)."""
    weights = list(model.parameters())
    cast = autocast(weights[0].device, config["precision"])
    for step, x_0 in data:  # (The README, "As a library", has the bare loop.)
        model.zero_grad()
        with cast:
            loss = model(x_0)  # DDPM.loss or VAE.loss
        loss.backward()
        average_over_ranks([w.grad for w in weights])
        nn.utils.clip_grad_norm_(weights, MAX_GRADIENT_NORM)
        lr = config["lr"] * lr_fraction(step - 1, config["steps"])
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        update = get_ema_multi_avg_fn(ema_decay(step))  # ema ← d · ema + (1 − d) · weights
        update(list(ema.parameters()), weights, None)
        yield step, loss.detach(), lr


def train(config: dict, state: dict | None, model: nn.Module, images: Tensor, test: Tensor,
          device: torch.device, out: Path) -> tuple[nn.Module, int, int]:
    """Train the model as configured, from the start or from a checkpoint's state: returns its EMA
    (exponential moving average), the steps taken and the signal that stopped it (or 0).

    config: the options by name, "model", "images" (how many) and "image_shape". images, test: uint8
    (N, C, H, W). Raises OSError if a checkpoint can't be written, and FloatingPointError before a
    row or a checkpoint would hold a nan or inf.
    """
    # β₂ = 0.99: the usual 0.999 averages over 1,000 steps, too slow for runs of a few thousand.
    optimizer = torch.optim.Adam(model.parameters(), config["lr"], betas=(0.9, 0.99), fused=True)
    ema, step, seconds = copy.deepcopy(model).eval(), 0, 0.0
    total, batch_size = config["steps"], config["batch_size"]

    # Resuming: all that a step depends on comes from the checkpoint, or follows from the step.
    if state:
        model.load_state_dict(state["model"])
        ema.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        step, seconds = state["step"], state["seconds"]
        say(f"resuming at step {step:,} of {total:,}, learning rate "
            f"{config['lr'] * lr_fraction(step, total):.1e}")

    # On an NVIDIA GPU, record the DDPM's network once as CUDA graphs: its thousand kernels become
    # two launches, forwards and backwards. (On AMD's, recording a backward pass can hang.)
    if isinstance(model, DDPM) and device.type == "cuda" and torch.version.cuda:
        x_t = to_float(images[:batch_size // RANKS], device)
        t = torch.ones(len(x_t), dtype=torch.long, device=device)
        with autocast(device, config["precision"]):
            torch.cuda.make_graphed_callables(model.denoiser, (x_t, t))

    # Pictures are drawn every `interval` steps, a whole number of epochs.
    steps_per_epoch = config["images"] // batch_size
    interval = steps_per_epoch * math.ceil(total / steps_per_epoch / MAX_PICTURES)
    start, losses, signum = time.perf_counter() - seconds, [], 0
    bar = tqdm(total=total * batch_size, initial=step * batch_size, unit=" images",
               unit_scale=True, disable=RANK > 0)

    def checkpoint(last: float | None) -> float:
        """Saves what --resume and sample.py need. last: when the run was last saved, if it was."""
        check_finite(step, *model.parameters())  # a finite loss can have a nan or inf gradient
        path, now = out / "checkpoint.pt", time.perf_counter() - start
        if RANK == 0:
            with contextlib.suppress(ValueError):  # a damaged one is replaced
                if last is not None and path.exists() and load(path).get("seconds") != last:
                    raise OSError("another process has written it, so this one ends")
            save(path, {"format": FORMAT, "config": config, "step": step, "seconds": now,
                        "model": model.state_dict(), "ema": ema.state_dict(),
                        "optimizer": optimizer.state_dict()}, replace=last is not None)
        return now

    with bar, caught_signals() as signals:
        # At once, so that --resume always finds one, and no second run can start here.
        saved = checkpoint(seconds if state else None)
        begin_metrics(out / "metrics.csv", step)
        data = batches(images, config, step, device)
        for step, loss, lr in gradient_steps(model, ema, optimizer, data, config):
            losses.append(loss)
            bar.update(batch_size)

            # A row: the mean loss since the last one. Only here does the CPU wait for the device.
            if step % ROW_EVERY == 0 or step == total:
                mean = torch.stack(losses).mean()
                losses.clear()
                average_over_ranks([mean])
                check_finite(step, mean)
                bar.set_postfix({"loss": f"{mean.item():.4f}"}, refresh=False)
                seconds = time.perf_counter() - start
                write(out / "metrics.csv", step, f"{step / steps_per_epoch:.4f}", mean.item(), lr,
                      f"{step * batch_size / seconds:.1f}", f"{seconds:.3f}")

            # Pictures of what the moving average has learned so far, and the first test images.
            picture_due = step % interval == 0 or step == total
            if picture_due:
                write_pictures(out, step, ema, to_float(spread(test, 32), device), config)

            # A checkpoint after pictures, every five minutes, and before a signal ends the run.
            signum = signal_of_any_rank(signals)
            if picture_due or signum or time.perf_counter() - start - saved > SAVE_EVERY:
                saved = checkpoint(saved)
            if signum:
                break
    return ema, step, signum


# ---------------------------------------------------------------- helpers of the training loop


def lr_fraction(step: int, total: int) -> float:
    """The fraction of --lr used at this step: half a cosine from 1 to 0, times a linear warm-up."""
    return min(1, (step + 1) / (WARM_UP * total)) * 0.5 * (1 + math.cos(math.pi * step / total))


def ema_decay(step: int) -> float:
    """Samples come from the weights' moving average (as in arXiv 2006.11239). Up to step 100,000 it
    covers about the last tenth of the steps, so the random start is soon forgotten."""
    return min(EMA_DECAY, step / (step + 10))


def batches(images: Tensor, config: dict, step: int,
            device: torch.device) -> Iterator[tuple[int, Tensor]]:
    """Yields (step number, this rank's share of the batch, in [-1, 1], on the device) for all steps
    after `step`. The order of the images and the random seed of each step depend only on --seed
    and the position in the run (integers hash alike in every process), so a resumed run draws what
    an uninterrupted one would have drawn."""
    seed, B = config["seed"], config["batch_size"]
    steps_per_epoch = config["images"] // B
    for epoch in range(step // steps_per_epoch, math.ceil(config["steps"] / steps_per_epoch)):
        generator = torch.Generator().manual_seed(hash((seed, epoch)))
        order = torch.randperm(len(images), generator=generator).to(images.device)
        last = min(steps_per_epoch, config["steps"] - epoch * steps_per_epoch)
        for i in range(step % steps_per_epoch, last):
            share = order[i * B:(i + 1) * B].chunk(RANKS)[RANK]
            torch.manual_seed(hash((seed, epoch, i * RANKS + RANK)))
            step += 1
            yield step, to_float(images[share], device)


def average_over_ranks(tensors: list[Tensor]):
    """Averages them over all ranks, in place and in one exchange."""
    if RANKS > 1:
        flat = EXCHANGED[len(tensors)] = torch.cat([x.flatten() for x in tensors]).div_(RANKS)
        distributed.all_reduce(flat)
        for x, part in zip(tensors, flat.split([x.numel() for x in tensors])):
            x.copy_(part.view_as(x))


def check_finite(step: int, *values: Tensor):
    """Raises FloatingPointError for nan or inf. Makes the CPU wait for the device."""
    if not torch.stack([value.isfinite().all() for value in values]).all():
        raise FloatingPointError(f"step {step:,}: the loss or a weight is nan or inf; a new run "
                                 "with a lower --lr may help")


@contextlib.contextmanager
def caught_signals() -> Iterator[list[int]]:
    """Lists the SIGINT, SIGTERM and (unless ignored, as under nohup) SIGHUP received. A second
    SIGINT (Ctrl-C) kills the process; the others, which schedulers repeat, stay caught."""
    signals, before = [], {}

    def on_signal(signum, frame):
        signals.append(signum)
        if signum == signal.SIGINT:
            signal.signal(signum, signal.SIG_DFL)

    with contextlib.suppress(ValueError, AttributeError):  # not in the main thread; on Windows
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            signum = getattr(signal, name)
            if name != "SIGHUP" or signal.getsignal(signum) != signal.SIG_IGN:
                before[signum] = signal.signal(signum, on_signal)
    try:
        yield signals
    finally:
        for signum, handler in before.items():
            if signum == signal.SIGINT or signum not in signals:
                signal.signal(signum, handler)


# Global, to outlive gloo's thread: a tensor that it frees at exit can abort or hang the process.
SIGNAL, EXCHANGED = torch.zeros((), dtype=torch.long), {}


def signal_of_any_rank(signals: list[int]) -> int:
    """The signal that any rank has caught, or 0: all ranks stop after the same step."""
    SIGNAL.fill_(max(signals, default=0))
    if RANKS > 1:
        distributed.all_reduce(SIGNAL, distributed.ReduceOp.MAX)
    return SIGNAL.item()


# ---------------------------------------------------------------- metrics, pictures, result


def on_rank_0(f: Callable) -> Callable:
    """Only rank 0 prints and writes. A file that can't be written costs a line, not the run."""
    def call(*arguments, **options):
        try:
            return f(*arguments, **options)
        except OSError as error:
            tqdm.write(f"train.py: warning: {error}", file=sys.stderr)
    return call if RANK == 0 else lambda *arguments, **options: None


say = on_rank_0(functools.partial(print, flush=True))


@on_rank_0
def write(path: Path, *values, mode: str = "a"):
    with open(path, mode, encoding="utf-8") as file:
        print(*values, sep=",", file=file)


@on_rank_0
def begin_metrics(path: Path, step: int):
    """Keep the header of metrics.csv and the rows up to this step; later rows are dropped, because
    their steps will be repeated."""
    text = path.read_text(errors="replace") if path.exists() else ""
    rows = [row for row in re.findall(r"^\d+,.*(?=\n)", text, re.M)  # complete ones
            if int(row.partition(",")[0]) <= step]
    head = "step,epoch,loss,lr,images_per_second,seconds"
    write(path, "\n".join([head, *rows]), mode="w")


@on_rank_0
@torch.no_grad()
def write_pictures(out: Path, step: int, model: nn.Module, x: Tensor, config: dict):
    """64 samples from fixed noise, a batch at a time (DDPM: 50 steps of DDIM); for a VAE also the
    images x, each next to its reconstruction."""
    torch.manual_seed(config["seed"])
    noise = draw_noise(config, 64).to(x.device).split(config["batch_size"] // RANKS)
    with autocast(x.device, config["precision"]):
        if config["model"] == "ddpm":
            steps = min(50, model.T)
            pictures = {"samples": torch.cat([model.sample(x_T, steps) for x_T in noise])}
        else:
            pairs = torch.stack([x, model.decode(model.encode(x)[0])], dim=1)
            pictures = {"samples": torch.cat([model.sample(z) for z in noise]),
                        "reconstructions": pairs.flatten(0, 1)}
    for name, images in pictures.items():
        write_png(out / f"{name}_{step:06d}.png", grid(to_uint8(images), columns=8))


def spread(images: Tensor, n: int) -> Tensor:
    """n of the images (all, if there are fewer), evenly spread: the first n can be of one kind."""
    return images[torch.linspace(0, len(images) - 1, min(n, len(images))).long()]


@on_rank_0
@torch.no_grad()
def evaluate(model: nn.Module, images: Tensor, test: Tensor, step: int, config: dict,
             device: torch.device) -> str:
    """The last line of output: the ELBO, in float32, ± the standard error of its mean."""
    count, options = EVALUATION[config["model"]]
    k = "".join(f", {k} random t each" for k in options.values())

    def elbo(images: Tensor) -> str:
        torch.manual_seed(config["seed"])
        batches = spread(images, count).split(config["batch_size"] // RANKS)
        batches = [to_float(x, device) for x in batches]
        bits = torch.cat([model.bits_per_dim(x, **options) for x in batches])
        nats = -bits.mean().item() * math.log(2) * math.prod(config["image_shape"])
        error = bits.std(correction=0) / len(bits)**0.5
        text = f"{nats:.1f} nats, {bits.mean():.3f} ± {error:.3f} bits/dim"
        if config["model"] == "vae":
            kl = torch.cat([model.elbo(x)["kl"] for x in batches]).mean()
            text += f", of which KL {kl:.1f} nats"
        return f"{text} ({len(bits):,} images{k})"

    return f"step {step:,}: test ELBO {elbo(test)}; training ELBO {elbo(images)}"


# ---------------------------------------------------------------- data


def load_images(data: Path) -> tuple[Tensor, Tensor]:
    """Training and test images, uint8 (N, C, H, W) with C = 1 or 3, from a folder like MNIST's or
    from a .pt file with one such tensor, of which every 32nd image is held out for testing."""
    if data.suffix.lower() == ".pt":
        images = load(data)
        if not (isinstance(images, Tensor) and images.dtype == torch.uint8 and images.ndim == 4
                and images.shape[1] in (1, 3) and images.numel() and len(images) > 1):
            kind = f"{getattr(images, 'dtype', type(images))} {tuple(getattr(images, 'shape', ()))}"
            raise ValueError(f"{data}: expected a uint8 tensor (N, C, H, W) with C = 1 or 3 and N "
                             f"at least 2, got {kind}")
        held_out = torch.arange(len(images)) % 32 == 0
        images, test = images[~held_out], images[held_out]
    else:
        images, test = (read_idx(data, split) for split in ("train", "t10k"))
    if images.shape[1:] != test.shape[1:]:
        raise ValueError(f"{data}: training images are {tuple(images.shape)}, but test images are "
                         f"{tuple(test.shape)}")
    if images.max() <= 1:
        raise ValueError(f"{data}: no pixel is above 1, but values must range over 0 to 255 "
                         "(multiply a binary mask by 255)")
    return images, test


def read_idx(folder: Path, split: str) -> Tensor:
    """The images of <split>-images-idx3-ubyte or <split>-images.idx3-ubyte, gzipped or not, as
    uint8 (N, 1, H, W). OSError or ValueError otherwise."""
    names = [f"{split}-images{dot}idx3-ubyte{gz}" for dot in "-." for gz in ("", ".gz")]
    paths = [folder / name for name in names if (folder / name).is_file()]
    if not paths:
        raise ValueError(f"{folder}: {split}-images-idx3-ubyte(.gz) not found. To turn a folder of "
                         'pictures into a .pt file, see "Your own images" in the README')
    try:
        contents = [path.read_bytes() for path in paths]  # gzip or not, whatever their names
        contents = {gzip.decompress(x) if x[:2] == b"\x1f\x8b" else x for x in contents}
        if len(contents) > 1:
            raise ValueError("they differ: keep one")
        # Two zero bytes, 8 for uint8, 3 for the number of dimensions; then N, H and W.
        (data,) = contents
        magic, *shape = struct.unpack_from(">4s3I", data)
        pixels = bytearray(data[16:])
        if magic != b"\0\0\x08\x03" or len(pixels) != math.prod(shape) or not pixels:
            raise ValueError(f"the header says {magic}, {shape}, and {len(pixels)} bytes follow")
        return torch.frombuffer(pixels, dtype=torch.uint8).view(shape)[:, None]
    except (EOFError, gzip.BadGzipFile, zlib.error, struct.error, ValueError) as error:
        raise ValueError(f"{', '.join(map(str, paths))}: not an IDX file of grey images, or "
                         f"damaged ({error})") from error


# ---------------------------------------------------------------- command line


def parse_args(argv: list[str] | None) -> tuple[Parser, dict]:
    """Returns the parser, and the given options as a dict."""
    parser = Parser(prog="train.py", description="Train a model of the tutorial on images.",
                    argument_default=argparse.SUPPRESS)
    add = parser.add_argument
    add("--model", help="what to train", choices=["ddpm", "vae"], required=True)
    add("--out", help="folder for the results; default: runs/<model>", type=Path)
    add("--resume", help="resume the run in --out", action="store_true")
    length = parser.add_mutually_exclusive_group()
    for name, values, text in OPTIONS:
        defaults = {where: recipe[name] for where, recipe in RECIPES.items() if name in recipe}
        lists = any(isinstance(value, list) for value in defaults.values())
        shown = [f"{(' '.join(map(str, value)) or 'none') if lists else value} for {where}"
                 for where, value in defaults.items()]
        group = length if name in ("epochs", "steps") else parser
        group.add_argument(f"--{name.replace('_', '-')}", nargs="*" if lists else None,
                           help=text + f" (default: {', '.join(shown)})" * bool(shown),
                           **{"choices" if isinstance(values, list) else "type": values})
    return parser, vars(parser.parse_args(argv))


def configure(options: dict, saved: dict | None, device_type: str) -> dict:
    """The options that define a run, kept in its checkpoint: the recipe's, or those of the saved
    run (only CHANGEABLE may change), overridden by `options`. Raises ValueError."""
    model = options["model"]
    on_cuda = RECIPES.get(f"{model} on CUDA", {}) if device_type == "cuda" else {}
    new = {"model": model, **COMMON, **RECIPES[model], **on_cuda}
    for name, value in {"model": model, **options}.items():  # model first: the rest depends on it
        flag = f"--{name.replace('_', '-')}"
        if name not in new:
            raise ValueError(f"{flag} is not an option of --model {model}")
        if saved and name not in CHANGEABLE and value != saved[name]:
            raise ValueError(f"{flag} {value}: this run began with {saved[name]}, and only "
                             f"--{', --'.join(CHANGEABLE)} may change")
    if "epochs" in options or "steps" in options:  # one replaces the other
        options = {"epochs": None, "steps": None, **options}
    return {**(saved or new), **options}


def prepare(options: dict) -> tuple:
    """Checks everything before any file changes; returns `train`'s arguments. Raises ValueError,
    OSError or, for a network too large, RuntimeError."""
    # Device and options, of a new run or a resumed one.
    out = options.pop("out", Path("runs", options["model"]))
    if out == Path():
        raise ValueError("--out must name a folder, and not the current one")
    checkpoint, state = out / "checkpoint.pt", None
    if options.pop("resume", False):
        state, _ = read_checkpoint(checkpoint)
        if "optimizer" not in state:
            raise ValueError(f"{checkpoint}: only weights, for sampling; not a run to resume")
    elif checkpoint.exists() or (out / "metrics.csv").exists():
        raise ValueError(f"{out} already holds a run: continue it with --resume, or start a new "
                         "one in another --out")
    saved = state and state["config"]
    device = pick_device({**COMMON, **(saved or {}), **options}["device"])
    config = configure(options, saved, device.type)
    if device.type == "cuda":
        device = pick_device(f"cuda:{os.environ['LOCAL_RANK']}") if RANKS > 1 else device
        torch.cuda.set_device(device)  # on which CUDA graphs are recorded

    # Images (the same as before, if resumed) and number of steps.
    mnist = Path(__file__).with_name("data") / "mnist"
    data = mnist if config["data"] is None else Path(config["data"])
    images, test = load_images(data)
    n, shape, batch_size = len(images), list(images.shape[1:]), config["batch_size"]
    if state and [n, shape] != [config["images"], config["image_shape"]]:
        raise ValueError(f"--data {data}: {n} images {shape}, but this run began with "
                         f"{config['images']} of {config['image_shape']}")
    if batch_size > n or batch_size % RANKS:
        raise ValueError(f"--batch-size {batch_size}: must be at most {n} (training images in "
                         f"{data}) and divisible by {RANKS} (processes)")
    steps = config["steps"] or config["epochs"] * (n // batch_size)
    if state and state["step"] > steps:
        raise ValueError(f"{steps} steps: this run has already taken {state['step']}; --resume "
                         "alone (no --steps, --epochs) keeps the old end")
    config.update(images=n, image_shape=shape, steps=steps)
    if device.type == "cuda" and images.numel() < torch.cuda.mem_get_info(device)[0] / 2:
        images = images.to(device)  # then no batch has to be copied there

    # The model, and a trial run, which raises an error if these images do not fit.
    torch.manual_seed(config["seed"])
    model = build_model(config).to(device)
    with torch.no_grad():
        model(to_float(images[:1], device))
    if RANK == 0:
        out.mkdir(parents=True, exist_ok=True)
    return config, state, model, images, test, device, out


def main(argv: list[str] | None = None):
    parser, options = parse_args(argv)
    try:
        config, state, model, images, test, device, out = arguments = prepare(options)
        if RANKS > 1:
            nccl = device.type == "cuda" and distributed.is_nccl_available()  # not on Windows
            distributed.init_process_group("cpu:gloo,cuda:nccl" if nccl else "gloo")
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        parser.error(str(error))
    size = sum(parameter.numel() for parameter in model.parameters())
    say(f"{config['model']}: {size:,} parameters, {len(images):,} images of "
        f"{'x'.join(map(str, config['image_shape']))}, on {device}"
        + (f" and {RANKS - 1} more" if RANKS > 1 else ""))
    if images.max() < 128:
        say(f"train.py: warning: the brightest pixel is {images.max()} of 255; if your data has "
            "another range, scale it to 0..255 for training to work", file=sys.stderr)
    try:
        ema, step, signum = train(*arguments)
    except FloatingPointError as error:
        parser.error(str(error))
    except OSError as error:
        parser.error(f"{out / 'checkpoint.pt'}: {error}; --resume continues from the last "
                     "checkpoint, if there is one")
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError on a GPU alone
        if not (isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "memory" in str(error)):
            raise
        parser.error("out of memory: start again with a smaller --batch-size, in another --out")
    finally:
        if RANKS > 1:
            distributed.destroy_process_group()
    quote = shlex.quote if os.name == "posix" else '"{}"'.format  # for cmd.exe
    if signum:
        launcher = f"torchrun --nproc_per_node={RANKS}" if RANKS > 1 else "python"
        say(f"stopped at step {step:,} of {config['steps']:,}; to resume: {launcher} train.py "
            f"--model {config['model']} --out {quote(f'{out}')} --resume")
        sys.exit(128 + signum)
    say("computing the test ELBO ...")
    result = evaluate(ema, images, test, step, config, device)
    write(out / "result.txt", result, mode="w")
    say(f"{result}; to sample: python sample.py --checkpoint {quote(f'{out}/checkpoint.pt')}")


if __name__ == "__main__":
    run(main)
