"""Draw new images from a trained model: `python sample.py` after `python train.py --model …`.

Numbers refer to version 3 (January 2025) of the tutorial, arXiv 2403.18103. VAE (§1.3, Fig. 1.7):
decode z ~ N(0, I). DDPM (§2.4, "Inference of DDPM"; §2.5, "… using ε̂_θ"): run the reverse chain
from x_T ~ N(0, I) to x_0, in all T steps or, with --steps, in fewer, by DDIM (§2.6).

The second half is shared with train.py: models and checkpoints, devices, pictures, command lines.
"""
import argparse
import contextlib
import errno
import io
import itertools
import math
import os
import struct
import sys
import time
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

# torch works without NumPy; and for a bad file our own one-line error is enough.
warnings.filterwarnings("ignore", "Failed to initialize NumPy|Detected pickle|'torch.load' rec")

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from ddpm import DDPM, cauchy_alphas, cosine_alphas, linear_alphas
from unet import Fourier, UNet
from vae import VAE, conv_networks

BATCH = 256  # images per batch
STRIP_FRAMES, STRIP_IMAGES = 11, 4  # film strip: columns, and images (two rows each)
FORMAT = 6  # version of the checkpoint format


@torch.no_grad()
def draw(model: nn.Module, noise: Tensor, steps: int | None,
         eta: float) -> tuple[Tensor, list[tuple[int, Tensor]]]:
    """Decode z, or run the chain from x_T. Returns all images, uint8 (n, C, H, W), and of a DDPM a
    film of the first STRIP_IMAGES: up to STRIP_FRAMES pairs (t, x_t) on the way from x_T to x_0."""
    if isinstance(model, VAE):  # one pass of the decoder: x̂ = f_θ(z)
        return torch.cat([to_uint8(model.sample(z)) for z in noise.split(BATCH)]), []
    images, film, length = [], [], steps or model.T
    keep = torch.linspace(0, length, STRIP_FRAMES).round().tolist()  # evenly spaced, from x_T on
    with tqdm(total=length * math.ceil(len(noise) / BATCH), unit="step", desc="sampling") as bar:
        for x_T in noise.split(BATCH):
            # The boxes "Inference of DDPM": x_T ~ N(0, I), then x_{t−1} from x_t, down to x_0.
            chain = model.chain(x_T, steps, eta)
            for i, (t, x_t) in enumerate(itertools.chain([(model.T, x_T)], chain)):
                bar.update(i > 0)
                if i in keep and not images:  # first batch only
                    film.append((t, x_t[:STRIP_IMAGES]))
            images.append(to_uint8(x_t))  # the last x_t is x_0
    return torch.cat(images), film


@torch.no_grad()
def film_strip(model: DDPM, film: list[tuple[int, Tensor]]) -> Tensor:
    """A picture with two rows for each image: x_t, and below it x̂_θ(x_t)."""
    pairs = [torch.stack([x_t, model.predict_x0(x_t, t) if t else x_t], 1) for t, x_t in film]
    return grid(to_uint8(torch.stack(pairs, dim=2).flatten(0, 2)), columns=len(film))


def latent_grid(model: VAE, device: torch.device, side: int = 11) -> Tensor:
    """f_θ(z) on a grid of equally spaced quantiles of N(0, 1): z_1 to the right, z_2 upwards."""
    z = torch.special.ndtri((torch.arange(side) + 0.5) / side).to(device)
    return grid(to_uint8(model.sample(torch.cartesian_prod(-z, z).flip(1))))


# ---------------------------------------------------------------- command line


def parse_args(argv: list[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = Parser(prog="sample.py", description="Draw new images from a trained model.")
    add = parser.add_argument
    add("--checkpoint", type=Path, help="default: the newest checkpoint.pt under runs/")
    add("-n", type=number(int, 1, 2**31), default=64, help="number of images (default: 64)")
    add("--steps", type=number(int, 1), help="ddpm: number of steps, by DDIM (default: all T)")
    add("--eta", type=number(float, 0, 1), help="ddpm: DDIM's eta, from 0 (deterministic) to 1 (as "
        "much noise as DDPM) (default: 1)")
    add("--seed", type=number(int, 0, 2**63 - 1), default=0, help="random seed (default: 0)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: auto)")
    add("--precision", choices=["auto", "fp32", "bf16"], default="auto",
        help="auto: bf16 if a GPU or an x86 CPU has it (CPU: torch 2.11+) (default: auto)")
    add("--out", type=Path, help=".png (a grid) or .pt (the uint8 tensor (n, C, H, W)); default: "
        "samples.png next to the checkpoint")
    add("--strip", type=Path, metavar="FILE.png", help="ddpm: also write a film strip of the "
        f"first {STRIP_IMAGES}, from x_T to x_0, with the predicted x_0 below each x_t")
    add("--latent-grid", type=Path, metavar="FILE.png",
        help="vae trained with --latent-dim 2: also decode a grid of z")
    return parser, parser.parse_args(argv)


def prepare(args: argparse.Namespace) -> tuple[nn.Module, Tensor, dict[str, Path], str]:
    """The trained model, z or x_T, the files, and the model's step. ValueError or OSError."""
    args.checkpoint = args.checkpoint or max(
        Path("runs").rglob("checkpoint.pt"), key=lambda path: path.stat().st_mtime, default=None)
    if args.checkpoint is None:
        raise ValueError("no checkpoint.pt under runs/: train first (python train.py --model ddpm) "
                         "or name a file with --checkpoint")
    args.out = args.out or args.checkpoint.with_name("samples.png")
    files = {f"--{name.replace('_', '-')}": getattr(args, name)
             for name in ("out", "strip", "latent_grid") if getattr(args, name)}
    for option, path in files.items():
        suffixes = (".png", ".pt") if option == "--out" else (".png",)
        if path.suffix.lower() not in suffixes or not path.parent.is_dir():
            raise ValueError(f"{option} {path}: must end in {' or '.join(suffixes)} and be in an "
                             "existing folder")
        if (path.is_dir() or path.name == "checkpoint.pt"
                or path.resolve() == args.checkpoint.resolve()):
            raise ValueError(f"{option} {path}: refusing to overwrite a folder or a checkpoint")
    if len({path.resolve() for path in files.values()}) < len(files):
        raise ValueError(f"{', '.join(files)}: each needs a file of its own")
    state, model = read_checkpoint(args.checkpoint)
    config = state["config"]
    for option in ["steps", "eta", "strip"] if config["model"] == "vae" else ["latent_grid"]:
        if getattr(args, option) is not None:
            raise ValueError(f"--{option.replace('_', '-')} cannot be used with {args.checkpoint}, "
                             f"a {config['model']}")
    if args.steps and args.steps > model.T:
        raise ValueError(f"--steps {args.steps}: this chain has only {model.T} steps")
    if args.latent_grid and config["latent_dim"] != 2:
        raise ValueError(f"--latent-grid: z has {config['latent_dim']} dimensions in "
                         f"{args.checkpoint}, but the grid needs 2: train with --latent-dim 2")
    step, steps = state["step"], config["steps"]
    trained = f"step {step:,} of {steps:,}" + " (warning: hardly trained)" * (step < 0.05 * steps)
    torch.manual_seed(args.seed)
    device = pick_device(args.device)
    return model.to(device), draw_noise(config, args.n).to(device), files, trained


def main(argv: list[str] | None = None):
    parser, args = parse_args(argv)
    try:
        model, noise, files, trained = prepare(args)
        with autocast(noise.device, args.precision):
            images, film = draw(model, noise, args.steps, 1.0 if args.eta is None else args.eta)
            if args.out.suffix.lower() == ".pt":
                save(args.out, images)
            else:
                write_png(args.out, grid(images))
            if args.strip:
                write_png(args.strip, film_strip(model, film))
            if args.latent_grid:
                write_png(args.latent_grid, latent_grid(model, noise.device))
    except (ValueError, OSError) as error:
        parser.error(f"{error}")
    except (RuntimeError, MemoryError) as error:
        parser.error(f"{error}; a smaller -n needs less memory")
    print(f"wrote {', '.join(map(str, files.values()))}, from {args.checkpoint}, {trained}")


# ================================================= shared with train.py: models and checkpoints
SCHEDULES = {"cauchy": cauchy_alphas, "cosine": cosine_alphas, "linear": linear_alphas}


def build_model(config: dict) -> nn.Module:
    """The untrained model that a run's options describe."""
    shape = config["image_shape"]
    if config["model"] == "vae":
        networks = conv_networks(shape, config["latent_dim"], config["channels"])
        return VAE(*networks, config["decoder_std"])
    alphas = SCHEDULES[config["schedule"]](config["timesteps"])
    C, N = shape[0], len(config["fourier"])
    unet = UNet(C * (1 + 2 * N), C, config["channels"], config["multipliers"], config["blocks"],
                config["attention"], config["dropout"])
    return DDPM(Fourier(unet, config["fourier"]), alphas, config["predict"])


def draw_noise(config: dict, n: int) -> Tensor:
    """z or x_T ~ N(0, I), (n, d) or (n, C, H, W): made on the CPU, so the same on every device."""
    return torch.randn(n, *([config["latent_dim"]] if config["model"] == "vae" else
                            config["image_shape"]))


def load(path: Path):
    """Loads what torch.save wrote, running no code in it. Raises OSError or ValueError."""
    with open(path, "rb") as file:
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # damaged files raise almost any exception
            reason = str(error).split("WeightsUnpickler error:")[-1].strip().partition("\n")[0]
            raise ValueError(f"{path}: not written by torch.save, or damaged, or with more in it "
                             f"than tensors and plain values (torch: {reason})") from error


def read_checkpoint(path: Path) -> tuple[dict, nn.Module]:
    """All that train.py saved, and the model with its EMA weights. Raises OSError or ValueError."""
    state = load(path)
    if not isinstance(state, dict) or "format" not in state:
        raise ValueError(f"{path}: not a checkpoint of train.py")
    if state["format"] != FORMAT:
        raise ValueError(f"{path}: a checkpoint of format {state['format']}, from another version "
                         f"of train.py; this one reads format {FORMAT}")
    try:
        model = build_model(state["config"])
        model.load_state_dict(state["ema"])
        state.setdefault("step", state["config"]["steps"])  # weights alone: of a whole run
    except Exception as error:  # damaged values raise almost any exception
        raise ValueError(f"{path}: incomplete or damaged checkpoint ({error})") from error
    return state, model.eval()


def save(path: Path, value, replace: bool = True):
    """An atomic torch.save; if not `replace`, only where no file has this name. Raises OSError."""
    buffer, new, claimed = io.BytesIO(), Path(f"{path}.{os.getpid()}.tmp"), False
    torch.save(value, buffer)  # in memory: on a full disk torch.save raises RuntimeError
    path.parent.mkdir(parents=True, exist_ok=True)  # the folder may have been moved away
    try:
        with open(new, "wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            try:
                os.fsync(file.fileno())
            except OSError as error:  # raised, unless the file system lacks it
                if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
                    raise
        if not replace:  # if two runs start at once, this fails for one of them
            try:
                return os.link(new, path)
            except FileExistsError:
                raise
            except OSError:  # a file system without links
                open(path, "xb").close()
                claimed = True
        for _ in range(10):
            with contextlib.suppress(PermissionError):  # Windows: the old file is open elsewhere
                return os.replace(new, path)
            time.sleep(0.1)
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)
        if claimed and path.exists() and not path.stat().st_size:  # not replaced
            path.unlink()


# ---------------------------------------------------------------- devices


def pick_device(name: str) -> torch.device:
    """A device; "auto" is CUDA if available, else the CPU. Raises ValueError, as torch does."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        x = torch.ones(1, device=name)
        x.item()  # the meta device has no values
        return x.device
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).splitlines()[0].partition(". ")[0]
        raise ValueError(f"--device {name}: {reason}") from error


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    """bfloat16 autocast for "bf16", none for "fp32"; "auto" asks whether the hardware has bfloat16
    (CUDA since Ampere; from torch 2.11 on also CPUs with AMX or AVX-512 BF16). Never float16: its
    largest number is 65504. Cast weights are not cached: a CUDA graph would read old ones."""
    if precision == "auto" and device.type == "cuda":
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    elif precision == "auto" and device.type == "cpu":
        capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # new in torch 2.11
        bf16 = capabilities.get("avx512_bf16", False) or capabilities.get("amx_bf16", False)
    else:
        bf16 = precision == "bf16"
    return (torch.autocast(device.type, torch.bfloat16, cache_enabled=False) if bf16
            else contextlib.nullcontext())


# ---------------------------------------------------------------- pictures


def to_float(images: Tensor, device: torch.device) -> Tensor:
    """0..255 to [-1, 1], on the device."""
    return images.to(device, non_blocking=device.type == "cuda").float() / 127.5 - 1


def to_uint8(x: Tensor) -> Tensor:
    """[-1, 1] to 0..255."""
    return ((x + 1) * 127.5).round().clamp(0, 255).to("cpu", torch.uint8)


def grid(images: Tensor, columns: int | None = None) -> Tensor:
    """Tiles (n, C, H, W) into one picture (C, h, w), row by row, 2 pixels apart, about square."""
    n, C, H, W = images.shape
    columns = columns or math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    images = F.pad(images, (1, 1, 1, 1, 0, 0, 0, rows * columns - n))
    picture = images.view(rows, columns, C, H + 2, W + 2).permute(2, 0, 3, 1, 4)
    return F.pad(picture.reshape(C, rows * (H + 2), columns * (W + 2)), (1, 1, 1, 1))


def write_png(path: Path | str, picture: Tensor):
    """Write uint8 (C, H, W), C = 1 or 3, as a PNG (ISO/IEC 15948): a signature and three chunks."""
    C, H, W = picture.shape
    rows = bytearray(H * (1 + W * C))  # each starts with filter type 0, "none"
    torch.frombuffer(rows, dtype=torch.uint8).view(H, -1)[:, 1:] = (
        picture.permute(1, 2, 0).reshape(H, W * C))
    parts = [b"\x89PNG\r\n\x1a\n"]
    for kind, data in ((b"IHDR", struct.pack(">IIBBBBB", W, H, 8, {1: 0, 3: 2}[C], 0, 0, 0)),
                       (b"IDAT", zlib.compress(rows, 9)), (b"IEND", b"")):
        parts.append(struct.pack(">I", len(data)) + kind + data
                     + struct.pack(">I", zlib.crc32(kind + data)))
    Path(path).write_bytes(b"".join(parts))


# ---------------------------------------------------------------- command lines


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors on stderr (exit status 2)."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())[:600]}\n")


def number(kind: type, low: float, high: float = math.inf,
           word: str | None = None) -> Callable[[str], float | str]:
    """An argparse type: a number from low to high, or this word. Refuses nan."""
    def parse(text: str) -> float | str:
        if text == word:
            return word
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"must be from {low} to {high}, got {text}")
        return value
    parse.__name__ = kind.__name__  # for argparse's own message
    return parse


def quiet(method: Callable) -> Callable:
    """Wraps a method of stdout or stderr, so that a run survives the loss of its terminal."""
    def call(*arguments):
        with contextlib.suppress(OSError):
            return method(*arguments)
    return call


def run(main: Callable):
    """main() as a script."""
    # Freeing a block of just under 32 MiB raises glibc's mmap threshold to it, so that layers reuse
    # freed memory. Otherwise a CPU run spends up to a fifth of its time on pages from the kernel.
    torch.empty(31 * 2**20, dtype=torch.uint8)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w")  # None in a service or after >&-
        if hasattr(stream, "reconfigure"):  # a notebook's has no such method
            stream.reconfigure(errors="replace")  # for file names that it cannot encode
        stream.write, stream.flush = quiet(stream.write), quiet(stream.flush)
        setattr(sys, name, stream)
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    run(main)
