"""Draw new images from a trained model: `python sample.py` after `python train.py --model …`.

Numbers are those of version 3, January 2025, of the tutorial (arXiv 2403.18103). VAE (§1.3,
Fig. 1.7): decode z ~ N(0, I). DDPM (§2.4, "Inference of DDPM", and §2.5, "… using ε̂_θ"): run the
reverse chain from x_T ~ N(0, I) to x_0, through all T steps or, with --steps, through a few of
DDIM's (§2.6).

The second half serves train.py, too: checkpoints, files, devices, pictures, mistakes.
"""
import argparse
import contextlib
import io
import math
import os
import re
import signal
import struct
import sys
import tempfile
import traceback
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # Windows
    import msvcrt

warnings.filterwarnings("ignore", "Failed to initialize NumPy")  # torch works without it

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from ddpm import DDPM
from unet import UNet
from vae import VAE

BATCH = 256  # images drawn at a time, so that memory does not grow with -n
CHAIN_FRAMES = 60  # of the animation, at most
STRIP_FRAMES, STRIP_IMAGES = 11, 8  # columns and rows of the film strip
LATENT_SIDE = 20  # images along each side of the latent grid
DDPM_ONLY, VAE_ONLY = ("steps", "eta", "chain", "strip", "compile"), ("latent-grid",)  # options
FORMAT = 3  # of checkpoints


# ------------------------------------------------------------------------------ drawing


def draw(model: nn.Module, n: int, steps: int | None, eta: float, generator: torch.Generator,
         keep: list[int]) -> tuple[Tensor, dict[int, Tensor]]:
    """n images as uint8 (n, C, H, W), under a progress bar, and of a DDPM's first batch also what
    it was after i steps, for every i in keep."""
    images, film = [], {}
    batches = [min(BATCH, n - start) for start in range(0, n, BATCH)]
    length = (steps or model.T) if isinstance(model, DDPM) else 1
    with tqdm(total=length * len(batches), unit="step", desc="sampling") as bar:
        for batch in batches:
            if isinstance(model, DDPM):
                for i, (_, x) in enumerate(model.chain(batch, steps, eta, generator)):
                    bar.update(i > 0)  # the first is x_T itself
                    if i in keep and not images:
                        film[i] = to_uint8(x)
            else:
                x = model.sample(batch, generator)
                bar.update()
            images.append(to_uint8(x))
    return torch.cat(images), film


def evenly(last: int, count: int) -> list[int]:
    """At most `count` whole numbers from 0 to `last`, both included."""
    return sorted(set(torch.linspace(0, last, count).round().int().tolist()))


@torch.no_grad()
def latent_grid(model: VAE, device: torch.device) -> Tensor:
    """f_θ(z) for a square of z = (z_1, z_2), z_1 growing to the right and z_2 upwards, whose
    lines lie closer where N(0, I) is denser: equal steps of its distribution function."""
    z = torch.special.ndtri((torch.arange(LATENT_SIDE) + 0.5) / LATENT_SIDE).to(device)
    return model.decode(torch.cartesian_prod(-z, z).flip(1))


# ------------------------------------------------------------------------------ command line


def parse_args(argv: list[str] | None) -> tuple["Parser", argparse.Namespace]:
    parser = Parser(prog="sample.py", description="Draw new images from a trained model.")
    add = parser.add_argument
    add("--checkpoint", type=Path, help="default: the newest runs/*/checkpoint.pt")
    add("-n", type=number(int, 1, 10**7), default=64, help="how many images (default: 64)")
    add("--steps", type=number(int, 1), help="ddpm: DDIM with this many steps (default: all T "
        "steps of the reverse chain)")
    add("--eta", type=number(float, 0, 1), help="ddpm, with --steps: DDIM's share of fresh noise, "
        "0 to 1 (default: 1)")
    add("--seed", type=number(int, 0, 2**63 - 1), default=0, help="(default: 0)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: auto)")
    add("--compile", action="store_true", help="ddpm: torch.compile the network, with CUDA graphs, "
        "in a minute or two: for many images on a GPU")
    add("--out", type=Path, help="a .png for a grid, or a .pt for the uint8 tensor (n, C, H, W) "
        "(default: samples.png beside the checkpoint)")
    add("--chain", type=Path, metavar="FILE.png",
        help="ddpm: also an animated PNG of the chain from x_T to x_0")
    add("--strip", type=Path, metavar="FILE.png", help="ddpm: also the chain as a film strip")
    add("--latent-grid", type=Path, metavar="FILE.png",
        help="vae with --latent-dim 2: also what the decoder makes of every z of a grid")
    return parser, parser.parse_args(argv)


def check_output(option: str, path: Path):
    """Raises ValueError where no file of this name can be written, or none should be."""
    suffixes = (".png", ".pt") if option == "--out" else (".png",)
    if path.suffix not in suffixes:
        raise ValueError(f"{option} {path}: the name must end in {' or '.join(suffixes)}")
    if path.name == "checkpoint.pt":
        raise ValueError(f"{option} {path}: that name is a checkpoint's")
    if path.is_dir():
        raise ValueError(f"{option} {path}: a folder has that name")
    try:
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise ValueError(f"{option} {path}: {error.strerror}") from error


def newest_checkpoint() -> Path:
    paths = sorted(Path("runs").glob("*/checkpoint.pt"), key=lambda path: path.stat().st_mtime)
    if not paths:
        raise ValueError("no runs/*/checkpoint.pt here: train first, with python train.py "
                         "--model ddpm, or name a file with --checkpoint")
    return paths[-1]


def prepare(args: argparse.Namespace) -> tuple[nn.Module, torch.device, dict[str, Path]]:
    """The trained model, its device, and the files to write, by option. All that can be refused is
    refused here, before anything is drawn: ValueError or OSError."""
    args.checkpoint = args.checkpoint or newest_checkpoint()
    args.out = args.out or args.checkpoint.with_name("samples.png")
    files = {"--out": args.out, "--chain": args.chain, "--strip": args.strip,
             "--latent-grid": args.latent_grid}
    files = {option: path for option, path in files.items() if path}
    for option, path in files.items():
        check_output(option, path)
    paths = [args.checkpoint, *files.values()]
    if len({os.path.realpath(path) for path in paths}) < len(paths):
        raise ValueError(f"{', '.join(files)}: each needs a file of its own, other than "
                         f"{args.checkpoint}")
    if args.eta is not None and args.steps is None:
        raise ValueError("--eta goes with --steps: the full reverse chain has no eta")
    device = pick_device(args.device)
    state = read_checkpoint(args.checkpoint)
    model = build_model(state["config"])
    model.load_state_dict(state["ema"])
    foreign, kind = (VAE_ONLY, "vae") if isinstance(model, DDPM) else (DDPM_ONLY, "ddpm")
    for option in foreign:
        if getattr(args, option.replace("-", "_")):
            raise ValueError(f"--{option} is for a {kind}, but {args.checkpoint} is a "
                             f"{state['config']['model']}")
    if args.steps and args.steps > model.T:
        raise ValueError(f"--steps {args.steps}: this chain has only {model.T}")
    if args.latent_grid and model.latent_dim != 2:
        raise ValueError(f"--latent-grid: the z of {args.checkpoint} has {model.latent_dim} "
                         "numbers; train with --latent-dim 2 for a grid of two")
    return model.to(device).eval(), device, files


def main(argv: list[str] | None = None):
    set_up_process()
    parser, args = parse_args(argv)
    memory = "a smaller -n takes less"
    with one_line(parser, (ValueError, OSError), memory):
        model, device, files = prepare(args)
    eta = 1.0 if args.eta is None else args.eta
    if args.compile:
        model.denoiser.compile(mode="reduce-overhead")
    length = args.steps or getattr(model, "T", None)
    chain = evenly(length, CHAIN_FRAMES) if args.chain else []
    strip = evenly(length, STRIP_FRAMES) if args.strip else []
    generator = torch.Generator(device).manual_seed(args.seed)
    with one_line(parser, (OSError,), memory):
        with autocast(device):
            images, film = draw(model, args.n, args.steps, eta, generator, chain + strip)
        if args.out.suffix == ".pt":
            save(args.out, images)
        else:
            write_png(args.out, [grid(images)])
        if args.chain:
            write_png(args.chain, [grid(film[i]) for i in chain])
        if args.strip:
            rows = torch.stack([film[i][:STRIP_IMAGES] for i in strip], dim=1)
            write_png(args.strip, [grid(rows.flatten(0, 1), columns=len(strip))])
        if args.latent_grid:
            write_png(args.latent_grid, [grid(to_uint8(latent_grid(model, device)))])
    say(f"wrote {', '.join(map(str, files.values()))}")


# ================================================================== shared with train.py


# ------------------------------------------------------------------------ models and checkpoints


def build_model(config: dict) -> nn.Module:
    """The untrained model that a run's options describe."""
    shape = tuple(config["image_shape"])
    if config["model"] == "vae":
        return VAE(shape, config["latent_dim"], config["channels"], config["decoder_std"])
    denoiser = UNet(shape[0], config["channels"], config["multipliers"], config["blocks"],
                    config["attention"], config["dropout"], config["fourier"])
    return DDPM(denoiser, shape, config["timesteps"], config["schedule"], config["predict"],
                config["t_sampling"])


def plan_model(config: dict) -> nn.Module:
    """`build_model` on the meta device, where a tensor has a shape but no memory: what the options
    make, before it costs anything. Raises ValueError if they make nothing."""
    with torch.device("meta"):
        model = build_model(config)
        if isinstance(model, DDPM):
            # Raises if H or W does not divide.
            model.denoiser(torch.zeros(1, *model.image_shape), torch.ones(1))
    return model


def read_checkpoint(path: Path) -> dict:
    """What train.py saved, with weights that fit its model. OSError or ValueError if it is not."""
    state = load(path)
    if not isinstance(state, dict) or "format" not in state:
        raise ValueError(f"{path}: not a checkpoint of train.py")
    if state["format"] != FORMAT:
        raise ValueError(f"{path}: a checkpoint of another version of this code")

    def shapes(weights: dict) -> set:
        return {(name, tuple(weight.shape)) for name, weight in weights.items()}

    try:
        expected = shapes(plan_model(state["config"]).state_dict())
        wrong = (shapes(state["model"]) ^ expected) | (shapes(state["ema"]) ^ expected)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{path}: not a whole checkpoint of train.py ({error})") from error
    if wrong:
        raise ValueError(f"{path}: the weights {min(wrong)[0]} are missing, or have another shape "
                         "than the model's")
    return state


# ------------------------------------------------------------------------------ files


def write_file(path: Path | str, data: bytes):
    """All of it or nothing: a new file, complete on the disk, takes the old one's place. Whatever
    stops this, `path` is the old file or the new one. Raises OSError."""
    new = Path(f"{path}.{os.getpid()}.tmp")  # not another process's
    try:
        with open(new, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    except OSError:
        new.unlink(missing_ok=True)
        raise


def save(path: Path, value):
    """torch.save by way of `write_file`."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    write_file(path, buffer.getbuffer())


def load(path: Path):
    """What torch.save wrote to this file. OSError or ValueError for what can't be read.

    weights_only: a file from elsewhere can't run code. torch.save writes a zip archive, of which
    torch.load checks neither the checksums nor the sizes, and of a part that is marked as a folder
    it takes what happens to be in memory.
    """
    with open(path, "rb") as file:
        try:
            archive = zipfile.ZipFile(file)
            parts = archive.infolist()
            if (sum(part.file_size for part in parts) > path.stat().st_size
                    or any(part.external_attr for part in parts) or archive.testzip()):
                raise zipfile.BadZipFile
            file.seek(0)
            return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # damaged bytes make zipfile and torch raise almost anything
            if is_out_of_memory(error):
                raise
            raise ValueError(f"{path}: not a file of torch.save, or a damaged one") from error


def claim(path: Path) -> BinaryIO:
    """Open a file to append to it, and lock it until it is closed or this process ends, however it
    ends. Raises OSError if it can't be opened, ValueError if another process has it."""
    file = open(path, "ab+", buffering=0)
    try:
        if os.name == "nt":  # locks bytes, which nobody else may read then: one far behind the end
            os.lseek(file.fileno(), 2**30, os.SEEK_SET)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.close()
        raise ValueError(f"{path}: another process is writing to it") from None
    except OSError:
        pass  # a file system without locks
    return file


# ------------------------------------------------------------------------------ devices


def pick_device(name: str) -> torch.device:
    """The device named "auto" (CUDA where there is one, else the CPU), "cpu", "cuda", "cuda:N" or
    "mps".

    Raises ValueError where this machine has no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind, colon, index = name.partition(":")
    have = {"cpu": 1, "cuda": torch.cuda.device_count(),
            "mps": int(torch.backends.mps.is_available())}
    if kind not in have or (colon and not (kind == "cuda" and index.isdecimal())):
        raise ValueError(f"--device {name}: not one of auto, cpu, cuda, cuda:N, mps")
    if int(index or 0) >= have[kind]:
        raise ValueError(f"--device {name}: this machine has {have[kind]} such devices; "
                         "--device auto takes what there is")
    return torch.device(name)


def autocast(device: torch.device, precision: str = "auto") -> contextlib.AbstractContextManager:
    """bfloat16 autocast for "bf16", none for "fp32"; "auto" asks whether the hardware multiplies
    bfloat16 itself (CUDA since Ampere, CPUs with AMX or AVX-512 BF16). Never float16: its
    largest number is 65504, and what passes it is inf."""
    if precision == "auto" and device.type == "cuda":
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    elif precision == "auto" and device.type == "cpu":
        capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # new in torch 2.7
        bf16 = capabilities.get("avx512_bf16", False) or capabilities.get("amx_bf16", False)
    else:
        bf16 = precision == "bf16"
    return torch.autocast(device.type, torch.bfloat16) if bf16 else contextlib.nullcontext()


# ------------------------------------------------------------------------------ pictures


def to_uint8(x: Tensor) -> Tensor:
    """[-1, 1] to 0..255."""
    return ((x + 1) * 127.5).round().clamp(0, 255).to("cpu", torch.uint8)


def grid(images: Tensor, columns: int | None = None) -> Tensor:
    """(n, C, H, W) to one picture (C, h, w), row by row, 2 pixels apart, about square."""
    n, C, H, W = images.shape
    columns = columns or math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    images = F.pad(images, (1, 1, 1, 1, 0, 0, 0, rows * columns - n))
    picture = images.view(rows, columns, C, H + 2, W + 2).permute(2, 0, 3, 1, 4)
    return F.pad(picture.reshape(C, rows * (H + 2), columns * (W + 2)), (1, 1, 1, 1))


def write_png(path: Path | str, frames: list[Tensor], seconds: float = 0.06, last: float = 2.0):
    """Write uint8 frames (C, H, W), C = 1 or 3: one as a PNG, several as an animated PNG.

    PNG (ISO/IEC 15948) is a signature and chunks: IHDR, compressed IDAT, IEND. APNG adds acTL
    (how many frames), fcTL before each frame, and fdAT: an IDAT with a number in front. A viewer
    that does not know them shows the first frame.
    """
    C, H, W = frames[0].shape
    animated, sequence = len(frames) > 1, 0
    parts = [b"\x89PNG\r\n\x1a\n"]

    def chunk(kind: bytes, data: bytes):
        parts.append(struct.pack(">I", len(data)) + kind + data
                     + struct.pack(">I", zlib.crc32(kind + data)))

    chunk(b"IHDR", struct.pack(">IIBBBBB", W, H, 8, {1: 0, 3: 2}[C], 0, 0, 0))
    if animated:
        chunk(b"acTL", struct.pack(">II", len(frames), 0))
    for i, frame in enumerate(frames):
        rows = frame.permute(1, 2, 0).reshape(H, W * C)
        data = zlib.compress(bytes(F.pad(rows, (1, 0)).flatten().tolist()), 9)  # filter 0
        if animated:
            delay = round(1000 * (last if i == len(frames) - 1 else seconds))
            chunk(b"fcTL", struct.pack(">5I2H2B", sequence, W, H, 0, 0, delay, 1000, 0, 0))
            sequence += 1
        if i == 0:
            chunk(b"IDAT", data)
        else:
            chunk(b"fdAT", struct.pack(">I", sequence) + data)
            sequence += 1
    chunk(b"IEND", b"")
    write_file(path, b"".join(parts))


# ------------------------------------------------------------------------ mistakes, the terminal


class Parser(argparse.ArgumentParser):
    """argparse, but a mistake costs one line on stderr, and exit status 2."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {' '.join(message.splitlines())}\n")


def number(kind: type, low: float, high: float = math.inf) -> Callable[[str], float]:
    """The argparse type of numbers from low to high: nan and inf are refused."""
    def parse(text: str):
        value = kind(text)
        if not low <= value <= high or value == math.inf:
            raise argparse.ArgumentTypeError(
                f"must be {low} or more" + (f" and at most {high}" if high < math.inf else "")
                + f", got {text}")
        return value
    parse.__name__ = {int: "whole number", float: "number"}[kind]  # for argparse's own message
    return parse


def is_out_of_memory(error: Exception) -> bool:
    """CUDA has an exception of its own for it; the CPU and mps only say so; torch.save hides it."""
    told = re.search("out of memory|not enough memory|can't allocate memory", str(error))
    return (isinstance(error, (MemoryError, torch.OutOfMemoryError))
            or isinstance(error, RuntimeError) and bool(told)
            or isinstance(error.__context__, MemoryError))


@contextlib.contextmanager
def one_line(parser: Parser, kinds: tuple[type, ...], memory: str, advice: str = "") -> Iterator:
    """What a user can mend ends the program with one line and status 2: errors of these kinds, with
    this advice behind them, and memory that ran out, with the advice `memory`."""
    try:
        yield
    except Exception as error:
        if not (isinstance(error, kinds) or is_out_of_memory(error)):
            raise
        traceback.clear_frames(error.__traceback__)  # lets go of the tensors that they hold
        parser.error(f"out of memory: {memory}" if is_out_of_memory(error) else
                     f"{error}{advice}")


def set_up_process():
    """What a program needs of the process it runs in."""
    # Once glibc has seen a block of this size freed (just under 32 MiB, the most that it learns
    # from), it keeps what a layer frees for the next one. Until then it hands it back to the kernel
    # and takes it again, page by page: a fifth of the time.
    torch.empty(31 * 2**20, dtype=torch.uint8)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed, as by `2>&-`
            setattr(sys, name, open(os.devnull, "w"))
        if isinstance(getattr(sys, name), io.TextIOWrapper):
            getattr(sys, name).reconfigure(errors="replace")  # not every terminal has a ×
    if isinstance(sys.stderr, io.TextIOWrapper):
        encoding = sys.stderr.encoding
        sys.stderr = Stderr(sys.stderr.detach(), encoding, "replace", line_buffering=True)
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C needs no traceback


class Stderr(io.TextIOWrapper):
    """Whose reader may go (`2>&1 | tee`, a closed terminal): that is no reason to lose a run."""

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            super().write(text)
        return len(text)

    def flush(self):
        with contextlib.suppress(OSError):
            super().flush()


def say(line: str):
    """Print; from the moment on when nobody reads stdout any more (`| head -1`), on stderr."""
    try:
        print(line, flush=True)
    except OSError:
        sys.stdout = sys.stderr
        print(line)


if __name__ == "__main__":
    main()
