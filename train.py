"""Train a model of the tutorial (arXiv 2403.18103) on images.

    python train.py --model vae       section 1
    python train.py --model ddpm      section 2
    torchrun --nproc_per_node=4 train.py --model ddpm      on four devices

Output in runs/<model>/: checkpoint.pt, metrics.csv, and pictures of samples after every epoch.
One loop serves both models: batch → loss → backward → clip → optimiser → EMA. The paper gives the
loss (§1.3, Thm 1.4; §2.4 and §2.5, "Training Algorithm for DDPM", in version 3 of January 2025).
The rest is what most code of the field does to train a network.
"""
import argparse
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
from pathlib import Path

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
from sample import (Parser, autocast, build_model, grid, load, number, pick_device, plan_model,
                    read_checkpoint, save, to_uint8, write_file, write_png)
from vae import VAE

# The options that --model brings with it, and their defaults.
DEFAULTS = {
    "ddpm": dict(steps=6400, batch_size=32, lr=1e-3, seed=0, timesteps=1000, schedule="cosine",
                 predict="noise", t_sampling="snr", channels=16, multipliers=[1, 2, 4], blocks=1,
                 attention=[2], dropout=0.0),
    "vae": dict(epochs=10, batch_size=128, lr=4e-3, seed=0, latent_dim=8, decoder_std=0.6,
                channels=16),
}
# The test ELBO at the end: the number of images, and the options of the model's `elbo`.
EVALUATION = {"ddpm": (256, {"k": 20}), "vae": (10_000, {})}
COLUMNS = ("step", "epoch", "loss", "lr", "images_per_second", "seconds")
ROW = 10  # steps between two rows of metrics.csv
WARM_UP = 0.05  # of the run
EMA_DECAY = 0.9999
CLIP = 1.0  # norm of the gradient
# torchrun starts one process, a rank, for each device, and tells it this. The ranks share every
# batch, only rank 0 writes, and DistributedDataParallel keeps their weights equal.
RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


# ------------------------------------------------------------------------------ data


def read_idx(path: Path) -> Tensor:
    """An IDX file of bytes, gzipped or not, as a uint8 tensor. OSError or ValueError otherwise."""
    data = bytearray()
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            # Two zero bytes, 8 for uint8, the number of dimensions; each as a big-endian uint32.
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


def to_float(images: Tensor, device: torch.device) -> Tensor:
    """0..255 to [-1, 1], on the device."""
    return images.to(device).float() / 127.5 - 1


# ------------------------------------------------------------------------------ options


def parse_args(argv: list[str] | None) -> tuple[Parser, argparse.Namespace]:
    """The parser, and the options by name: None for those of DEFAULTS that were not given."""
    parser = Parser(prog="train.py", description="Train a model of the tutorial on images.")

    def add(name: str, help: str, **kwargs):
        key = name[2:].replace("-", "_")
        defaults = {model: options[key] for model, options in DEFAULTS.items() if key in options}
        if defaults:
            help += " (default: " + ", ".join(
                f"{' '.join(map(str, value)) if isinstance(value, list) else value} for {model}"
                for model, value in defaults.items()) + ")"
        parser.add_argument(name, help=help, **kwargs)

    def std(text: str) -> float | str:
        return text if text == "learned" else number(float, 1e-6, 1e6)(text)

    count, width = number(int, 1, 10**9), number(int, 1, 10**5)
    add("--model", "what to train", choices=list(DEFAULTS), required=True)
    add("--data", "folder of IDX files, gzipped or not, or a .pt file of a uint8 tensor "
        "(N, C, H, W) (default: data/mnist)")
    add("--out", "folder for the results (default: runs/<model>)", type=Path)
    add("--epochs", "passes over the data", type=count)
    add("--steps", "optimiser steps, instead of --epochs", type=count)
    add("--batch-size", "images in a step, of all devices together", type=count)
    add("--lr", "peak learning rate", type=number(float, 1e-9, 1))
    add("--seed", "of every random number", type=number(int, 0, 2**63 - 1))
    add("--device", "auto, cpu, cuda, cuda:N or mps (default: auto)")
    add("--precision", "auto is bf16 autocast on hardware that has bf16 (default: auto)",
        choices=["auto", "fp32", "bf16"])
    add("--compile", "torch.compile the networks, in a minute or two: for long runs on a GPU",
        action="store_true", default=None)
    add("--tensorboard", "also write metrics and pictures for TensorBoard, where its package is "
        "installed", action="store_true", default=None)
    add("--resume", "go on with the run in --out", action="store_true")
    add("--timesteps", "length T of the chain", type=number(int, 2, 10**6))
    add("--schedule", "of alpha_t", choices=list(SCHEDULES))
    add("--predict", "what the U-Net predicts", choices=["noise", "image"])
    add("--t-sampling", "how training draws t: uniform is the paper's", choices=["uniform", "snr"])
    add("--channels", "width of the network's first level", type=width)
    add("--multipliers", "width of each level over --channels", type=number(int, 1, 100),
        nargs="+", metavar="M")
    add("--blocks", "residual blocks a level", type=number(int, 1, 1000))
    add("--attention", "levels with attention; 0 is full resolution", nargs="*", metavar="LEVEL",
        type=number(int, 0, 10**9))
    add("--dropout", "in the residual blocks", type=number(float, 0, 0.999))
    add("--latent-dim", "length of z", type=width)
    add("--decoder-std", "sigma of p(x|z), for pixels in [-1, 1], or the word learned",
        type=std)
    return parser, parser.parse_args(argv)


def configure(args: argparse.Namespace, saved: dict | None) -> dict:
    """What defines a run and is kept in its checkpoint: the options given over DEFAULTS, or over
    those of the saved run, of which only some may change. Raises ValueError."""
    free = {"epochs": None, "steps": None, "device": "auto", "precision": "auto",
            "compile": False, "tensorboard": False}
    known = {"model": args.model, "data": "data/mnist", **free, **DEFAULTS[args.model]}
    every = known.keys() | set().union(*DEFAULTS.values())
    given = {key: value for key, value in vars(args).items() if key in every and value is not None}
    for key in given:
        if key not in known:
            raise ValueError(f"--{key.replace('_', '-')} is not an option of --model {args.model}")
        if saved and key not in free and given[key] != saved[key]:
            raise ValueError(f"--{key.replace('_', '-')} {given[key]}: this run began with "
                             f"{saved[key]}, and only --{', --'.join(free)} may change")
    if "epochs" in given and "steps" in given:
        raise ValueError("--epochs and --steps: only one of them can say when to stop")
    if "epochs" in given or "steps" in given:
        given = {"epochs": None, "steps": None, **given}
    return {**(saved or known), **given}


# ------------------------------------------------------------------------------ pictures, ELBO


@torch.no_grad()
def pictures(model: nn.Module, x: Tensor, seed: int) -> dict[str, Tensor]:
    """By name: 64 samples, from the same noise every time, and for a VAE reconstructions beside
    the originals x."""
    generator = torch.Generator(x.device).manual_seed(seed)
    if not isinstance(model, VAE):
        return {"samples": model.sample(64, steps=min(50, model.T), generator=generator)}
    mu, _ = model.encode(x)
    pairs = torch.stack([x, model.decode(mu)], dim=1)
    return {"samples": model.sample(64, generator), "reconstructions": pairs.flatten(0, 1)}


@torch.no_grad()
def evaluate(model: nn.Module, images: Tensor, device: torch.device,
             options: dict) -> tuple[float, float]:
    """The ELBO in nats per image and in bits/dim: means over the images."""
    elbo = bits = 0.0
    for batch in images.split(256):
        x = to_float(batch, device)
        terms = model.elbo(x, **options)
        reconstruction, *costs = terms.values()
        elbo += (reconstruction - sum(costs)).sum().item() / len(images)
        bits += model.bits_per_dim(x, terms).sum().item() / len(images)
    return elbo, bits


# ------------------------------------------------------------------------------ training


def catch_signals() -> list[int]:
    """A list that SIGINT and SIGTERM will be added to. The same signal once more stops at once."""
    signals = []

    def on_signal(signum, frame):
        signals.append(signum)
        signal.signal(signum, signal.SIG_DFL)

    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, on_signal)
    return signals


def learning_rate(step: int, total: int) -> float:
    """The share of --lr at this step: a linear warm-up, then half a cosine down to 0."""
    return min(1, (step + 1) / (WARM_UP * total)) * 0.5 * (1 + math.cos(math.pi * step / total))


def start_metrics(path: Path, step: int):
    """Write metrics.csv with its head and, for a resumed run, its rows up to this step. Rows after
    the last checkpoint are dropped: those steps will be taken again."""
    rows = path.read_text().splitlines(keepends=True)[1:] if step and path.exists() else []
    kept = [row for row in rows if row.endswith("\n") and int(row.split(",")[0]) <= step]
    write_file(path, "".join([",".join(COLUMNS) + "\n", *kept]).encode())


def train(config: dict, model: nn.Module, images: Tensor, test: Tensor, out: Path,
          device: torch.device, state: dict | None, board=None) -> tuple[nn.Module, float]:
    """Train the model as configured, from the start or from a checkpoint's state: returns its EMA
    and the images/s. A signal ends the program, with all saved. board: TensorBoard's writer, or
    None.

    Raises OSError if a file can't be written, and FloatingPointError if the loss or its gradient
    is not a finite number.
    """
    batch_size, seed = config["batch_size"], config["seed"]
    per_epoch = len(images) // batch_size
    total = config["steps"] or config["epochs"] * per_epoch
    if device.type == "cuda" and images.numel() < torch.cuda.mem_get_info(device)[0] / 2:
        images = images.to(device)  # a batch then never crosses the bus

    model.to(device)
    optimizer = torch.optim.Adam(model.parameters(), config["lr"], betas=(0.9, 0.99), fused=True)
    ema = AveragedModel(model)
    step, seconds, losses = 0, 0.0, []  # seconds of training; losses since the last row
    if state:
        model.load_state_dict(state["model"])
        ema.module.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        step, seconds = state["step"], state["seconds"]
        losses = list(torch.tensor(state["losses"], device=device))
        ema.n_averaged.fill_(step)
    schedule = LambdaLR(optimizer, lambda step: learning_rate(step, total), last_epoch=step - 1)
    ema.eval()
    cast = autocast(device, config["precision"])
    if config["compile"]:
        then = time.perf_counter()
        for child in model.children():
            child.compile()
        with cast:  # torch compiles when the network runs for the first time
            loss = model(to_float(images[:batch_size // RANKS], device))
        loss.backward()
        optimizer.zero_grad()
        if RANK == 0:
            print(f"compiled in {time.perf_counter() - then:.0f} s")
    # Here the ranks wait for one another: none writes before all have checked their input.
    network = DistributedDataParallel(model) if RANKS > 1 else model

    def checkpoint():
        if RANK == 0:
            save(out / "checkpoint.pt", {
                "format": 2, "config": config, "step": step, "seconds": seconds,
                "losses": [loss.item() for loss in losses], "model": model.state_dict(),
                "ema": ema.module.state_dict(), "optimizer": optimizer.state_dict()})

    signals = catch_signals()
    if not state:
        checkpoint()  # from here on there always is a checkpoint to go on from
    if RANK == 0:
        start_metrics(out / "metrics.csv", step)
    order, clock = None, (step, time.perf_counter())
    mean, stop = math.nan, torch.tensor(0)  # of the last row's losses; the signal to stop for
    with tqdm(total=total * batch_size, initial=step * batch_size, unit=" images",
              unit_scale=True, disable=RANK > 0) as bar:
        while step < total and not stop:
            epoch, i = divmod(step, per_epoch)
            # Every random number is a function of the seed and of where in the run it is drawn: a
            # resumed run draws what the uninterrupted one would have drawn.
            if order is None or i == 0:
                shuffle = torch.Generator().manual_seed(hash((seed, epoch)))
                order = torch.randperm(len(images), generator=shuffle).to(images.device)
            torch.manual_seed(hash((seed, epoch, i * RANKS + RANK)))
            share = order[i * batch_size:(i + 1) * batch_size].chunk(RANKS)[RANK]
            with cast:
                loss = network(to_float(images[share], device))
            loss.backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            if not (loss + norm).isfinite():  # the weights are still good
                raise FloatingPointError(f"step {step + 1:,}: the loss is {loss:.4g}, its gradient "
                                         f"{norm:.4g}; the last loss was {[mean, *losses][-1]:.4g}")
            lr, = schedule.get_last_lr()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            step += 1
            # Samples are drawn with a moving average of the weights, which jitter around it from
            # step to step (arXiv 2006.11239 does the same). Its decay is warmed up, so that it
            # spans the last tenth of the run so far and soon forgets the random start.
            ema.multi_avg_fn = get_ema_multi_avg_fn(min(EMA_DECAY, step / (step + 10)))
            ema.update_parameters(model)
            losses.append(loss.detach())
            stop.fill_(max(signals, default=0))
            if RANKS > 1:
                distributed.all_reduce(losses[-1].div_(RANKS))
                distributed.all_reduce(stop, distributed.ReduceOp.MAX)  # one signal stops all
            bar.update(batch_size)

            if step % ROW == 0 or step == total:
                mean = torch.stack(losses).mean().item()
                losses.clear()
                (since, then), clock = clock, (step, time.perf_counter())
                seconds += clock[1] - then
                rate = (step - since) * batch_size / (clock[1] - then)
                bar.set_postfix(loss=f"{mean:.4f}")
                if RANK == 0:
                    with open(out / "metrics.csv", "a") as file:  # row by row: it can be watched
                        print(step, f"{step / per_epoch:.4f}", mean, lr, f"{rate:.1f}",
                              f"{seconds:.3f}", sep=",", file=file)
                if board:
                    for name, value in (("loss", mean), ("lr", lr), ("images_per_second", rate)):
                        board.add_scalar(name, value, step)
            if step % per_epoch == 0 or step == total:
                checkpoint()
                if RANK == 0:
                    with cast:
                        drawn = pictures(ema.module, to_float(test[:32], device), seed)
                    for name, x in drawn.items():
                        picture = grid(to_uint8(x))
                        write_png(out / f"{name}_{step:06d}.png", [picture])
                        if board:
                            board.add_image(name, picture, step)
                clock = (step, time.perf_counter())

    if step < total:
        seconds += time.perf_counter() - clock[1]
        checkpoint()
        if RANK == 0:
            launcher = ("python" if RANKS == 1 else
                        f"torchrun --nproc_per_node={os.environ['LOCAL_WORLD_SIZE']}")
            print(f"stopped at step {step:,} of {total:,}; to go on: {launcher} train.py "
                  f"--model {config['model']} --out {shlex.quote(str(out))} --resume")
        del network  # the exception keeps this frame, and with it the process group of the ranks
        sys.exit(128 + stop.item())
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_DFL)  # all is saved: nothing to stop for
    return ema.module, step * batch_size / seconds


def main(argv: list[str] | None = None):
    parser, args = parse_args(argv)
    out = args.out or Path("runs") / args.model
    checkpoint, board = out / "checkpoint.pt", None
    try:
        if checkpoint.exists() and not args.resume:
            raise ValueError(f"{checkpoint} exists: --resume goes on with that run, and --out with "
                             "another folder starts a new one")
        if args.resume and not checkpoint.exists():
            raise ValueError(f"{checkpoint}: no such file to --resume from")
        state = read_checkpoint(checkpoint) if args.resume else None
        config = configure(args, state and state["config"])
        device = pick_device(config["device"])
        if RANKS > 1 and device.type == "cuda":
            device = pick_device(f"cuda:{os.environ['LOCAL_RANK']}")
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
            raise ValueError(f"{config['data']}: not the images that this run began with")
        config.update(shape)
        size = sum(parameter.numel() for parameter in plan_model(config).parameters())
        try:
            torch.empty(5 * size, device=device)  # weights, gradient, Adam's two moments, EMA
        except RuntimeError:
            raise ValueError(f"{size:,} parameters do not fit into {device}'s memory") from None
        torch.manual_seed(config["seed"])
        model = build_model(config)
        if config["tensorboard"]:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise ValueError("--tensorboard: pip install tensorboard first") from None
        out.mkdir(parents=True, exist_ok=True)
        if config["tensorboard"] and RANK == 0:
            board = SummaryWriter(out, purge_step=state["step"] + 1 if state else None)
    except (ValueError, OSError) as error:
        parser.error(str(error))

    if RANKS > 1:
        # DistributedDataParallel would import this, too, but later, and its functions keep the
        # process group that they find: gloo's threads would outlive it, and could abort the exit.
        from torch.distributed.nn import functional  # noqa: F401
        distributed.init_process_group()  # nccl for CUDA tensors, gloo for the CPU's
    if RANK == 0:
        print(f"{config['model']}: {size:,} parameters, {len(images):,} images of "
              f"{'×'.join(map(str, config['image_shape']))}, on {device}"
              + (f" and {RANKS - 1} more" if RANKS > 1 else ""))
    try:
        ema, rate = train(config, model, images, test, out, device, state, board)
    except FloatingPointError as error:
        parser.error(f"{error}: start again with a lower --lr, or go on from the last checkpoint "
                     f"with --resume --precision fp32")
    except torch.OutOfMemoryError:
        parser.error(f"{device} is out of memory: a smaller --batch-size takes less")
    except OSError as error:
        parser.error(f"{error}; once that is fixed, --resume goes on from the last checkpoint")
    finally:
        if board:
            board.close()
        if RANKS > 1:
            distributed.destroy_process_group()
    if RANK:
        return
    n, options = EVALUATION[config["model"]]
    torch.manual_seed(config["seed"])
    elbo, bits = evaluate(ema, test[:n], device, options)
    print(f"test ELBO {elbo:.1f} nats, {bits:.3f} bits/dim ({len(test[:n]):,} images"
          + "".join(f", {key} = {value}" for key, value in options.items())
          + f"); {rate:.0f} images/s; to sample: python sample.py --checkpoint {checkpoint}")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until there is something to save, just stop
    main()
